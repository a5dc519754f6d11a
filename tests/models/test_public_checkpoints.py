"""S4D classifiers of state-spaces/s4's example and CryptoMamba: ours against plain PyTorch written down here, and what is broken by name.

The trained files themselves are read where they are ($SSMLENS_DATA, or ../shared/data beside the repository).
"""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ssmlens
from ssmlens.errors import UserError
from ssmlens.models.pretrained.cryptomamba import FEATURES

DATA = Path(os.environ.get("SSMLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
S4D_FILES = ("chordchen30_ep43_acc86.18.pth", "dallingordon_ep14_acc79.06.pth")


def there(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA} (set SSMLENS_DATA)")
    return DATA / name


def s4d_state(d_input=3, n_classes=10, d_model=8, layers=3, modes=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    state = {
        "encoder.weight": normal(d_model, d_input), "encoder.bias": normal(d_model), "decoder.weight": normal(n_classes, d_model), "decoder.bias": normal(n_classes),
    }  # fmt: skip
    for i in range(layers):
        layer = f"s4_layers.{i}"
        state |= {
            f"{layer}.D": normal(d_model), f"{layer}.kernel.C": normal(d_model, modes, 2),
            f"{layer}.kernel.log_dt": torch.rand(d_model, generator=g) * 4.6 - 6.9,
            f"{layer}.kernel.log_A_real": math.log(0.5) + 0.3 * normal(d_model, modes),
            f"{layer}.kernel.A_imag": math.pi * torch.arange(modes).expand(d_model, modes) + normal(d_model, modes),
            f"{layer}.output_linear.0.weight": normal(2 * d_model, d_model, 1) / 2, f"{layer}.output_linear.0.bias": normal(2 * d_model),
            f"norms.{i}.weight": 1 + 0.1 * normal(d_model), f"norms.{i}.bias": 0.1 * normal(d_model),
        }  # fmt: skip
    return state


def s4d_forward(state, x):
    """(batch, length, d_input) → logits, in float64 by an FFT convolution with the kernel written out."""
    s = {k: v.double() for k, v in state.items()}
    x = F.linear(x.double(), s["encoder.weight"], s["encoder.bias"]).transpose(1, 2)
    length, layers = x.shape[-1], sum(k.endswith(".D") for k in s)
    for i in range(layers):
        k = {name.rpartition(".")[2]: s[name] for name in s if name.startswith(f"s4_layers.{i}.kernel")}
        A = torch.complex(-k["log_A_real"].exp(), k["A_imag"])
        dtA = A * k["log_dt"].exp()[:, None]
        C = torch.view_as_complex(k["C"]) * (torch.exp(dtA) - 1) / A
        kernel = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(dtA[..., None] * torch.arange(length))).real
        size = 2 * length
        y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size), n=size)[..., :length]
        y = F.gelu(y + s[f"s4_layers.{i}.D"][:, None] * x)
        y = F.conv1d(y, s[f"s4_layers.{i}.output_linear.0.weight"], s[f"s4_layers.{i}.output_linear.0.bias"])
        y = F.glu(y, 1) + x
        x = F.layer_norm(y.transpose(1, 2), y.shape[1:2], s[f"norms.{i}.weight"], s[f"norms.{i}.bias"]).transpose(1, 2)
    return F.linear(x.mean(2), s["decoder.weight"], s["decoder.bias"])


def saved(path, state, **more):
    torch.save({"model": state, "acc": 12.5, "epoch": 3, **more}, path)
    return path


