"""The mixers, by name. `build` makes one; `names` lists them."""

from typing import Any

from ssmlens.errors import UserError, nearest
from ssmlens.mixers.attention import Attention
from ssmlens.mixers.base import Mixer, MixerConfig, PlacedConfig
from ssmlens.mixers.gla import GLA
from ssmlens.mixers.griffin import Griffin
from ssmlens.mixers.h3 import H3
from ssmlens.mixers.hgrn2 import HGRN2
from ssmlens.mixers.linear_attention import LinearAttention
from ssmlens.mixers.mamba import Mamba, MambaConfig
from ssmlens.mixers.mamba2 import Mamba2
from ssmlens.mixers.mingru import MinGRU
from ssmlens.mixers.minlstm import MinLSTM
from ssmlens.mixers.retnet import RetNet
from ssmlens.mixers.rwkv4 import RWKV4
from ssmlens.mixers.rwkv5 import RWKV5
from ssmlens.mixers.rwkv6 import RWKV6
from ssmlens.mixers.s4 import S4
from ssmlens.mixers.s4d import S4D
from ssmlens.polarization import Polarization

__all__ = [
    "Mamba",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "build",
    "configure",
    "get",
    "names",
    "place",
    "polarizable",
    "register",
]

_REGISTRY: dict[str, type[Mixer]] = {}


def register(name: str, mixer: type[Mixer]) -> None:
    """Make a mixer known under a name. Raises ValueError where the name is taken by another."""
    if _REGISTRY.setdefault(name, mixer) is not mixer:
        raise ValueError(f"a mixer named {name!r} is registered already: {_REGISTRY[name].__name__}")


register("mamba", Mamba)
register("linear_attention", LinearAttention)
register("retnet", RetNet)
register("gla", GLA)
register("mamba2", Mamba2)
register("rwkv5", RWKV5)
register("rwkv6", RWKV6)
register("hgrn2", HGRN2)
register("s4d", S4D)
register("s4", S4)
register("h3", H3)
register("griffin", Griffin)
register("mingru", MinGRU)
register("minlstm", MinLSTM)
register("rwkv4", RWKV4)
register("attention", Attention)


def names() -> list[str]:
    """The names that `build` knows."""
    return sorted(_REGISTRY)


def configure(name: str, config: dict[str, Any]) -> MixerConfig:
    """The validated configuration of the mixer `name`. Raises UserError naming an unknown mixer or key and the nearest known."""
    return get(name).config_class.of(config, f"mixer {name!r}")


def get(name: str) -> type[Mixer]:
    """The class of the mixer `name`. Raises UserError naming the nearest known one."""
    if name not in _REGISTRY:
        raise UserError(f"unknown mixer {name!r}{nearest(name, names())} (known: {', '.join(names())})")
    return _REGISTRY[name]


def polarizable(name: str) -> bool:
    """Whether the mixer `name` has transitions that polarization can pin."""
    return get(name).polarizable


def place(name: str, layer: int, n_layers: int) -> dict[str, int]:
    """The keys that tell a mixer of the family `name` where in a model it is; none where its authors do not care."""
    return {"layer": layer, "n_layers": n_layers} if issubclass(get(name).config_class, PlacedConfig) else {}


def build(name: str, d_model: int, *, polarization: Polarization | None = None, **config: Any) -> Mixer:
    """A freshly initialised mixer of width d_model. `config` holds the keys of its config class (others raise UserError)."""
    validated = configure(name, config)
    return _REGISTRY[name](d_model, validated, polarization)
