"""S4D classifiers in the format of the example of state-spaces/s4 (`example.py`: sequential CIFAR-10 and MNIST).

    encoder → n_layers × LayerNorm(x + S4D(x)) → mean over positions → decoder        S4D(x) = GLU(W gelu(K * x + D x))

K_l = 2 Re Σ_n C_n (exp(Δ A_n) - 1)/A_n exp(l Δ A_n) is our `s4d` mixer's kernel, so the models are the same function. What the tensors do not
say is taken from the example's defaults: norms after the residual, and for three inputs and ten classes CIFAR-10's mean, and the deviation with which the trained files
reach their stored accuracy (docs/models.md).
Dropout is left out: it says nothing about a trained model.
"""

import re

import torch

from ssmlens.errors import UserError
from ssmlens.models.classifier import Classifier, ClassifierConfig
from ssmlens.models.pretrained.families import State, Unsupported, _linear, _taken

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_MARK = "s4_layers.0.kernel.log_A_real"


def is_s4d(state: State) -> bool:
    return _MARK in state and "encoder.weight" in state


@torch.no_grad()
def load_s4d(state: State) -> Classifier:
    """Of the weights, by their names there. Raises UserError, KeyError or Unsupported for any that are missing, surplus or misshapen."""
    layers = 1 + max(int(m[1]) for k in state if (m := re.match(r"s4_layers\.(\d{1,3})\.", k)))
    modes = state[_MARK].shape[1]
    (d_model, d_input), n_classes = state["encoder.weight"].shape, state["decoder.weight"].shape[0]
    coloured = (d_input, n_classes) == (len(CIFAR10_MEAN), 10)
    config = ClassifierConfig(
        d_input=d_input, n_classes=n_classes, d_model=d_model, n_layers=layers, mixer="s4d", mixer_config={"d_state": 2 * modes},
        norm="layer", norm_position="post", pooling="mean", mean=CIFAR10_MEAN if coloured else (), std=CIFAR10_STD if coloured else (),
    )  # fmt: skip
    names = _linear("encoder", "embedding.linear", True) | _linear("decoder", "head", True)
    ours: State = {}
    for i in range(layers):
        theirs, block = f"s4_layers.{i}", f"backbone.blocks.{i}"
        names |= _linear(f"norms.{i}", f"{block}.norm", True)
        names |= {
            f"{theirs}.D": f"{block}.mixer.D",
            f"{theirs}.output_linear.0.bias": f"{block}.mixer.output_linear.bias",
        }
        names |= {f"{theirs}.kernel.{k}": f"{block}.mixer.kernel.{k}" for k in ("C", "log_dt", "log_A_real", "A_imag")}
        ours[f"{block}.mixer.output_linear.weight"] = state.pop(f"{theirs}.output_linear.0.weight").squeeze(
            -1
        )  # a convolution over one position
    return assigned(config, ours | _taken(state, names), state)


def assigned(config: ClassifierConfig, ours: State, left: State) -> Classifier:
    """The classifier with these weights; `left`: those of the checkpoint that found no place."""
    if left:
        raise Unsupported(f"it has weights that ours does not: {', '.join(sorted(left)[:3])}")
    with torch.device("meta"):  # its weights come from the checkpoint, not from an initialiser
        model = Classifier(config)
    for name, p in model.state_dict().items():
        if name not in ours:
            raise UserError(f"the checkpoint lacks {name}")
        if ours[name].shape != p.shape:
            raise UserError(f"{name} has shape {tuple(ours[name].shape)}, its other weights say {tuple(p.shape)}")
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(True)
