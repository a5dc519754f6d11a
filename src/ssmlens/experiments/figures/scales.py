"""Which models the figures look at, how many initialisations of each, how long the text: by scale."""

from dataclasses import dataclass

from ssmlens.errors import UserError
from ssmlens.experiments.base import Request, choose
from ssmlens.experiments.figures.models import BESIDE, Model
from ssmlens.models.pretrained import packaged

HUB_MAMBA = tuple(f"state-spaces/mamba-{size}-hf" for size in ("130m", "370m", "790m", "1.4b", "2.8b"))
HUB_PYTHIA = tuple(f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1b", "1.4b", "2.8b"))


@dataclass(frozen=True)
class Scale:
    """sizes: of Mamba at initialisation, with how many seeds and how many tokens; beside each the Pythia nearest to its size.
    trained: of the trained models, with so many tokens and sequences. local: whether a transformer is trained beside the first of them."""

    sizes: dict[str, tuple[int, int]]
    sequences: int
    trained: tuple[str, ...]
    trained_length: int
    trained_sequences: int
    local: bool


SCALES = {
    "smoke": Scale({"tiny": (2, 96)}, 2, ("mamba-default",), 64, 3, False),
    "laptop": Scale({"130M": (3, 2048), "370M": (3, 512)}, 2, ("mamba-default", "mamba-polarized"), 512, 8, True),
    "paper": Scale(
        {"130M": (3, 2048), "370M": (3, 2048), "790M": (3, 2048), "1.4B": (3, 2048), "2.8B": (3, 2048)}, 4, (*HUB_MAMBA, *HUB_PYTHIA), 2048, 8, False
    ),
}  # fmt: skip


def chosen(request: Request) -> Scale:
    """The scale of a request. Raises UserError for one that there is not, and for variants, which the figures do not have."""
    choose("scale", request.scale, SCALES)
    if request.variants:
        raise UserError("the figures have no variants: leave --variant away")
    return SCALES[request.scale]


def seeds(scale: Scale, request: Request, size: str) -> range:
    return range(request.seeds or scale.sizes[size][0])


def mambas(scale: Scale, request: Request) -> list[Model]:
    return [Model("mamba", size, seed) for size in scale.sizes for seed in seeds(scale, request, size)]


def pythias(scale: Scale, request: Request) -> list[Model]:
    return [Model("pythia", BESIDE[size], seed) for size in scale.sizes for seed in seeds(scale, request, size)]


def trained(scale: Scale, request: Request) -> list[Model]:
    """Those that the caller names, or the scale's own."""
    return [Model("loaded", path) for path in request.models or scale.trained]


def beside(scale: Scale, request: Request, initial_seeds: int) -> list[Model]:
    """Of the first trained model: a transformer trained as it was, where that can be done; else one at initialisation."""
    first = (request.models or scale.trained)[0]
    if scale.local and request.models is None and first in packaged():
        return [Model("trained transformer", first)]
    return [Model("transformer", first, seed) for seed in range(initial_seeds)] if first in packaged() else []


def length(scale: Scale, model: Model) -> int:
    sizes = {
        **{size: n for size, (_, n) in scale.sizes.items()},
        **{BESIDE[size]: n for size, (_, n) in scale.sizes.items()},
    }
    return sizes[model.of] if model.kind in ("mamba", "pythia") else scale.trained_length


def sequences(scale: Scale, model: Model) -> int:
    return scale.sequences if model.kind in ("mamba", "pythia") else scale.trained_sequences
