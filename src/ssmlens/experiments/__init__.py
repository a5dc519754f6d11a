"""The paper's tables and figures, one file each; `ITEMS` by name."""

from ssmlens.experiments import retrofit, table2
from ssmlens.experiments.base import Item, Request, choose

__all__ = ["ITEMS", "Item", "Request", "choose"]

ITEMS: dict[str, Item] = {item.name: item for item in (table2.ITEM, retrofit.ITEM)}
