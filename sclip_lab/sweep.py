"""Grids of experiments: counts per image and class, and what follows from them.

A sweep runs the tower once per image and protocol, and shares it among all attentions, read-outs, layers and
vocabularies. Its rows are pixel counts, not IoUs: they add up over images and shards, and every mean and interval is
derived from them later.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from sclip_lab.clip import Clip, load
from sclip_lab.datasets import Dataset, load_dataset
from sclip_lab.metrics import bootstrap, counts, miou
from sclip_lab.protocol import Protocol, Stitched
from sclip_lab.registry import Attention, canonical
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import Queries, queries
from sclip_lab.trunk import Readout

CELL = ["model", "dataset", "protocol", "labelling", "attention", "readout", "layers"]
COUNTS = ["intersection", "predicted", "true"]

Record = tuple[tuple[str, ...], list[str], np.ndarray]  # CELL and image, class names, counts [classes 3]


@torch.no_grad()
def sweep(
    model: str | Clip,
    datasets: str | Dataset | Iterable[str | Dataset],
    attentions: str | Attention | Iterable[str | Attention],
    protocols: Protocol | Iterable[Protocol] | None = None,
    readouts: str | Readout | Iterable[str | Readout] = "full",
    layers: Iterable[tuple[int, ...]] = ((-1,),),
    limit: int | None = None,
) -> pd.DataFrame:
    """Every combination of the arguments on every image: one row per cell, image and class, with pixel counts.

    Columns: CELL, image, class, COUNTS. A single value serves as a list of one. `protocols` None: windows of the size
    the model was trained on. `limit`: pictures per dataset. An attention without a spec is called by its `__name__`.
    """
    clip = model if isinstance(model, Clip) else load(model)
    sets = [d if isinstance(d, Dataset) else load_dataset(d, limit=limit) for d in _listed(datasets)]
    protocols = _listed(protocols or Protocol.for_image_size(clip.image_size))
    variants = list(product(_listed(attentions), map(Readout.parse, _listed(readouts)), layers))
    words = {dataset.name: queries(clip, dataset.classes) for dataset in sets}
    by_pictures = [list(group) for _, group in groupby(sorted(sets, key=_pictures), key=_pictures)]
    records = [
        record
        for protocol, group in product(protocols, by_pictures)
        for key in tqdm(group[0].keys, desc=f"{_pictures(group[0])} {protocol}", unit="image", file=sys.stdout)
        for record in _measure(clip, protocol, group, variants, key, words)
    ]
    return _tidy(records)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """mIoU per cell in percent, with its 95 % bootstrap interval over images: CELL, miou, low, high, images.

    Drop classes from the frame to ask for the mIoU of the others.
    """
    rows = []
    for cell, part in frame.groupby(CELL, sort=False, observed=True):
        table = _counts(part)
        rows.append((*cell, float(miou(table.sum(axis=0))), *bootstrap(table), len(table)))
    return _percent(pd.DataFrame(rows, columns=[*CELL, "miou", "low", "high", "images"]))


def compare(frame: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """mIoU of attention `a` less that of `b`, in points, with the paired 95 % bootstrap interval over images.

    One row per cell of the rest of the grid: CELL without attention, a, b, difference, low, high, images.
    Raises ValueError where one of them was not measured.
    """
    a, b = canonical(a), canonical(b)
    if missing := {a, b} - set(frame["attention"]):
        raise ValueError(f"no rows of {sorted(missing)}: measured were {sorted(set(frame['attention']))}")
    rest = [column for column in CELL if column != "attention"]
    rows = []
    for cell, part in frame.groupby(rest, sort=False, observed=True):
        first, second = (_counts(part[part["attention"] == name]) for name in (a, b))
        gain = float(miou(first.sum(axis=0)) - miou(second.sum(axis=0)))
        rows.append((*cell, a, b, gain, *bootstrap(first, second), len(first)))
    return _percent(pd.DataFrame(rows, columns=[*rest, "a", "b", "difference", "low", "high", "images"]))


def _measure(
    clip: Clip, protocol: Protocol, group: list[Dataset], variants: list[tuple], key: str, words: dict[str, Queries]
) -> Iterator[Record]:
    """One record per variant and dataset of a group over the same pictures, for one of them."""
    image, _ = group[0].read(key)
    truths = [dataset.read(key)[1] for dataset in group]
    trunk = trunk_of(clip.visual, image, protocol, clip.mean, clip.std)
    asked = [words[dataset.name] for dataset in group]
    vectors = torch.cat([own.vectors for own in asked])
    for attention, readout, layers in variants:
        cosines = scores(trunk, vectors, attention, readout, layers).split([len(own.vectors) for own in asked], dim=1)
        for dataset, truth, own, part in zip(group, truths, asked, cosines, strict=True):
            labels = dataset.labelling(Stitched(part, protocol, image.shape[:2]), own.query_class)
            cell = (clip.name, dataset.name, protocol, dataset.labelling, canonical(attention), readout)
            head = (*map(str, cell), ",".join(map(str, layers)), key)
            yield head, own.names, counts(labels, truth, len(own.names))


def _tidy(records: list[Record]) -> pd.DataFrame:
    heads, names, tables = zip(*records, strict=True)
    repeated = np.repeat(np.arange(len(heads)), [len(table) for table in tables])
    frame = pd.DataFrame(heads, columns=[*CELL, "image"]).iloc[repeated].reset_index(drop=True)
    columns = dict(zip(COUNTS, np.concatenate(tables).T, strict=True))
    return frame.assign(**{"class": [name for group in names for name in group]}, **columns)


def _counts(part: pd.DataFrame) -> np.ndarray:
    """Rows of one cell -> [images classes 3], images sorted by name."""
    part = part.sort_values(["image", "class"], kind="stable")
    return part[COUNTS].to_numpy().reshape(part["image"].nunique(), -1, len(COUNTS))


def _percent(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = [column for column in ("miou", "difference", "low", "high") if column in frame]
    return frame.assign(**{column: 100 * frame[column] for column in numbers})


def _pictures(dataset: Dataset) -> str:
    return dataset.pictures


def _listed(values: Any) -> Sequence:
    """A single value as a list of one."""
    return [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
