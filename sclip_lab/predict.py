"""What predicts mIoU: properties of attention maps, measured in the windows of an evaluation, beside what it found.

The paper holds that CLIP's last attention segments badly because it is spatially invariant (Wang, Mei, Yuille, ECCV
2024, arXiv:2312.01597). Over many attentions that is a rank correlation.

Letters: n windows or tokens, p patches of a window, h heads, s bootstrap samples, a attentions.
"""

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten
from time import monotonic

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sclip_lab import metrics
from sclip_lab.clip import Clip
from sclip_lab.datasets import BrokenImage, Dataset
from sclip_lab.files import replacing, results
from sclip_lab.metrics import IGNORE, miou, multiplicities
from sclip_lab.parallel import side_by_side
from sclip_lab.protocol import Protocol, window_labels
from sclip_lab.registry import Attention, attention, base, canonical
from sclip_lab.segment import trunk_of
from sclip_lab.store import CELL, EVERY
from sclip_lab.summary import stacked
from sclip_lab.trunk import Site

KEYS = ["model", "dataset", "protocol", "attention", "image"]
MEASURES = ["invariance", "distance", "entropy", "alignment", "others"]
SAMPLES, ENDS = 2000, (0.025, 0.975)
REST = [column for column in CELL if column != "attention"]

Head = tuple[str, ...]  # the values of KEYS
Table = dict[Head, tuple[float, ...]]  # to those of MEASURES


def measures(
    clip: Clip,
    dataset: Dataset,
    attentions: Iterable[str | Attention],
    protocol: Protocol | None = None,
    store: str | None = None,
) -> pd.DataFrame:
    """MEASURES of attentions in the last layer, per image the mean over its windows: a row per attention and image.

    Those of `metrics` on the mean map of the heads; `others` is `alignment` without the part that a patch gives itself:
    the share of its attention on OTHER patches of its class. `protocol` None: as in `sweep`. `store`: a file of that
    name in the folder of results is read first, only what is missing in it is measured, and what is measured is added,
    every so often (store.EVERY) and at the end, whatever ends it. A picture whose files cannot be used is left out,
    with a warning that names it.
    """
    protocol = protocol or dataset.protocol or Protocol.for_image_size(clip.image_size)
    named = {canonical(attend): attention(attend) for attend in attentions}
    place = (clip.name, dataset.name, str(protocol))
    wanted: list[Head] = [(*place, name, key) for name in named for key in dataset.keys]
    path = results() / f"{store}.parquet" if store else None
    table: Table = _read(path) if path and path.is_file() else {}
    missing: dict[str, dict[Head, Attention]] = {}
    for *_, name, key in wanted:
        if (head := (*place, name, key)) not in table:
            missing.setdefault(key, {})[head] = named[name]
    about, written = f"attention maps of {dataset.pictures} {protocol}", monotonic()
    try:
        for rows in side_by_side(partial(_measure_all, clip, dataset, protocol, missing), missing, about):
            table |= rows
            if path and monotonic() - written > EVERY:
                _write(table, path)
                written = monotonic()
    finally:
        if path and missing:
            _write(table, path)
    return _frame({head: table[head] for head in wanted if head in table})


