"""Counts on disk: one Parquet file per sweep, to which an interrupted sweep comes back.

A table of counts is tidy: one row per cell of the grid (CELL), image and class, with pixel counts (COUNTS). Text
columns are categories, since they repeat.

What a sweep measures is added in pieces, files of their own beside the table, which become part of it when the sweep
ends. A piece is there as a whole or not at all, and its rows are in the table or in the piece: whenever a sweep is
killed, what came in its last EVERY seconds is lost, and what was being measured. Sweeps that write to the same table at
once take turns, by a lock beside it; what a killed one has left goes with the next merge. Pages carry checksums, so
that a bit that flips on the way is no other count.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from time import monotonic
from types import TracebackType
from uuid import uuid4

import numpy as np
import pandas as pd
from filelock import FileLock
from pandas.api.types import union_categoricals

from sclip_lab.files import replacing

CELL = ["model", "dataset", "protocol", "labelling", "attention", "readout", "layers"]
COUNTS = ["intersection", "predicted", "true"]
HEAD = [*CELL, "image"]
TEXT = [*HEAD, "class"]
PIECE = "[!.]*.parquet"  # hidden ones are being written
EVERY = 20.0  # seconds between pieces
PATIENCE = 600.0  # seconds to wait for others, each of which writes for a moment

Head = tuple[str, ...]  # the values of HEAD
Record = tuple[Head, list[str], np.ndarray]  # class names, counts [classes 3]


class Store:
    """The table in a file, which grows by `add`, by a piece every so often and as a whole at the end of a `with` block.

    Its rows are kept in the order of their text, so that the file doesn't tell in how many sittings it was made.
    `path` None keeps the table in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._frames = _parts(path) if path else []
        heads = self.frame[HEAD].drop_duplicates().astype(str)
        self.heads: set[Head] = set(heads.itertuples(index=False, name=None))
        self._new: list[Record] = []
        self._written = monotonic()

    @property
    def frame(self) -> pd.DataFrame:
        """All that is known, but for what was added since the last `write`."""
        self._frames = [_joined(self._frames)]
        return self._frames[0]

    def add(self, records: list[Record]) -> None:
        """Take up records, in one go, so that what is known of an image is whole."""
        self._new += records
        self.heads.update(head for head, _, _ in records)
        if monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        """Put what is new on disk, as a piece. Raises OSError, in one line, where the disk does not take it."""
        if self._new:
            piece = tidy(self._new)
            if self.path:
                with _alone(self.path):
                    _save(piece, self.path)
            self._frames.append(piece)
            self._new = []
        self._written = monotonic()

    def merge(self) -> None:
        """Make the pieces part of the table, those of other sweeps too. Errors as of `write` and `read`."""
        if self.path and any((folder := _folder(self.path)).glob("*.parquet")):
            with _alone(self.path) as lock:
                _save(_joined(_parts(self.path)), self.path).replace(self.path)
                for left in list(folder.glob("*.parquet")):  # hidden ones, too: whoever began them was killed
                    left.unlink()
                with suppress(OSError):  # on Windows, a file in use stays
                    folder.rmdir()
                    lock.unlink()  # last, for the next to come makes one of its own

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError, ValueError) if error else nullcontext():  # which would hide what ended the sweep
            self.write()
            self.merge()


def _folder(path: Path) -> Path:
    """Where the pieces of a table are."""
    return path.with_suffix(".pieces")


def _parts(path: Path) -> list[pd.DataFrame]:
    """The table and its pieces, as far as they are there."""
    while True:
        pieces = sorted(_folder(path).glob(PIECE))  # first: they may become part of the table at any moment
        try:
            return [read(part) for part in ([path] if path.is_file() else []) + pieces]
        except FileNotFoundError:
            continue


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Wait until no other process writes to a table or its pieces. Yields the lock; OSErrors leave in one line."""
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, PATIENCE):
            yield lock
    except OSError as error:
        why = shorten(str(error), 160)
        advice = f"make room, or end what holds {lock.name}; the next run goes on where this one was"
        raise OSError(f"counts cannot be written to {path} ({why}): {advice}") from None


def _save(frame: pd.DataFrame, path: Path) -> Path:
    """Write a piece of a table."""
    piece = _folder(path) / f"{uuid4().hex}.parquet"
    with replacing(piece) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd", write_page_checksum=True)
    return piece


def read(path: Path) -> pd.DataFrame:
    """The table in a file. Raises ValueError, in one line, for a file that holds another."""
    try:
        with path.open("rb") as file:  # once, for another table may take the name at any moment
            frame = pd.read_parquet(file, page_checksum_verification=True)[TEXT + COUNTS]
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, for any part of a file may be damaged
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


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One table of many, in the order of its text; what two of them have measured is in it once."""
    frames = frames or [tidy([])]
    text = {name: union_categoricals([frame[name] for frame in frames], sort_categories=True) for name in TEXT}
    counts = {name: np.concatenate([frame[name] for frame in frames]) for name in COUNTS}
    return pd.DataFrame(text | counts).drop_duplicates(TEXT).sort_values(TEXT, ignore_index=True)
