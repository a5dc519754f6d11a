"""Figures 1, 5, 6 and 7 of the paper: what the lens shows of models at initialisation and trained, beside what the paper says."""

from ssmlens.experiments.figures import figure1, figure5, figure6, figure7

ITEMS = (figure1.ITEM, figure5.ITEM, figure6.ITEM, figure7.ITEM)
"""All four."""
