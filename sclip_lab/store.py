"""Counts on disk: one Parquet file per sweep, to which an interrupted sweep comes back.

A table of counts is tidy: one row per cell of the grid (CELL), image and class, with pixel counts (COUNTS). Text
columns are categories, since they repeat.
"""

from pathlib import Path
from textwrap import shorten
from time import monotonic
from types import TracebackType

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from sclip_lab.files import replacing

CELL = ["model", "dataset", "protocol", "labelling", "attention", "readout", "layers"]
COUNTS = ["intersection", "predicted", "true"]
HEAD = [*CELL, "image"]
TEXT = [*HEAD, "class"]
EVERY = 20.0  # seconds of work that a kill may cost

Head = tuple[str, ...]  # the values of HEAD
Record = tuple[Head, list[str], np.ndarray]  # class names, counts [classes 3]


class Store:
    """The table in a file, which grows by `add` and is written every so often and at the end of a `with` block.

    Its rows are kept in the order of their text, so that the file doesn't tell in how many sittings it was made.
    `path` None keeps the table in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.frame = read(path) if path and path.is_file() else tidy([])
        heads = self.frame[HEAD].drop_duplicates().astype(str)
        self.heads: set[Head] = set(heads.itertuples(index=False, name=None))
        self._new: list[Record] = []
        self._written = monotonic()

    def add(self, records: list[Record]) -> None:
        """Take up records, in one go, so that what is known of an image is whole."""
        self._new += records
        self.heads.update(head for head, _, _ in records)
        if monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        if self._new:
            self.frame, self._new = _joined(self.frame, tidy(self._new)).sort_values(TEXT, ignore_index=True), []
            if self.path:
                with replacing(self.path) as temporary:
                    self.frame.to_parquet(temporary, index=False, compression="zstd")
        self._written = monotonic()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.write()


def read(path: Path) -> pd.DataFrame:
    """The table in a file. Raises ValueError, in one line, for a file that holds another."""
    try:
        frame = pd.read_parquet(path)[TEXT + COUNTS]
    except (OSError, KeyError, ValueError) as error:
        expected = f"expected the counts of a sweep ({', '.join(TEXT + COUNTS)}): move it away to measure anew"
        raise ValueError(f"{path} cannot be read ({shorten(str(error), 80)}), {expected}") from None
    return frame.astype(dict.fromkeys(TEXT, "category"))


def tidy(records: list[Record]) -> pd.DataFrame:
    """Records as a table, in their order."""
    repeated = np.repeat(np.arange(len(records)), [len(names) for _, names, _ in records])
    frame = pd.DataFrame([head for head, _, _ in records], columns=HEAD, dtype=str).iloc[repeated]
    names = [name for _, group, _ in records for name in group]
    counts = np.concatenate([np.empty((0, len(COUNTS)), dtype=np.int64), *(table for _, _, table in records)])
    frame = frame.reset_index(drop=True).assign(**{"class": pd.Series(names, dtype=str)})
    return frame.astype("category").assign(**dict(zip(COUNTS, counts.T, strict=True)))


def _joined(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    text = {name: union_categoricals([first[name], second[name]], sort_categories=True) for name in TEXT}
    return pd.DataFrame(text | {name: np.concatenate([first[name], second[name]]) for name in COUNTS})
