"""Systems that learn: what each, trained from several seeds, makes of held-out pictures, kept on disk; and its scores.

Training takes minutes, so counts of pixels are kept as those of a sweep are: a Parquet file, read first, replaced as a
whole after every training. A name stands for all that its system does: another recipe needs another name.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd
from torch import Tensor

from sclip_lab.datasets import Dataset
from sclip_lab.files import chosen, replacing, results
from sclip_lab.metrics import multiplicities
from sclip_lab.splits import MEASURES, Split, measure, score
from sclip_lab.store import COUNTS
from sclip_lab.text import parse

Labeller = Callable[[np.ndarray], Tensor]  # image [H W 3] -> labels [H W]
System = Callable[[int], Labeller]  # of a seed: it trains, or loads

KEY = ["model", "dataset", "split", "system", "seed"]
SAMPLES = 2000

Key = tuple[str, str, str, str, int]  # the values of KEY


def trials(
    systems: Mapping[str, System],
    dataset: Dataset,
    split: Split,
    seeds: Sequence[int] = (0, 1, 2),
    store: str | None = None,
) -> pd.DataFrame:
    """Counts of what systems, by name, make of a dataset: KEY, image, class, intersection, predicted, true.

    One training for each system and seed; of one that learns nothing ask for one seed. `store`: a file of that name in
    the folder of results is read first, only what is missing in it is trained and measured, and added at once. The
    model is `files.chosen()`.
    """
    path = results() / f"{store}.parquet" if store else None
    known, parts = _read(path), []
    for (name, system), seed in product(systems.items(), seeds):
        key = (chosen(), dataset.name, str(split), name, seed)
        if key not in known or not set(dataset.keys) <= set(known[key]["image"]):
            part = _tidy(key, dataset, measure(system(seed), dataset, split.classes))
            known = known | _read(path) | {key: part}  # another process may have added some
            _write(known, path)
        parts.append(known[key][known[key]["image"].isin(dataset.keys)])
    return pd.concat(parts, ignore_index=True)


def scores(frame: pd.DataFrame, split: Split, baseline: str | None = None) -> pd.DataFrame:
    """splits.MEASURES in percent of what `trials` returned: system, measure, value, low, high, each, images.

    `value` is the mean over seeds, `each` every seed's own. `low` to `high` is the 95 % bootstrap interval over
    pictures and seeds, drawn anew together: it covers other pictures of the kind, and other seeds as far as so few can
    tell (of three, it has two thirds of their variance). With `baseline`, one of the systems, it is the others' paired
    difference to it, in points: both see the same pictures and, where they have as many, the same seeds (else the mean
    over the one's seeds is set against that over the other's).
    """
    if (found := set(frame["split"])) != {str(split)}:
        raise ValueError(f"counts of {', '.join(sorted(found))}: expected those of {split}")
    images = {name: list(part["image"].unique()) for name, part in frame.groupby("system", sort=False)}
    first = next(iter(images))
    if differing := [name for name, keys in images.items() if keys != images[first]]:
        raise ValueError(f"{differing[0]!r} and {first!r} are not of the same images: expected one list of them")
    drawn = {name: _drawn(part, len(images[first]), split) for name, part in frame.groupby("system", sort=False)}
    if baseline and baseline not in drawn:
        raise ValueError(f"baseline={baseline!r}: expected one of {', '.join(drawn)}")
    rows = []
    for name, (own, mean) in drawn.items():
        if name == baseline:
            continue
        if baseline:
            other, centre = drawn[baseline]
            own, mean = own - (other if len(other) == len(own) else centre[:1]), mean - centre
        ends = np.nanquantile(mean[1:], [0.025, 0.975], axis=0)
        columns = zip(MEASURES, mean[0], *ends, own.T, strict=True)
        rows += [(name, *row, ", ".join(f"{value:.1f}" for value in each)) for *row, each in columns]
    table = pd.DataFrame(rows, columns=["system", "measure", "value", "low", "high", "each"])
    return table.assign(images=len(images[first]))


def written(table: pd.DataFrame) -> pd.DataFrame:
    """`scores` with a row per system: every measure as "59.0 [55.9, 62.1]", and the harmonic mean of each seed."""
    text = table.apply(lambda row: f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]", axis=1)
    wide = table.assign(text=text).pivot(index="system", columns="measure", values="text")
    rest = table[table["measure"] == "harmonic"].set_index("system")[["each", "images"]]
    return rest.join(wide[MEASURES])[[*MEASURES, "each", "images"]].rename(columns={"each": "harmonic of each seed"})


def _drawn(part: pd.DataFrame, images: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Scores in percent of a system: of every seed [seeds 4], and their mean [1 + SAMPLES 4], first as measured."""
    counts = part[COUNTS].to_numpy().reshape(-1, images, split.classes, len(COUNTS))
    times, seeds = multiplicities(images, SAMPLES, 0), multiplicities(len(counts), SAMPLES, 1)
    drawn = [score(np.stack([own.sum(axis=0), *np.tensordot(times, own, 1)]), split) for own in counts]
    shares = np.vstack([np.ones(len(counts)), seeds]) / len(counts)  # 1 + SAMPLES, seeds
    return 100 * np.stack(drawn)[:, 0], 100 * np.einsum("bs,sbm->bm", shares, drawn)


def _tidy(key: Key, dataset: Dataset, counts: np.ndarray) -> pd.DataFrame:
    """Counts [images classes 3] as rows."""
    rows = pd.MultiIndex.from_product([dataset.keys, parse(dataset.classes)], names=["image", "class"])
    frame = pd.DataFrame(counts.reshape(-1, len(COUNTS)), rows, COUNTS).reset_index()
    return frame.assign(**dict(zip(KEY, key, strict=True)))[[*KEY, "image", "class", *COUNTS]]


def _read(path: Path | None) -> dict[Key, pd.DataFrame]:
    """The trials in a file, if it is there. Raises ValueError, in one line, for a file that holds something else."""
    if not path or not path.is_file():
        return {}
    try:
        frame = pd.read_parquet(path)[[*KEY, "image", "class", *COUNTS]]
    except (OSError, KeyError, ValueError) as error:
        expected = "expected counts of trials: move it away to train anew"
        raise ValueError(f"{path} cannot be read ({shorten(str(error), 80)}), {expected}") from None
    return dict(iter(frame.groupby(KEY)))


def _write(known: dict[Key, pd.DataFrame], path: Path | None) -> None:
    if path:
        with replacing(path) as temporary:
            table = pd.concat([known[key] for key in sorted(known)])
            table.to_parquet(temporary, index=False, compression="zstd")
