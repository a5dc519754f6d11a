"""A model under the lens: embed tokens (or vectors), run embeddings to the last hidden state, look inside every block.

The measurements need no more than this of a model, so that ssmlens' own models, transformers' causal language models and a hand-made
system in a test all look the same to them. Nothing here changes a model: `still` puts back every flag that it touched.

Vectors, pixels say, are numbered: to the measurements they are tokens of a vocabulary of their own, whose table the subject holds. A class
token that a model puts behind its inputs is one more.

Legend: batch sequences, length tokens, d_model width of embeddings and hidden states, vocab output tokens.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens.foreign import recurrent

_REMEMBERED = 2**29  # bytes
_SHORTEST = 4  # vectors
_FEW, _ROUNDED = 12, 100  # tokens; resolutions of the dtype by which rounding may change an output (FFTs do)


@dataclass(frozen=True)
class Access:
    """Where things are in one kind of model; every function takes the model first, so that a copy of it can be measured too.

    run: embeddings → the last hidden state, after the final norm, before the head. head: that → logits at every token.
    blocks: the blocks in order. mixer: what mixes time in one of them, or None.

    vectors: embed takes floats (batch, length, d_input) instead of tokens. tail: how many vectors of its own it puts behind them (a class token).
    read: last hidden states → the answer of a model that gives one for a whole sequence (batch, outputs), a classifier's logits."""

    embed: Callable[[Any, Tensor], Float[Tensor, "batch length d_model"]]
    run: Callable[[Any, Float[Tensor, "batch length d_model"]], Float[Tensor, "batch length d_hidden"]]
    head: Callable[[Any, Tensor], Tensor] | None = None
    blocks: Callable[[Any], list[nn.Module]] = lambda model: []
    mixer: Callable[[Any], nn.Module | None] = lambda block: getattr(block, "mixer", None)
    vectors: bool = False
    tail: Callable[[Any], int] = lambda model: 0
    read: Callable[[Any, Tensor], Tensor] | None = None


class _Vectors(NamedTuple):
    """The vector of token first + i is values[i]; every token beyond them stands for one that the model adds itself."""

    values: Float[Tensor, "rows d_input"]
    first: int


@dataclass(frozen=True)
class BlockPass:
    """What went through block `index` on one forward pass: x enters the mixer (after the block's norm), y leaves it, out leaves the
    block. x and y are None where the block has no mixer that we know."""

    index: int
    mixer: Any
    x: Float[Tensor, "batch length d_model"] | None
    y: Float[Tensor, "batch length d_model"] | None
    out: Float[Tensor, "batch length d_model"]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.x, self.y, self.out) if x is not None)


