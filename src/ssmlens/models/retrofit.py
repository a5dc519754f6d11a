"""Polarize a model that is trained: state channels at one and at zero are appended, and say nothing until training lets them.

    learned state   h, read by C          →          [h_one, h, h_zero], read by [0, C, 0]

The new channels' input weights are fresh, their read-out is zero: logits are what they were (bitwise, or to rounding where the order
of a sum changes), and the gradient to the read-out is alive, since the new channels hold something from the first token on.

In the parameters of a polarized mixer the entries of a plain one lie in runs: units that were there, with room for the pinned ones before
and after. `new_entries` says which entries of a model are not from its plain twin; what is trained with `only_polarized` are these.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers.mamba import Mamba
from ssmlens.mixers.mamba2 import Mamba2
from ssmlens.models.architecture import StackModel
from ssmlens.polarization import Polarization

# What reads the new channels: a parameter whose new entries are zero at first. Of linear attention there is none: its features, and
# with them its read-out, are positive whatever the weights.
READ_OUT = {
    "mamba": "x_proj.weight", "mamba2": "out_proj.weight", "retnet": "out_proj.weight", "gla": "q_proj.weight", "hgrn2": "q_proj.weight",
    "rwkv4": "output.weight", "rwkv5": "r_proj.weight", "rwkv6": "r_proj.weight", "griffin": "linear_out.weight", "mingru": "to_out.weight",
    "minlstm": "to_out.weight", "s4d": "kernel.C_pinned", "s4": "kernel.C_pinned", "h3": "kernel.C_pinned",
}  # fmt: skip
OF_HEADS = ("mamba2", "retnet")  # a unit is a whole head, not a dimension of each

Run = tuple[
    int, int
]  # (units, width): so many units of so many entries that grow by the pinned ones; (0, n): n entries that stay


def polarize(model: nn.Module, polarization: Polarization | None = None, *, seed: int = 0) -> StackModel:
    """A new model with pinned state channels appended to every mixer that can have them; its outputs are `model`'s until it is trained.

    polarization: one channel at one and one at zero by default. seed: of the new channels' input weights.
    Raises UserError for a model that is neither a LanguageModel nor a Classifier, is polarized already or has nothing to polarize, and for mode "replace", which
    would change the outputs."""
    polarization = polarization or Polarization()
    if not isinstance(model, StackModel):
        raise UserError(
            f"{type(model).__name__} cannot be polarized: only ssmlens models, and the families that ssmlens.load converts, can be"
        )
    architecture = model.config.architecture
    if architecture.polarization is not None:
        raise UserError("this model is polarized already")
    if polarization.mode == "replace":
        raise UserError(
            'a trained model can only be polarized by mode "append": "replace" would change what it computes'
        )
    names = [name for name in dict.fromkeys(architecture.mixers()) if mixers.polarizable(name)]
    if not names:
        raise UserError(
            f"there is nothing to polarize: {', '.join(dict.fromkeys(architecture.mixers()))} has no transition to pin"
        )
    for name in names:
        if name not in READ_OUT:
            raise UserError(
                f"a trained {name} cannot be polarized: its read-out cannot begin at zero; train it polarized"
            )
    fields = architecture.model_dump(mode="json") | {"polarization": polarization.model_dump(mode="json")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = type(model)(type(model.config)(**fields))
    plain = next(model.parameters())
    new.to(plain.device, plain.dtype)
    state = model.state_dict()
    with torch.no_grad():
        for name, p in [*new.named_parameters(), *new.named_buffers()]:
            if name in state and state[name].shape == p.shape:
                p.copy_(state[name])
        for prefix, mixer, kind in _polarized(new):
            for name, p in mixer.named_parameters():
                old = state.get(f"{prefix}.{name}")
                if old is None or old.shape != p.shape:
                    _fill(p, old, kind, mixer, name, READ_OUT[kind] == name)
    if hasattr(model, "generation_config"):
        new.generation_config = model.generation_config
    return new.train(model.training)


def new_entries(model: StackModel) -> dict[str, Tensor]:
    """Parameter name → bool mask of its shape, True where a polarized model has an entry that its plain twin has not. Parameters
    without such entries are left out; a plain model has none."""
    found: dict[str, Tensor] = {}
    for prefix, mixer, kind in _polarized(model):
        plain = mixers.build(kind, mixer.d_model, **mixer.config.model_dump())
        shapes = {name: p.shape for name, p in plain.named_parameters()}
        for name, p in mixer.named_parameters():
            mask = torch.ones(p.shape, dtype=torch.bool, device=p.device)
            if name in shapes:
                if shapes[name] == p.shape:
                    continue
                dim, index = _places(kind, mixer, name, shapes[name], p.shape)
                mask.index_fill_(dim, index.to(p.device), False)
            found[f"{prefix}.{name}"] = mask
    return found


def train_only_new(model: StackModel) -> list[nn.Parameter]:
    """Freeze all but the new entries of a polarized model, and return the parameters that hold them, for an optimizer without weight
    decay: their old entries get no gradient, and Adam leaves such entries as they are. Raises UserError where nothing is new."""
    entries = new_entries(model)
    if not entries:
        raise UserError("this model is not polarized by appending: polarize it first (`ssmlens polarize MODEL -o DIR`)")
    chosen = []
    for name, p in model.named_parameters():
        p.requires_grad_(name in entries)
        if name in entries:
            mask = entries[name]
            p.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))
            chosen.append(p)
    return chosen


def _polarized(model: StackModel) -> Iterator[tuple[str, mixers.Mixer, str]]:
    """The name of each polarized mixer among the model's modules, the mixer, and its kind."""
    for i, kind in enumerate(model.config.architecture.mixers()):
        mixer: mixers.Mixer = model.backbone.blocks[i].mixer
        if mixer.polarization is not None:
            yield f"backbone.blocks.{i}.mixer", mixer, kind