def rank_correlation(frame: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho between the mIoU of attentions and each measure of their maps, a point per attention.

    `frame`: counts of a sweep; `measured`: see `measures`. One row per read-out (or other cell of the grid's rest) and
    measure: REST, measure, rho, low, high, least, most, points, images. `low` to `high` is the 95 % bootstrap interval
    over images: mIoU and measures see the same resampled ones, while the attentions stay. `least` to `most` is the
    range of rho when all attentions of one variant (`registry.base`) are left out. Raises ValueError, in one line,
    where frame and measures are not of the same images.
    """
    rows = []
    for cell, part in frame.groupby(REST, sort=False, observed=True):
        mious, means, images = _drawn(part, measured)
        for measure, mean in means.items():
            rho, *drawn = _spearman(mious, mean)
            left_out = [_spearman(mious[:1][names], mean[:1][names])[0] for names in _without_a_variant(mious)]
            spread = (*np.quantile(drawn, ENDS), min(left_out), max(left_out))
            rows.append((*cell, measure, rho, *spread, mious.shape[1], images))
    columns = [*REST, "measure", "rho", "low", "high", "least", "most", "points", "images"]
    return pd.DataFrame(rows, columns=columns)


def compare_measures(frame: pd.DataFrame, measured: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """How much better measure `a` predicts mIoU than `b`, |rho_a| - |rho_b|, with its paired 95 % bootstrap interval.

    As `rank_correlation`: REST, a, b, difference, low, high, points, images.
    """
    rows = []
    for cell, part in frame.groupby(REST, sort=False, observed=True):
        mious, means, images = _drawn(part, measured)
        first, second = (np.abs(_spearman(mious, means[measure])) for measure in (a, b))
        difference, *drawn = first - second
        rows.append((*cell, a, b, difference, *np.quantile(drawn, ENDS), mious.shape[1], images))
    return pd.DataFrame(rows, columns=[*REST, "a", "b", "difference", "low", "high", "points", "images"])


@torch.no_grad()
def _measure_all(
    clip: Clip, dataset: Dataset, protocol: Protocol, missing: dict[str, dict[Head, Attention]], key: str
) -> Table:
    """MEASURES of all attentions that lack those of the picture `key`."""
    try:
        image, truth = dataset.read(key)
    except BrokenImage as error:
        warnings.warn(f"picture left out: {error}", stacklevel=2)
        return {}
    trunk = trunk_of(clip.visual, image, protocol, clip.mean, clip.std, clip.step)
    labels = window_labels(truth, protocol, trunk.grid).flatten(1)
    return {head: _measure(attend, trunk.site(), labels) for head, attend in missing[key].items()}


def _measure(attend: Attention, site: Site, labels: Tensor) -> tuple[float, ...]:
    """MEASURES of one attention at a site of the windows [n] of a picture, whose patches have `labels` [n p]."""
    weights = attend(site).expand(*site.v.shape[:3], -1).mean(1)  # [n tokens tokens], heads averaged
    prefix = site.prefix
    alignment = metrics.alignment(weights, labels, IGNORE, prefix)
    # Were every patch of a class of its own, its share on its class would be what it gives itself.
    alone = torch.where(labels == IGNORE, -1, torch.arange(labels.shape[-1]).to(labels))
    each = (
        metrics.invariance(weights, prefix),
        metrics.distance(weights, site.grid, prefix),
        metrics.entropy(weights, prefix),
        alignment,
        alignment - metrics.alignment(weights, alone, -1, prefix),
    )
    return tuple(float(values.nanmean()) for values in each)


def _drawn(part: pd.DataFrame, measured: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], int]:
    """mIoU [1+s a] and, of each measure, the mean over images [1+s a]: first of the images, then of resampled ones.

    And the number of images.
    """
    counts = {name: stacked(rows) for name, rows in part.groupby("attention", sort=False, observed=True)}
    images = list(part["image"].sort_values().unique())  # in the order of their counts
    tables = {measure: measured.pivot(index="image", columns="attention", values=measure) for measure in MEASURES}
    values = {measure: table.reindex(images, columns=list(counts)) for measure, table in tables.items()}
    if len(set(map(len, counts.values()))) > 1 or values[MEASURES[0]].isna().any(axis=None):
        raise ValueError(f"mIoU of {len(counts)} attentions on {len(images)} images: expected measures of all of them")
    times = np.concatenate([np.ones((1, len(images))), multiplicities(len(images), SAMPLES, seed=0)])
    mious = {name: miou(np.tensordot(times, table, axes=1)) for name, table in counts.items()}
    means = {measure: pd.DataFrame(times @ table / len(images)) for measure, table in values.items()}
    return pd.DataFrame(mious), means, len(images)


def _spearman(a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    """Spearman's rank correlation of each row of two tables, ties sharing their mean rank (Spearman 1904)."""
    return a.rank(axis=1).corrwith(b.rank(axis=1), axis=1).to_numpy()


def _without_a_variant(table: pd.DataFrame) -> list[list[str]]:
    """The columns of a table less those of one variant, for each variant."""
    variants = {name: base(name) for name in table}
    return [[name for name in table if variants[name] != out] for out in dict.fromkeys(variants.values())]


def _read(path: Path) -> Table:
    """KEYS -> MEASURES of a file. Raises ValueError, in one line, for a file that holds something else."""
    try:
        frame = pd.read_parquet(path)[KEYS + MEASURES]
    except (OSError, KeyError, ValueError) as error:
        expected = "expected measures of attention maps: move it away to measure anew"
        raise ValueError(f"{path} cannot be read ({shorten(str(error), 80)}), {expected}") from None
    heads, values = (frame[columns].itertuples(index=False, name=None) for columns in (KEYS, MEASURES))
    return dict(zip(heads, values, strict=True))


def _write(table: Table, path: Path) -> None:
    with replacing(path) as temporary:
        _frame(dict(sorted(table.items()))).to_parquet(temporary, index=False, compression="zstd")


def _frame(table: Table) -> pd.DataFrame:
    return pd.DataFrame([(*head, *values) for head, values in table.items()], columns=KEYS + MEASURES)
