"""What follows from counts: mIoU per cell of the grid and paired differences, with bootstrap intervals over images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sclip_lab.metrics import bootstrap, miou
from sclip_lab.registry import Attention, canonical
from sclip_lab.store import CELL, COUNTS

Choice = str | Attention | Mapping[str, str | Attention]


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """mIoU per cell in percent, with its 95 % bootstrap interval over images: CELL, miou, low, high, images.

    Drop classes from the frame to ask for the mIoU of the others.
    """
    rows = []
    for cell, part in frame.groupby(CELL, sort=False, observed=True):
        table = stacked(part)
        rows.append((*cell, float(miou(table.sum(axis=0))), *bootstrap(table), len(table)))
    return _percent(pd.DataFrame(rows, columns=[*CELL, "miou", "low", "high", "images"]))


def compare(frame: pd.DataFrame, a: Choice, b: Choice) -> pd.DataFrame:
    """mIoU of `a` less that of `b`, in points, with the paired 95 % bootstrap interval over images.

    `a`, `b`: an attention, or values of several columns: {"attention": "csa", "readout": "full*2"}. One row per
    cell of the rest of the grid: its columns, a, b, difference, low, high, images. Raises ValueError, in one line,
    where one of them was not measured, or not on the same images.
    """
    first, second = (_chosen(frame, choice) for choice in (a, b))
    named = {column for choice in (a, b) for column in _columns(choice)}
    rest = [column for column in CELL if column not in named]
    others = {tuple(cell): part for cell, part in second.groupby(rest, sort=False, observed=True)}
    rows = []
    for cell, part in first.groupby(rest, sort=False, observed=True):
        if (other := others.get(tuple(cell))) is None:
            continue
        images = [list(p["image"].unique()) for p in (part, other)]
        if sorted(images[0]) != sorted(images[1]):
            raise ValueError(f"{a} has {len(images[0])} images, {b} {len(images[1])}: expected the same ones")
        ours, theirs = stacked(part), stacked(other)
        gain = float(miou(ours.sum(axis=0)) - miou(theirs.sum(axis=0)))
        rows.append((*cell, _label(a), _label(b), gain, *bootstrap(ours, theirs), len(ours)))
    return _percent(pd.DataFrame(rows, columns=[*rest, "a", "b", "difference", "low", "high", "images"]))


def _columns(choice: Choice) -> dict[str, Any]:
    return dict(choice) if isinstance(choice, Mapping) else {"attention": choice}


def _label(choice: Choice) -> str:
    return ", ".join(value if isinstance(value, str) else canonical(value) for value in _columns(choice).values())


def _chosen(frame: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    for column, value in _columns(choice).items():
        if column not in CELL:
            raise ValueError(f"no column {column!r} to compare by: expected some of {', '.join(CELL)}")
        measured = sorted(set(frame[column]))
        if column == "attention" and value not in measured:  # a stored name need not be registered today
            value = canonical(value)
        if value not in measured:
            raise ValueError(f"no rows of {column} {value!r}: measured were {measured}")
        frame = frame[frame[column] == value]
    return frame


def stacked(part: pd.DataFrame) -> np.ndarray:
    """Rows of one cell -> [images classes 3], images sorted by name."""
    part = part.sort_values(["image", "class"], kind="stable")
    return part[COUNTS].to_numpy().reshape(part["image"].nunique(), -1, len(COUNTS))


def _percent(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = [column for column in ("miou", "difference", "low", "high") if column in frame]
    return frame.assign(**{column: 100 * frame[column] for column in numbers})


def written(table: pd.DataFrame) -> pd.Series:
    """Each row's mIoU or difference with its interval, as text: "51.9 [50.2, 53.6]"."""
    value = "miou" if "miou" in table else "difference"
    return table.apply(lambda row: f"{row[value]:.1f} [{row['low']:.1f}, {row['high']:.1f}]", axis=1)
