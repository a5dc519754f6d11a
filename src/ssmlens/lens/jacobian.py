"""Backwards through a model, block by block: vᵀ ∂y_t/∂x_s at every depth, in the memory of one block (SPEC §2).

    x¹ = embeddings,  xˡ⁺¹ = block_l(xˡ),  y = what is asked of the last hidden state       gᴸ⁺¹ = vᵀ ∂y/∂xᴸ⁺¹,  gˡ = gˡ⁺¹ ∂block_l/∂xˡ

One forward pass keeps what enters every block and no graph. Then, from the last block to the first, each is run once more with its graph, and
every vector v goes back through it. That is one forward pass more than keeping the whole graph, however many vectors there are, and the graph of
one block instead of all: L · length · d_model numbers and a block's own. What comes by on the way, gˡ, is the influence of layer l's input.

Whether a model is a chain of blocks is not taken from its name: `Backward` compares, on a few tokens, with the gradient of the whole graph, and where
they differ (blocks that also read the embeddings, say), or there are no blocks, it keeps the whole graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmlens.lens.subject import Subject, first_tensor

_PROOF = 12  # tokens on which a chain of blocks proves to be one
_AGREES = 1e-3

Ask = Callable[[Tensor], Tensor]  # last hidden states (batch, length, d_hidden) → y


class NotAChain(Exception):
    """This model is not block after block."""


class Backward:
    """in_blocks: whether block by block, or with one graph of the whole model. depths: how many gˡ there are (1: of the embeddings alone)."""

    def __init__(self, subject: Subject, tokens: Int[Tensor, "batch length"], in_blocks: bool | None = None) -> None:
        """in_blocks: whether, where it is known already."""
        self.subject = subject
        if in_blocks is None:
            in_blocks = len(subject.blocks) > 0 and self._is_chain(tokens[:1, :_PROOF])
        self.in_blocks = in_blocks
        self.depths = len(subject.blocks) if self.in_blocks else 1

    def __call__(
        self, tokens: Int[Tensor, "batch length"], ask: Ask, vectors: Sequence[Tensor], *, step: Callable[[int], None] = lambda n: None,
    ) -> Iterator[tuple[int, Sequence[Float[Tensor, "batch length d_model"]]]]:  # fmt: skip
        """(l, [gˡ for every v]) for l = L .. 1; l = 1 is with respect to the embeddings. vectors: each of the shape of y.

        The list is the same one every time, and changes: use it before asking for the next. step: called for every vector through every gˡ."""
        run = self._chain if self.in_blocks else self._whole
        with self.subject.still(), torch.enable_grad():
            yield from run(tokens, ask, vectors, step)

    def _is_chain(self, tokens: Tensor) -> bool:
        def ask(hidden: Tensor) -> Tensor:
            return hidden[:, -1]

        def first(run: Any) -> Tensor:
            v = torch.linspace(-1, 1, width, device=tokens.device, dtype=self.subject.dtype)[None]
            found: Tensor = list(run(tokens, ask, [v], lambda n: None))[-1][1][0]
            return found

        with self.subject.still(), torch.enable_grad():
            with torch.no_grad():
                width = self.subject.run(self.subject.embed(tokens)).shape[-1]
            try:
                chain = first(self._chain)
            except (NotAChain, RuntimeError, TypeError, ValueError):
                return False
            whole = first(self._whole)
        near = float((chain - whole).norm()) <= _AGREES * float(whole.norm())
        return near or not bool(torch.isfinite(whole).all())  # NaN is for the measurement to report

    def _chain(self, tokens: Tensor, ask: Ask, vectors: Sequence[Tensor], step: Callable[[int], None]) -> Iterator[Any]:
        embeddings = self.subject.embed(tokens).detach().requires_grad_()
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entered: list[Tensor] = []
        left: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, place = _stream(args, kwargs)
            entered.append(x)
            cut = _placed(args, kwargs, place, x.detach())
            others = [a for a in (*cut[0], *cut[1].values()) if isinstance(a, Tensor) and a.requires_grad]
            if others:
                raise NotAChain
            calls.append(cut)
            return cut

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            left.append(first_tensor(output).detach().requires_grad_())
            return left[0] if isinstance(output, Tensor) else (left[0], *output[1:])

        blocks = self.subject.blocks
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(blocks[-1].register_forward_hook(leave).remove)
            y = ask(self.subject.run(embeddings))
        if len(calls) != len(blocks):
            raise NotAChain
        gradients, front = list(vectors), entered[0]
        _back(y, left[0], gradients)
        del y, entered, left
        for index in range(len(blocks) - 1, -1, -1):
            args, kwargs = calls.pop()
            x, place = _stream(args, kwargs)
            x = x.detach().requires_grad_()
            args, kwargs = _placed(args, kwargs, place, x)
            out = first_tensor(blocks[index](*args, **kwargs))
            _back(out, x, gradients, step)
            del out
            if index == 0 and front is not embeddings:  # positions are added, or a scale, between the two
                _back(front, embeddings, gradients)
            yield index + 1, gradients

    def _whole(self, tokens: Tensor, ask: Ask, vectors: Sequence[Tensor], step: Callable[[int], None]) -> Iterator[Any]:
        embeddings = self.subject.embed(tokens).detach().requires_grad_()
        y = ask(self.subject.run(embeddings))
        gradients = list(vectors)
        _back(y, embeddings, gradients, step)
        yield 1, gradients


def _back(y: Tensor, x: Tensor, vectors: list[Tensor], step: Callable[[int], None] = lambda n: None) -> None:
    """Every v becomes vᵀ ∂y/∂x, in place, so that two of them exist at a time and not two lists."""
    for k, v in enumerate(vectors):
        (vectors[k],) = torch.autograd.grad(y, x, grad_outputs=v.to(y), retain_graph=k + 1 < len(vectors))
        step(1)


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int | str]:
    """The residual stream among a block's arguments, and where it is. Raises NotAChain."""
    if args and isinstance(args[0], Tensor):
        return args[0], 0
    if isinstance(x := kwargs.get("hidden_states"), Tensor):
        return x, "hidden_states"
    raise NotAChain


def _placed(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, x: Tensor) -> Any:
    return ((x, *args[1:]), kwargs) if place == 0 else (args, {**kwargs, "hidden_states": x})
