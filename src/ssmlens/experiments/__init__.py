"""The paper's tables and figures, one file each; `ITEMS` by name, `find` also by the other names that they answer to."""

from ssmlens.experiments import depth, figure2, figures, grid, pixels, retrofit, table2
from ssmlens.experiments.base import SCALES, Item, Request, choose

__all__ = ["ITEMS", "SCALES", "Item", "Request", "choose", "find"]

ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        pixels.ITEM,
        table2.ITEM,
        grid.ITEM,
        figure2.ITEM,
        depth.ITEM,
        *figures.ITEMS,
        retrofit.ITEM,
    )
}


def find(name: str) -> Item:
    """The item of this name or alias. Raises UserError, with the nearest name."""
    names = {known: item for item in ITEMS.values() for known in (item.name, *item.aliases)}
    choose("item", name, names)
    return names[name]
