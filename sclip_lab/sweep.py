"""Grids of experiments: pixel counts per image and class.

A sweep runs the tower once per image and protocol, and shares it among all attentions, read-outs, layers and
vocabularies (`measure`). Its rows are counts, not IoUs: they add up over images, sittings and machines, and every mean
and interval is derived from them later (`summary`).
"""

import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from sclip_lab.clip import Clip, load
from sclip_lab.datasets import BrokenImage, Dataset, load_dataset
from sclip_lab.files import results
from sclip_lab.measure import Asked, Cell, Layers, Measurement
from sclip_lab.parallel import in_shards, progress
from sclip_lab.protocol import Protocol
from sclip_lab.readout import Readout
from sclip_lab.refine import Refiner
from sclip_lab.registry import Attention, attention, canonical
from sclip_lab.store import HEAD, TEXT, Head, Store
from sclip_lab.text import queries


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
    n_jobs: int | None = None,
) -> pd.DataFrame:
    """Every combination of the arguments on every image: one row per cell, image and class, with pixel counts.

    Columns: store.TEXT, store.COUNTS. A single value serves as a list of one. `protocols` None: the paper's for each
    benchmark, windows of the size that the model was trained on for other datasets. `layers`: those replaced
    together in a tuple, such as ((-1,), (-2, -1)). `limit`: pictures per dataset.
    `store`: a file of that name in the folder of results is read first, only what is missing in it is measured, and
    what is measured is added; without it, all is measured. An attention without a spec is known by its `__name__`, in
    the file too: choose another when you change it. Pictures are measured side by side (see `parallel`), so that an
    attention must keep nothing between its calls.

    `refiners`: what refines the logits, such as `refine.Pamr()`; None: nothing. It is named in the column `labelling`.
    A picture whose files cannot be used is left out of all cells, with a warning that names it; where `strict`, it ends
    the sweep with `BrokenImage`.

    `n_jobs`: among how many processes joblib spreads the pictures, -1 for one per core, or whatever workers
    `joblib.parallel_config` names, as those of a Dask cluster; None: threads of this process. The counts are the same.
    Give the model by its name then, and each process loads it once.

    Raises ValueError where a dataset's name stands for other classes, here or in the store, and what `parallel` raises.
    """
    clip = model if isinstance(model, Clip) else load(model)
    sets = [d if isinstance(d, Dataset) else load_dataset(d, limit=limit) for d in _listed(datasets)]
    asked = [(dataset, queries(clip, dataset.classes).to("cpu")) for dataset in sets]
    reads = map(Readout.parse, _listed(readouts))
    variants = list(product(_named(attentions), reads, _places(layers), _listed(refiners)))
    wanted: dict[Head, None] = {}  # in order
    broken: list[BrokenImage] = []
    with Store(results() / f"{store}.parquet" if store else None) as table:
        _tell_apart(asked, table.frame)
        for protocol, group in _sharing(asked, _listed(protocols) if protocols else [], clip):
            whole = Measurement.of(
                clip if n_jobs is None else model, clip.name, protocol, product(variants, group), strict
            )
            about = f"{group[0][0].pictures} {protocol}"
            for part, keys in _lacking(whole, group[0][0].keys, table.heads | wanted.keys()):
                found = part.run(keys) if n_jobs is None else in_shards(part.shard, keys, n_jobs)
                with closing(found):  # whatever ends this, workers end with it
                    for records in progress(found, about, len(keys)):
                        if isinstance(records, list):
                            table.add(records)
                        else:
                            broken.append(records)
            wanted |= dict.fromkeys((*cell, key) for key in group[0][0].keys for cell in whole.cells)
    if broken:
        named = "; ".join(sorted(map(str, broken)))
        warnings.warn(f"pictures left out, {len(broken)} in all: {named:.2000}", stacklevel=2)
    frame = _rows(table.frame, list(wanted))
    if broken and frame.empty:
        raise BrokenImage(f"no picture is left to measure on; the first: {min(map(str, broken))}")
    return frame


def _lacking(whole: Measurement, keys: Sequence[str], known: Collection[Head]) -> list[tuple[Measurement, list[str]]]:
    """What is not known yet: measurements of the cells that the same pictures lack, and these pictures."""
    lacking: dict[tuple[Cell, ...], list[str]] = {}
    for key in keys:
        lacking.setdefault(tuple(cell for cell in whole.cells if (*cell, key) not in known), []).append(key)
    return [(whole.only(cells), keys) for cells, keys in lacking.items() if cells]


def _tell_apart(asked: list[Asked], known: pd.DataFrame) -> None:
    """Raise ValueError where one name stands for other classes, here or in what is known."""
    classes = {name: set(rows["class"]) for name, rows in known.groupby("dataset", observed=True)}
    lists: dict[str, Any] = {}
    for dataset, words in asked:
        if classes.setdefault(dataset.name, set(words.names)) != set(words.names):
            raise ValueError(f"dataset {dataset.name!r} is known with other classes: expected another name, or store")
        if lists.setdefault(dataset.name, dataset.classes) != dataset.classes:
            raise ValueError(f"two datasets are called {dataset.name!r}: expected names of their own, for other words")


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
