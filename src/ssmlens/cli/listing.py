"""`ssmlens list [mixers|experiments|checkpoints]`."""

from ssmlens.errors import UserError, nearest

KINDS = ("mixers", "experiments", "checkpoints")


def run(what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if what and what not in KINDS:
        raise UserError(f"unknown list {what!r}{nearest(what, list(KINDS))} (known: {', '.join(KINDS)})")
    console = Console()
    for kind in KINDS if not what else (what,):
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        header, rows = _rows(kind)
        for name in header:
            table.add_column(name)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _rows(kind: str) -> tuple[list[str], list[list[str]]]:
    if kind == "mixers":
        import sys

        from ssmlens import mixers

        rows = []
        for name in mixers.names():
            doc = sys.modules[mixers.configure(name, {}).__class__.__module__].__doc__ or ""
            rows.append([name, doc.strip().splitlines()[0]])
        return ["name", "what"], rows
    if kind == "experiments":
        from ssmlens.experiments import ITEMS

        return ["name", "source", "scales", "variants", "what"], [
            [i.name, i.source, ", ".join(i.scales), ", ".join(i.variants), i.title] for i in ITEMS.values()
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