def close(got, wanted, tolerance=1e-4):
    assert float((got.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize(("d_input", "n_classes"), [(3, 10), (1, 10), (3, 4)])
def test_s4d_is_the_same_function(tmp_path, length, d_input, n_classes):
    state = s4d_state(d_input, n_classes)
    model = ssmlens.load(saved(tmp_path / "c.pth", state))
    x = torch.rand(2, length, d_input, generator=torch.Generator().manual_seed(1))
    seen = x
    if (d_input, n_classes) == (3, 10):  # CIFAR-10: what the example does to its pixels is part of the model
        seen = (x - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2023, 0.1994, 0.2010])
    with torch.no_grad():
        close(model(x).logits, s4d_forward(state, seen))
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(ssmlens.load(tmp_path / "ours")(x).logits, model(x).logits)


def test_s4d_trained_on_several_devices(tmp_path):
    state = s4d_state()
    model = ssmlens.load(saved(tmp_path / "c.pth", {f"module.{k}": v for k, v in state.items()}))
    assert torch.equal(model.head.weight, state["decoder.weight"])
    assert model.config.pooling == "mean"
    assert model.config.norm_position == "post"


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def without(key):
    return lambda s: {k: v for k, v in s.items() if k != key}


BROKEN = {
    "code": (lambda s: {**s, "norms.0.bias": Code()}, "damaged, or holds more than tensors"),
    "partial": (without("s4_layers.1.kernel.C"), "lacks s4_layers.1.kernel.C"),
    "a layer is missing": (lambda s: {k: v for k, v in s.items() if "layers.1" not in k}, "lacks s4_layers.1"),
    "no decoder": (without("decoder.weight"), "lacks decoder.weight"),
    "NaN": (lambda s: {**s, "norms.2.bias": torch.full((8,), math.nan)}, "norm.bias contains NaN"),
    "mixed": (lambda s: {**s, "s4_layers.2.D": torch.ones(9)}, "mixer.D has shape"),
    "mixed sizes": (lambda s: {**s, "s4_layers.0.kernel.C": torch.ones(8, 5, 2)}, "kernel.C has shape"),
    "surplus": (lambda s: {**s, "extra.weight": torch.ones(2)}, "extra.weight"),
    "whole numbers": (lambda s: {**s, "decoder.bias": torch.ones(10, dtype=torch.int64)}, "decoder.bias has dtype"),
    "no tensor": (lambda s: {**s, "decoder.bias": 3}, "other things than named tensors"),
    "nothing known": (lambda s: {"a.weight": torch.ones(2)}, "neither that of state-spaces/s4's example nor CryptoMamba's"),
    "empty": (lambda s: {}, "neither"),
    "absurd layers": (lambda s: {**s, "s4_layers.999.D": torch.ones(8)}, "lacks"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_s4d_files_are_refused_by_name(tmp_path, what, capsys):
    harm, message = BROKEN[what]
    path = saved(tmp_path / "c.pth", harm(s4d_state()))
    with pytest.raises(UserError) as e:
        ssmlens.load(path)
    assert message in str(e.value)
    assert "c.pth" in str(e.value)
    assert "never" not in capsys.readouterr().out


def test_a_cut_file_is_refused(tmp_path):
    path = saved(tmp_path / "c.pth", s4d_state())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cannot load .*c.pth"):
        ssmlens.load(path)


# ------------------------------------------------------------------------------------------------ CryptoMamba


def crypto_state(features=5, widths=(6, 8), depth=2, modes=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    state = {"model.post_process.1.weight": normal(1, features), "model.post_process.1.bias": normal(1)}
    for i, width in enumerate(widths):
        inner, rank = 2 * width, math.ceil(width / 16)
        for j in range(depth):
            block = f"model.blocks.{i}.{j}"
            state |= {
                f"{block}.norm.weight": 1 + 0.1 * normal(width), f"{block}.norm.bias": 0.1 * normal(width),
                f"{block}.op.A_log": 0.3 * normal(inner, modes), f"{block}.op.D": normal(inner), f"{block}.op.in_proj.weight": normal(2 * inner, width) / 2,
                f"{block}.op.conv1d.weight": normal(inner, 1, 4), f"{block}.op.conv1d.bias": normal(inner),
                f"{block}.op.x_proj.weight": normal(rank + 2 * modes, inner) / 2, f"{block}.op.dt_proj.weight": normal(inner, rank),
                f"{block}.op.dt_proj.bias": normal(inner), f"{block}.op.out_proj.weight": normal(width, inner) / 2,
            }  # fmt: skip
        out = (*widths, 1)[i + 1]
        state |= {f"model.blocks.{i}.{depth}.weight": normal(out, width), f"model.blocks.{i}.{depth}.bias": normal(out)}
    return state


def crypto_forward(state, x, depth=2):
    """(batch, features, days) → (batch,), in float64, step by step over the features."""
    s = {k.removeprefix("model."): v.double() for k, v in state.items()}
    x = x.double()
    stages = 1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks"))
    for i in range(stages):
        for j in range(depth):
            p = {k.removeprefix(f"blocks.{i}.{j}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.{j}.")}
            h, gate = F.linear(
                F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"]), p["op.in_proj.weight"]
            ).chunk(2, -1)
            h = F.conv1d(h.transpose(1, 2), p["op.conv1d.weight"], p["op.conv1d.bias"], padding=3, groups=h.shape[-1])
            h = F.silu(h[..., : x.shape[1]]).transpose(1, 2)
            rank, modes = p["op.dt_proj.weight"].shape[1], p["op.A_log"].shape[1]
            dt, B, C = F.linear(h, p["op.x_proj.weight"]).split([rank, modes, modes], -1)
            dt = F.softplus(F.linear(dt, p["op.dt_proj.weight"], p["op.dt_proj.bias"]))
            A, state_, ys = -p["op.A_log"].exp(), torch.zeros(len(x), *p["op.A_log"].shape, dtype=torch.double), []
            for t in range(x.shape[1]):
                state_ = torch.exp(dt[:, t, :, None] * A) * state_ + (dt[:, t] * h[:, t])[..., None] * B[:, t, None]
                ys.append((state_ * C[:, t, None]).sum(-1) + p["op.D"] * h[:, t])
            x = x + F.linear(torch.stack(ys, 1) * F.silu(gate), p["op.out_proj.weight"])
        x = F.linear(x, s[f"blocks.{i}.{depth}.weight"], s[f"blocks.{i}.{depth}.bias"])
    return F.linear(x[..., 0], s["post_process.1.weight"], s["post_process.1.bias"])[:, 0]


def lightning(path, state):
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}], "lr_schedulers": []}, path)
    return path


