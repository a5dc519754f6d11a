"""`ssmlens list [mixers|experiments|checkpoints]`."""

from ssmlens.errors import UserError, nearest

KINDS = ("mixers", "experiments", "checkpoints")
WIDTH = 128  # of which the size of a mixer's state is shown


def run(what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if what and what not in KINDS:
        raise UserError(f"unknown list {what!r}{nearest(what, list(KINDS))} (known: {', '.join(KINDS)})")
    console = Console()
    for kind in KINDS if not what else (what,):
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        header, rows = _rows(kind)
        for i, name in enumerate(header):
            table.add_column(name, no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if kind == "mixers":
            console.print(f"state: numbers in the recurrence of one sequence, at d_model {WIDTH} and default settings")


def _rows(kind: str) -> tuple[list[str], list[list[str]]]:
    if kind == "mixers":
        from ssmlens import mixers

        header = ["name", "state", "transition", "polarization pins", "source"]
        return header, [[name, *_mixer(name)] for name in mixers.names()]
    if kind == "experiments":
        from ssmlens.experiments import ITEMS

        return ["name", "source", "scales", "variants", "what"], [
            [i.name, i.source, ", ".join(i.scales), _few(i.variants), i.title] for i in ITEMS.values()
        ]
    import json

    from ssmlens.models.pretrained import packaged

    rows = []
    for name, path in packaged().items():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        pinned = config.get("polarization")
        what = f"{pinned['ones']} at one, {pinned['zeros']} at zero" if pinned else "none"
        rows.append([name, config["mixer"], str(config["n_layers"]), str(config["d_model"]), what])
    return ["name", "mixer", "layers", "d_model", "polarization"], rows


def _few(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:4])}, ... ({len(names)})"


def _mixer(name: str) -> list[str]:
    """numbers of state of one sequence, transition, unit, source."""
    from ssmlens import mixers

    kind = mixers.get(name)
    try:
        size = f"{mixers.build(name, WIDTH).state_size():,}"
    except ValueError:  # no recurrence with a state of constant size
        size = "grows"
    return [size, kind.transition, kind.unit, f"{kind.title}: {kind.source}"]