class Subject:
    """`Subject(name, model)` for a ssmlens LanguageModel or Classifier or a transformers causal language model; anything else needs `access`.

    Raises UserError for a model that it does not know how to run."""

    def __init__(self, name: str, model: nn.Module, access: Access | None = None) -> None:
        self.name = name
        self.model = model
        self.access = access or _access(model)
        self.blocks = self.access.blocks(model)
        self._inside = [self.access.mixer(block) for block in self.blocks]
        # transformers' layers of a kind that we know, as ours: theirs say nothing of a_t
        self.mixers = [recurrent(inside) or inside for inside in self._inside]
        self._passes: dict[bytes, list[BlockPass]] | None = None
        self._vectors: _Vectors | None = None

    @classmethod
    def of(cls, model: "nn.Module | Subject", name: str = "model") -> "Subject":
        return model if isinstance(model, Subject) else cls(name, model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that embeddings have."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def recurrent(self) -> list[int]:
        """Indices of the blocks that say their own a_t, Δ_t b_t and h_t. Attention and other transitions that are not diagonal do not."""
        return [
            index
            for index, mixer in enumerate(self.mixers)
            if hasattr(mixer, "coefficients") and getattr(mixer, "diagonal", True)
        ]

    @property
    def has_head(self) -> bool:
        return self.access.head is not None

    @property
    def tail(self) -> int:
        """Tokens that the model itself puts behind its inputs."""
        return self.access.tail(self.model)

    def tokens(self, inputs: Any, shortest: int = 8) -> Int[Tensor, "batch length"]:
        """Token sequences of equal length, checked against the vocabulary and put on the model's device; of vectors (batch, length, d_input) their
        numbers, and those of the model's own class token. Raises UserError."""
        if self.access.vectors:
            return self._numbers(inputs)
        try:
            tokens = torch.as_tensor(inputs)
        except (TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"inputs must be token numbers of shape (sequences, length): {e}") from None
        if tokens.ndim == 1:
            tokens = tokens[None]
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise UserError(
                f"inputs must be token numbers of shape (sequences, length), not {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.shape[0] < 1 or tokens.shape[1] < shortest:
            raise UserError(
                f"inputs hold {tokens.shape[0]} sequences of {tokens.shape[1]} tokens; at least one of {shortest} is needed"
            )
        config = getattr(self.model, "config", None)
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and tokens.shape[1] > longest:
            raise UserError(
                f"{self.name} reads at most {longest} tokens, the sequences have {tokens.shape[1]}: give a smaller length"
            )
        vocab_size = getattr(config, "vocab_size", None)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise UserError(
                f"inputs hold token {low if low < 0 else high}, but {self.name} knows 0..{(vocab_size or 0) - 1}"
            )
        return tokens.to(self.device, torch.long)

    def _numbers(self, inputs: Any) -> Int[Tensor, "batch length"]:
        wanted = "vectors of shape (sequences, length, d_input)"
        try:
            x = torch.as_tensor(inputs)
        except (TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{self.name} reads {wanted}: {e}") from None
        if x.ndim == 2 and not x.is_floating_point() and self._vectors is not None:
            return x.to(self.device)  # numbers that it gave itself
        if x.ndim != 3 or not x.is_floating_point() or x.shape[0] < 1 or x.shape[1] < _SHORTEST:
            raise UserError(f"{self.name} reads {wanted}, {_SHORTEST} of them at least, not {x.dtype} {tuple(x.shape)}")
        of = getattr(self.model, "config", self.model)
        for dim, name in ((1, "length"), (2, "d_input")):
            number = getattr(of, name, None)
            if isinstance(number, int) and x.shape[dim] != number:
                raise UserError(f"{self.name} has {name} {number}, the inputs have {x.shape[dim]}: {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"the inputs of {self.name} hold NaN or infinity")
        rows = x.detach().cpu().contiguous().flatten(0, 1)
        # numbers that differ where the vectors do, so that whoever compares tokens compares vectors
        first = int(hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:12], 16)
        self._vectors = _Vectors(
            rows.to(self.device, torch.float32 if self.device.type == "mps" else rows.dtype), first
        )
        numbers = first + torch.arange(len(rows), device=self.device).view(x.shape[:2])
        return torch.cat([numbers, numbers.new_full((len(x), self.tail), first + len(rows))], 1)

    def shares_vectors_of(self, other: "Subject") -> "Subject":
        """The same numbers stand for the same vectors in both."""
        self._vectors = other._vectors
        return self

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        if self._vectors is None:
            return self.access.embed(self.model, tokens)
        values, first = self._vectors
        given = tokens[:, : int((tokens[0] < first + len(values)).sum())]
        return self.access.embed(self.model, values[given - first].to(self.dtype))[:, : tokens.shape[1]]

    def run(self, embeddings: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_hidden"]:
        return self.access.run(self.model, embeddings)

    def logits(self, hidden: Float[Tensor, "... d_hidden"]) -> Float[Tensor, "... vocab"]:
        if self.access.head is None:
            raise UserError(f"{self.name} has no head: measure its hidden state instead of its logits")
        return self.access.head(self.model, hidden)

    def read(self, hidden: Float[Tensor, "batch length d_hidden"]) -> Float[Tensor, "batch outputs"]:
        """The one answer to a whole sequence. Raises UserError for a model that has an answer at every token."""
        if self.access.read is None:
            raise UserError(f"{self.name} gives no single answer to a sequence: it is no classifier")
        return self.access.read(self.model, hidden)

    def is_causal(self, tokens: Int[Tensor, "batch length"]) -> bool:
        """Whether earlier outputs stay as they are when the last of a few tokens changes."""
        with self.still(), torch.no_grad():
            x = self.embed(tokens[:1, :_FEW])
            other = torch.cat([x[:, :-1], -x[:, -1:]], dim=1)
            before, after = (self.run(one)[:, :-1] for one in (x, other))
        allowed = _ROUNDED * torch.finfo(self.dtype).eps * float(before.norm())
        return not float((after - before).norm()) > allowed  # NaN is for the measurements to report

    def walk(self, tokens: Int[Tensor, "batch length"], visit: Callable[[BlockPass], None]) -> None:
        """One forward pass without gradients; `visit` sees each block as it finishes, so that no more than one is held (`remembering` aside)."""
        key = tokens.cpu().numpy().tobytes()
        if self._passes is not None and len(self._passes.get(key, ())) == len(self.blocks) > 0:
            with self.still(), torch.no_grad():
                for one in self._passes[key]:
                    visit(one)
            return
        if self._passes is not None:
            self._passes[key] = []
        seen: dict[str, Tensor] = {}
        handles = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen["x"], seen["y"] = first_tensor(args or tuple(kwargs.values())), first_tensor(output)

        def finished(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                one = BlockPass(
                    index, self.mixers[index], seen.pop("x", None), seen.pop("y", None), first_tensor(output)
                )
                self._remember(key, one)
                visit(one)

            return hook

        if not self.blocks:
            raise UserError(f"{self.name} shows no blocks to look into")
        try:
            for index, (block, mixer) in enumerate(zip(self.blocks, self._inside, strict=True)):
                if mixer is not None:
                    handles.append(mixer.register_forward_hook(keep, with_kwargs=True))
                handles.append(block.register_forward_hook(finished(index)))
            with self.still(), torch.no_grad():
                self.run(self.embed(tokens))
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, `walk` runs the model once for the same tokens, as long as what it saw takes no more than half a gigabyte. The model must not change."""
        self._passes = {}
        try:
            yield
        finally:
            self._passes = None

    def _remember(self, key: bytes, one: BlockPass) -> None:
        if self._passes is None or key not in self._passes:
            return
        self._passes[key].append(one)
        if sum(seen.nbytes for passes in self._passes.values() for seen in passes) > _REMEMBERED:
            del self._passes[key]

    def in_double(self) -> "Subject":
        """A float64 copy, to see what float32 loses."""
        twin = Subject(f"{self.name} (float64)", copy.deepcopy(self.model).double(), self.access)
        return twin.shares_vectors_of(self)

    def at_initialisation(self, seed: int) -> "Subject":
        """The same configuration with fresh parameters. Raises UserError where the model has no configuration to build from."""
        config = getattr(self.model, "config", None)
        if config is None:
            raise UserError(f"{self.name} has no configuration, so it cannot be built again at initialisation")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh: nn.Module = type(self.model)(copy.deepcopy(config))
        made = Subject(f"{self.name} (at initialisation)", fresh.to(self.device, self.dtype), self.access)
        return made.shares_vectors_of(self)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Evaluation mode and no gradients to parameters; afterwards everything is as it was."""
        training = [m for m in self.model.modules() if m.training]
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for p in learning:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for m in training:
                m.training = True
            for p in learning:
                p.requires_grad_(True)


def _access(model: Any) -> Access:
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and hasattr(backbone, "blocks") and hasattr(backbone, "embedding"):
        return _OWN
    if isinstance(getattr(backbone, "blocks", None), nn.ModuleList) and hasattr(model, "pool"):
        return _CLASSIFIER
    if type(model).__name__ == "CryptoMamba":
        return _CRYPTOMAMBA
    base = getattr(model, "base_model", None)
    if (
        callable(getattr(model, "get_input_embeddings", None))
        and isinstance(base, nn.Module)
        and hasattr(model, "config")
    ):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UserError(f"{type(model).__name__} has an encoder: only causal language models can be measured")
        return _TRANSFORMERS if model.get_output_embeddings() is not None else _TRANSFORMERS_HEADLESS
    raise UserError(
        f"{type(model).__name__} is neither a ssmlens model nor a transformers causal language model; "
        "wrap it: Subject(name, model, Access(embed=..., run=...))"
    )


def _own_run(model: Any, embeddings: Tensor) -> Tensor:
    hidden: Tensor = first_tensor(model.backbone(embeddings))
    return hidden


def _transformers_run(model: Any, embeddings: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return hidden


def _transformers_blocks(model: Any) -> list[nn.Module]:
    """The list of blocks has a name of its own in every family, but it is always as long as the model is deep."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return list(lists[0]) if lists else []


def _transformers_mixer(block: nn.Module) -> nn.Module | None:
    """In a block that has both side by side the recurrence, which can be looked into."""
    for name in ("mixer", "mamba", "self_attn", "attention", "attn", "linear_attn"):
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    return None


def first_tensor(output: Any) -> Any:
    """The hidden states of an output that may be a tensor, a tuple that begins with it, or transformers' output object."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0]


_OWN = Access(
    embed=lambda model, tokens: model.backbone.embedding(tokens),
    run=_own_run,
    head=lambda model, hidden: model.head(hidden),
    blocks=lambda model: list(model.backbone.blocks),
)
_CLASSIFIER = Access(
    embed=lambda model, inputs: model.embed(inputs),
    run=_own_run,
    blocks=lambda model: list(model.backbone.blocks),
    vectors=True,
    tail=lambda model: int(model.config.pooling == "class_token"),
    read=lambda model, hidden: model.head(model.pool(hidden)),
)
_CRYPTOMAMBA = Access(
    embed=lambda model, inputs: inputs,
    run=lambda model, x: model.run(x),
    blocks=lambda model: list(model.blocks),
    mixer=lambda step: step.block.mixer,
    vectors=True,
    read=lambda model, hidden: model.read(hidden),
)
_TRANSFORMERS = Access(
    embed=lambda model, tokens: model.get_input_embeddings()(tokens),
    run=_transformers_run,
    head=lambda model, hidden: model.get_output_embeddings()(hidden),
    blocks=_transformers_blocks,
    mixer=_transformers_mixer,
)
_TRANSFORMERS_HEADLESS = Access(
    embed=_TRANSFORMERS.embed, run=_transformers_run, blocks=_transformers_blocks, mixer=_transformers_mixer
)