@pytest.mark.parametrize(("features", "widths", "depth"), [(5, (6, 8), 2), (6, (14, 16, 32), 1), (3, (4,), 3)])
def test_cryptomamba_is_the_same_function(tmp_path, features, widths, depth):
    state = crypto_state(features, widths, depth)
    model = ssmlens.load(lightning(tmp_path / "c.ckpt", state))
    x = torch.randn(3, features, widths[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(x), crypto_forward(state, x, depth))
    with pytest.raises(ValueError, match="must have shape"):
        model(x[:, :-1])


CRYPTO_BROKEN = {
    "partial": (without("model.blocks.1.0.op.D"), "lacks model.blocks.1.0.op.D"),
    "a block is missing": (
        lambda s: {k: v for k, v in s.items() if "blocks.0.1" not in k},
        "different numbers of blocks",
    ),
    "mixed": (lambda s: {**s, "model.blocks.0.1.op.D": torch.ones(3)}, "mixer.D has shape"),
    "NaN": (lambda s: {**s, "model.blocks.0.1.op.D": torch.full((12,), math.inf)}, "contains NaN or infinity"),
    "surplus": (lambda s: {**s, "model.head.weight": torch.ones(3)}, "model.head.weight"),
    "code": (lambda s: {**s, "model.post_process.1.bias": Code()}, "more than tensors"),
}


@pytest.mark.parametrize("what", CRYPTO_BROKEN)
def test_broken_cryptomamba_files_are_refused_by_name(tmp_path, what):
    harm, message = CRYPTO_BROKEN[what]
    with pytest.raises(UserError) as e:
        ssmlens.load(lightning(tmp_path / "c.ckpt", harm(crypto_state())))
    assert message in str(e.value)
    assert "c.ckpt" in str(e.value)


# ------------------------------------------------------------------------------------------ the trained files


@pytest.mark.parametrize("name", S4D_FILES)
def test_the_trained_s4d_is_what_plain_pytorch_makes_of_it_and_sees_what_images_show(name):
    from ssmlens.tasks import images

    path = there(f"checkpoints/s4d_cifar10/{name}")
    model = ssmlens.load(path)
    test = images.read(there("cifar10_10k_lossless.tar.zst")).test
    rows = images.balanced_order(test.labels)[:40]
    x = images.to_unit(test.pixels[rows])
    with torch.no_grad():
        logits = model(x).logits
    state = torch.load(path, weights_only=True, map_location="cpu")["model"]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    close(logits[:3], s4d_forward(state, (x[:3] - mean) / std))
    assert (
        logits.argmax(-1).numpy() == test.labels[rows]
    ).mean() > 0.65  # 79 and 86 % of all; 40 images leave 8 points of chance


def test_the_trained_cryptomamba_forecasts_and_its_mamba_is_dead():
    """A forecast, hardly better or worse than "tomorrow as today": weight decay has shrunk every Mamba weight to nothing, and what is left is a
    linear map of the last fortnight."""
    model = ssmlens.load(there("checkpoints/cryptomamba/cmamba_v.ckpt"))
    with open(there("checkpoints/cryptomamba/test.csv")) as file:
        rows = list(csv.DictReader(file))
    days = np.array([[float(row[name]) / (1e9 if name == "Volume" else 1) for name in FEATURES] for row in rows]).T
    x = np.stack([days[:, i : i + 14] for i in range(days.shape[1] - 14)])
    close_ = days[FEATURES.index("Close")]
    y, naive = close_[14:], close_[13:-1]
    with torch.no_grad():
        told = model(torch.from_numpy(x).float()).double().numpy()

    def rmse(p):
        return math.sqrt(np.square(p - y).mean())

    assert 1590 < rmse(told) < 1605
    assert 0.0203 < (np.abs(told - y) / y).mean() < 0.0205
    assert 1560 < rmse(naive) < 1575
    mamba = [p.abs().max() for name, p in model.named_parameters() if ".block." in name]
    assert max(mamba) < 1e-38
