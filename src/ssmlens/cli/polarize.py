"""`ssmlens polarize MODEL [MODEL ...] -o DIR`."""

from pathlib import Path
from typing import Any

from ssmlens.errors import UserError

LENGTH = 256  # of the random tokens on which old and new are compared


def run(models: list[str], out: Path, ones: int, zeros: int, seed: int, json: bool) -> None:
    if ones + zeros == 0:
        raise UserError("--ones and --zeros are both 0: there is nothing to add")

    from contextlib import ExitStack

    import torch

    from ssmlens import files, results
    from ssmlens.cli.output import finish
    from ssmlens.models.pretrained import load
    from ssmlens.models.pretrained import tokens as t
    from ssmlens.models.retrofit import new_entries, polarize
    from ssmlens.polarization import Polarization

    polarization = Polarization(ones=ones, zeros=zeros)
    names = t.names(models)
    places = {name: out if len(models) == 1 else out / name.replace("/", "--") for name in names}
    for place in places.values():
        if place.exists() and (
            not place.is_dir() or any(place.iterdir())
        ):  # it is written whole: what is there would go
            raise UserError(f"{place} is there already and not empty: choose another directory")
    rows: list[list[Any]] = []
    with ExitStack() as all_or_none:  # one that is refused leaves nothing of the others
        for name, path in zip(names, models, strict=True):
            model = load(path)
            try:
                new = polarize(model, polarization, seed=seed)
            except UserError as e:
                raise UserError(f"{path}: {e}") from None
            inputs = _random(new.config, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                before, after = model(inputs).logits, new(inputs).logits
            change = float((after - before).abs().max() / before.abs().max())
            if not change <= 1e-4:
                raise UserError(f"{path}: its logits would change by {change:.2g} (relative); nothing was written")
            _save(new, all_or_none.enter_context(files.replace_directory(places[name])), name, path)
            added = sum(int(mask.sum()) for mask in new_entries(new).values())
            states = [_state_size(m) for m in (model, new)]
            rows.append([name, str(new.config.mixer), sum(p.numel() for p in new.parameters()), added, *states, change])
    c = results.Column
    table = results.Table(
        id="polarized", title="Polarized models", rows=rows,
        columns=[c(name="model"), c(name="mixer"), c(name="parameters", meaning="of the polarized model"), c(name="of them new"),
                 c(name="state before", unit="numbers"), c(name="state after", unit="numbers"),
                 c(name="change of logits", meaning="largest, relative to the largest logit, on random tokens")],
        meaning="The new state channels are not read yet, so logits are the same but for rounding. Train them: ssmlens train CONFIG --from DIR "
        "--only-polarized, or all parameters without that option.",
        method=f"{ones} at one and {zeros} at zero appended to every mixer that can have them; {LENGTH} random tokens.",
    )  # fmt: skip
    record = results.Record(
        kind="polarize", title="Polarized: " + ", ".join(names),
        verdict=[f"{row[0]}: {row[3]:,} of {row[2]:,} parameters are new; the logits changed by {row[6]:.1g} of the largest." for row in rows],
        tables=[table], config={"ones": ones, "zeros": zeros, "seed": seed}, seeds=[seed], provenance=results.provenance(),
    )  # fmt: skip
    finish(record, out, json)


def _random(config: Any, generator: Any) -> Any:
    """Tokens, or, for a classifier, vectors in [0, 1]."""
    import torch

    if hasattr(config, "vocab_size"):
        return torch.randint(0, config.vocab_size, (1, LENGTH), generator=generator)
    return torch.rand(1, min(LENGTH, (config.positions or LENGTH + 1) - 1), config.d_input, generator=generator)


def _state_size(model: Any) -> int:
    return sum(block.mixer.state_size() for block in model.backbone.blocks if block.mixer.polarizable)


def _save(model: Any, directory: Path, name: str, path: str) -> None:
    """The model, and what belongs to it: the old one's tokenizer, what it was trained on."""
    import shutil

    from transformers.utils import logging

    from ssmlens.models.pretrained import packaged, tokens

    data = packaged().get(path, Path(path)) / "data.json"
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokens.keep(name, model, path, directory)
    if data.is_file():
        shutil.copyfile(data, directory / data.name)
