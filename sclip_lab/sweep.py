"""Grids of experiments: pixel counts per image and class.

A sweep runs the tower once per image and protocol, and shares it among all attentions, read-outs, layers and
vocabularies. Its rows are counts, not IoUs: they add up over images and sittings, and every mean and interval is
derived from them later (`summary`).
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from sclip_lab.clip import Clip, load
from sclip_lab.datasets import BrokenImage, Dataset, load_dataset
from sclip_lab.files import results
from sclip_lab.metrics import counts
from sclip_lab.protocol import Protocol, Stitched, stitch
from sclip_lab.refine import Refiner
from sclip_lab.registry import Attention, attention, canonical
from sclip_lab.segment import cosines, trunk_of
from sclip_lab.store import HEAD, TEXT, Head, Record, Store
from sclip_lab.text import Queries, queries
from sclip_lab.trunk import Readout, readings

Layers = tuple[int, ...]
Variant = tuple[Attention, Readout, Layers, Refiner | None]
Asked = tuple[Dataset, Queries]
Missing = dict[str, list[tuple[Variant, list[Asked]]]]  # of each picture
Result = TypeVar("Result")


def sweep(
    model: str | Clip,
    datasets: str | Dataset | Iterable[str | Dataset],
    attentions: str | Attention | Iterable[str | Attention],
    protocols: Protocol | Iterable[Protocol] | None = None,
    readouts: str | Readout | Iterable[str | Readout] = "full",
    layers: int | Iterable[Layers] = ((-1,),),
    limit: int | None = None,
    store: str | None = None,
    strict: bool = False,
    refiners: Refiner | Iterable[Refiner | None] | None = None,
) -> pd.DataFrame:
    """Every combination of the arguments on every image: one row per cell, image and class, with pixel counts.

    Columns: store.TEXT, store.COUNTS. A single value serves as a list of one. `protocols` None: the paper's for each
    benchmark, windows of the size that the model was trained on for other datasets. `layers`: those replaced
    together in a tuple, such as ((-1,), (-2, -1)). `limit`: pictures per dataset.
    `store`: a file of that name in the folder of results is read first, only what is missing in it is measured, and
    what is measured is added; without it, all is measured. An attention without a spec is known by its `__name__`, in
    the file too: choose another when you change it. Pictures are measured side by side (see `side_by_side`), so that an
    attention must keep nothing between its calls.

    `refiners`: what refines the logits, such as `refine.Pamr()`; None: nothing. It is named in the column `labelling`.
    A picture whose files cannot be used is left out of all cells, with a warning that names it; where `strict`, it ends
    the sweep with `BrokenImage`.
    """
    clip = model if isinstance(model, Clip) else load(model)
    sets = [d if isinstance(d, Dataset) else load_dataset(d, limit=limit) for d in _listed(datasets)]
    asked = [(dataset, queries(clip, dataset.classes)) for dataset in sets]
    reads = map(Readout.parse, _listed(readouts))
    variants = list(product(_named(attentions), reads, _places(layers), _listed(refiners)))
    wanted: dict[Head, None] = {}  # in order
    broken: list[BrokenImage] = []
    with Store(results() / f"{store}.parquet" if store else None) as table:
        for protocol, group in _sharing(asked, _listed(protocols) if protocols else [], clip):
            missing: Missing = {}
            for key, each in product(group[0][0].keys, variants):
                heads = {_head(clip, one, protocol, each, key): one for one in group}
                if lacking := [one for head, one in heads.items() if head not in table.heads and head not in wanted]:
                    missing.setdefault(key, []).append((each, lacking))
                wanted |= dict.fromkeys(heads)
            measure = partial(_measure, clip, protocol, missing, strict)
            found = side_by_side(measure, missing, f"{group[0][0].pictures} {protocol}")
            for records in found:
                if isinstance(records, list):
                    table.add(records)
                else:
                    broken.append(records)
    if broken:
        named = "; ".join(map(str, broken))
        warnings.warn(f"pictures left out, {len(broken)} in all: {named:.2000}", stacklevel=2)
    return _rows(table.frame, list(wanted))


def _named(attentions: Any) -> list[Attention]:
    """Attentions whose names tell them apart."""
    callables: dict[str, Any] = {}
    for one in _listed(attentions):
        if not isinstance(one, str) and callables.setdefault(canonical(one), one) is not one:
            raise ValueError(f"two attentions are called {canonical(one)!r}: expected names of their own (`__name__`)")
    return [attention(one) for one in _listed(attentions)]


def _places(layers: int | Iterable[Layers]) -> list[Layers]:
    if isinstance(layers, int):
        return [(layers,)]
    places = list(layers)
    if wrong := [place for place in places if isinstance(place, int)]:
        expected = f"expected tuples, ({tuple(places)},) for all at once or (({wrong[0]},), ...) for one at a time"
        raise ValueError(f"layers={layers!r}: {expected}")
    return places


def _sharing(asked: list[Asked], protocols: Sequence[Protocol], clip: Clip) -> list[tuple[Protocol, list[Asked]]]:
    """Protocols, each with datasets over the same pictures, for which the tower runs once."""
    own = Protocol.for_image_size(clip.image_size)
    each = product(protocols, asked) if protocols else ((one[0].protocol or own, one) for one in asked)
    groups: dict[tuple, list[Asked]] = {}
    for protocol, one in each:
        groups.setdefault((protocol, one[0].pictures, one[0].keys), []).append(one)
    return [(protocol, group) for (protocol, *_), group in groups.items()]


def side_by_side(work: Callable[[str], Result], keys: Collection[str], about: str) -> Iterator[Result]:
    """What `work` makes of each key, in their order, with a progress bar: as many at a time as torch has threads.

    Each has one thread for itself: what follows from one picture is too small to be shared among threads, which wait
    for one another, for long where the machine is busy. Nor do results then depend on the number of threads.
    """
    threads, one = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    one()
    try:
        with ThreadPoolExecutor(threads, initializer=one) as pool:
            results = pool.map(work, keys)
            yield from tqdm(results, about, len(keys), unit="image", file=sys.stdout, disable=not keys)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _measure(clip: Clip, protocol: Protocol, missing: Missing, strict: bool, key: str) -> list[Record] | BrokenImage:
    """One record per variant and dataset that lack one of the picture `key`, or what is wrong with its files."""
    variants, records = missing[key], []
    sets = {dataset.name: dataset for _, group in variants for dataset, _ in group}
    try:
        pairs = {name: dataset.read(key) for name, dataset in sets.items()}
    except BrokenImage as error:
        if strict:  # raised here, it ends the pictures that wait, too
            raise
        return error
    image, truths = next(iter(pairs.values()))[0], {name: truth for name, (_, truth) in pairs.items()}
    trunk = trunk_of(clip.visual, image, protocol, clip.mean, clip.std, clip.step)
    refined = {refine: refine(image, protocol, clip.mean, clip.std) for (*_, refine), _ in variants if refine}
    sharing: dict[tuple[Attention, Layers], list[tuple[Variant, list[Asked]]]] = {}
    for variant, group in variants:
        sharing.setdefault((variant[0], variant[2]), []).append((variant, group))
    for (attend, layers), read in sharing.items():
        every = readings(trunk, attend, [readout for (_, readout, *_), _ in read], layers)
        for (variant, group), tokens in zip(read, every, strict=True):
            vectors = torch.cat([words.vectors for _, words in group])
            scores = cosines(tokens, vectors, trunk.grid)
            if not scores.isfinite().all():
                raise ValueError(f"attention {canonical(attend)} makes NaN or infinite features of picture {key!r}")
            parts = scores.split([len(words.vectors) for _, words in group], dim=1)
            for (dataset, words), part in zip(group, parts, strict=True):
                logits: Tensor | Stitched = Stitched(part, protocol, image.shape[:2])
                if refine := variant[-1]:
                    logits = refined[refine](stitch(part, protocol, image.shape[:2]))
                labels = dataset.labelling(logits, words.query_class)
                head = _head(clip, (dataset, words), protocol, variant, key)
                records.append((head, words.names, counts(labels, truths[dataset.name], len(words.names))))
    return records


def _head(clip: Clip, asked: Asked, protocol: Protocol, variant: Variant, key: str) -> Head:
    dataset, (attend, readout, layers, refine) = asked[0], variant
    place = ",".join(map(str, layers))
    labelling = f"{dataset.labelling}+{refine}" if refine else dataset.labelling
    cell = (clip.name, dataset.name, protocol, labelling, canonical(attend), readout, place)
    return (*map(str, cell), key)


def _rows(frame: pd.DataFrame, wanted: list[Head]) -> pd.DataFrame:
    """The rows of the wanted cells and images, in their order."""
    place = {head: index for index, head in enumerate(wanted)}
    known = [place.get(head, -1) for head in frame[HEAD].drop_duplicates().itertuples(index=False, name=None)]
    places = np.array(known, dtype=int)[frame.groupby(HEAD, observed=True, sort=False).ngroup()]
    chosen = frame.iloc[np.argsort(places, kind="stable")[(places < 0).sum() :]].reset_index(drop=True)
    return chosen.assign(**{name: chosen[name].cat.remove_unused_categories() for name in TEXT})


def _listed(values: Any) -> Sequence:
    """A single value as a list of one."""
    return [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
