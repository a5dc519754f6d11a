"""Reading long texts with any causal language model: in pieces, with the state carried on and forked for many continuations.

Whether a model of transformers can go on from its state with more than one token, only trying tells: some begin anew without a word.
Those that cannot are given all tokens again at every step: slower, and right.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.models import LanguageModel, StateCache

PIECE = 1 << 14  # tokens, over all rows, read in one call
_TRIAL = (13, 11)  # tokens before and after the cut


class Reader:
    """A causal language model with its state. carries: whether the state is its own; else it is the tokens so far.

    The methods neither change a state that they are given nor share memory with it, but for `generate`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.carries = True
        if hasattr(model, "base_model_prefix") and not isinstance(model, LanguageModel):
            self.carries = self._goes_on()

    @torch.no_grad()
    def read(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits after the last token, (batch, vocab), and the state there. Uses up the state given."""
        tokens = tokens.to(self.device)
        if not self.carries:
            everything = tokens if state is None else torch.cat([state, tokens], 1)
            return self._call(everything, 1, use_cache=False).logits[:, -1].float(), everything
        out: Any = None
        for piece in tokens.split(max(1, PIECE // tokens.shape[0]), 1):
            out = self._call(piece, 1, past_key_values=state, use_cache=True)
            state = out.past_key_values
        return out.logits[:, -1].float(), state

    def fork(self, state: Any, count: int) -> Any:
        """The state of one sequence as the start of `count`; the original stays as it is."""
        if isinstance(state, Tensor):
            return state.repeat_interleave(count, 0)
        if isinstance(state, StateCache):
            return state.repeated(count)
        forked = copy.deepcopy(state)
        layers = getattr(forked, "layers", None)
        for part in layers if layers is not None else [] if forked is None else [forked]:
            if hasattr(part, "batch_repeat_interleave"):
                part.batch_repeat_interleave(count)
            _repeat(part, count)  # what that left: the recurrent half of a layer that has attention too
        return forked

    @torch.no_grad()
    def log_probability(self, logits: Tensor, state: Any, answers: list[list[int]]) -> list[float]:
        """Of answers[i] after row i. logits: those at the end of the prompts. The state is not advanced."""
        width = max(len(a) for a in answers)
        padded = torch.tensor([a + [0] * (width - len(a)) for a in answers], device=self.device)
        score = logits.log_softmax(-1).gather(1, padded[:, :1])
        if width > 1:
            given = padded[:, :-1]
            if not self.carries:
                out = self._call(torch.cat([state, given], 1), width - 1, use_cache=False)
            else:  # ours makes new states and leaves the old ones
                own = state if isinstance(state, StateCache) else copy.deepcopy(state)
                out = self._call(given, width - 1, past_key_values=own, use_cache=True)
            rest = out.logits[:, 1 - width :].float().log_softmax(-1).gather(2, padded[:, 1:, None])[..., 0]
            score = torch.cat([score, rest], 1)
        # padding comes after an answer: what it would have scored is left out
        return [float(row[: len(a)].sum()) for row, a in zip(score, answers, strict=True)]

    def generate(self, logits: Tensor, state: Any, count: int) -> list[list[int]]:
        """The `count` tokens after each row, each the most probable. The state given is used up."""
        found = [logits.argmax(-1)]
        for _ in range(count - 1):
            logits, state = self.read(found[-1][:, None], state)
            found.append(logits.argmax(-1))
        return torch.stack(found, 1).tolist()

    def _call(self, tokens: Tensor, last: int, **options: Any) -> Any:
        """The model's output, of the last so many positions where it can leave out the others."""
        return self.model(input_ids=tokens, **options, **({"logits_to_keep": last} if self._short else {}))

    def _goes_on(self) -> bool:
        """Whether logits after a forked state are those of the whole text at once."""
        vocab, (before, behind) = int(getattr(self.model.config, "vocab_size", 2)), _TRIAL
        tokens = torch.randint(vocab, (1, before + behind), generator=torch.Generator().manual_seed(0)).to(self.device)
        training = self.model.training
        try:
            self.model.eval()
            with torch.no_grad():
                want = self._call(tokens, 1, use_cache=False).logits[:, -1].float()
            _, state = self.read(tokens[:, :before])
            _, state = self.read(tokens[:, before:-1].expand(2, -1), self.fork(state, 2))
            got, _ = self.read(tokens[:, -1:].expand(2, -1), state)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError):
            return False
        finally:
            self.model.train(training)
        return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


def _repeat(part: Any, count: int) -> None:
    """In place: every tensor of one sequence that a cache's layer holds becomes one of `count`."""

    def more(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat_interleave(count, 0) if value.dim() > 1 and len(value) == 1 else value
        if isinstance(value, dict):
            return {key: more(each) for key, each in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(more(each) for each in value)
        return value

    for name, value in vars(part).items():
        setattr(part, name, more(value))