def _fill(p: Tensor, old: Tensor | None, kind: str, mixer: nn.Module, name: str, reads: bool) -> None:
    """The old entries into their places; the new ones keep their fresh values, or are zero where they read the state."""
    if old is None:
        if reads:
            p.zero_()
        return
    dim, index = _places(kind, mixer, name, old.shape, p.shape)
    index = index.to(p.device)
    if reads:
        fresh = p.clone() if isinstance(mixer, Mamba) else None
        p.zero_()
        if fresh is not None:  # x_proj holds Δ's rows and B's before C's: B's new ones stay fresh
            before_C = len(p) - mixer.d_state  # type: ignore[operator]
            p[:before_C] = fresh[:before_C]
    p.index_copy_(dim, index, old)


def _places(kind: str, mixer: nn.Module, name: str, old: torch.Size, new: torch.Size) -> tuple[int, Tensor]:
    """The dimension that grew, and where the old entries lie along it."""
    dim = next(d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    polarization: Polarization = mixer.polarization  # type: ignore[assignment]
    places, at = [], 0
    for units, width in _runs(kind, mixer, name, old[dim], (new[dim] - old[dim]) // polarization.pinned):
        if units == 0:
            places.append(torch.arange(at, at + width))
            at += width
            continue
        at += polarization.ones * width
        places.append(torch.arange(at, at + units * width))
        at += (units + polarization.zeros) * width
    index = torch.cat(places)
    if at != new[dim] or len(index) != old[dim]:
        raise AssertionError(f"{kind}.{name}: {old[dim]} entries do not grow to {new[dim]} by its layout")
    return dim, index


def _runs(kind: str, mixer: nn.Module, name: str, old: int, growth: int) -> list[Run]:
    """growth: how many entries came for each pinned unit."""
    if isinstance(mixer, Mamba) and name == "x_proj.weight":
        return [(0, mixer.dt_rank), (mixer.learned, 1), (mixer.learned, 1)]
    if isinstance(mixer, Mamba2):
        inner, bc = (mixer.units, mixer.d_head), (0, 2 * mixer.config.n_groups * mixer.config.d_state)
        if name.startswith("in_proj"):
            return [inner, inner, bc, (mixer.units, 1)]
        if name.startswith("conv_"):
            return [inner, bc]
    if kind in OF_HEADS:
        return [(old // growth, growth)]
    return [(old // growth, 1)] * growth
