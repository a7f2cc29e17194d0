"""Pictures with ground truth, and the words they are to be labelled with.

A dataset is a list of keys and a function that reads one. Datasets over the same pictures (`pictures`) differ in
vocabulary only, so that a sweep runs the tower once for all of them.

The benchmarks are read from their owners' own files (`readers`), with the words, the protocol and the labelling of the
SCLIP authors' configuration (Wang et al. 2024, arXiv 2312.01597).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from sclip_lab import readers, scenes
from sclip_lab.files import chosen, home
from sclip_lab.label import Labelling
from sclip_lab.metrics import IGNORE
from sclip_lab.protocol import Protocol
from sclip_lab.readers import LAYOUTS, BrokenImage
from sclip_lab.remap import TABLES
from sclip_lab.text import parse

__all__ = ["BENCHMARKS", "Benchmark", "BrokenImage", "Dataset", "benchmarks", "datasets", "load_dataset", "studied"]

Read = Callable[[str], tuple[np.ndarray, np.ndarray]]

HELD_OUT, SCENES, SCENE_SIZE = 1, 300, (160, 213)  # seed, pictures of a split, height and width in pixels
SPLITS = {"val": HELD_OUT, "train": 0}  # seed of the scenes; 0 is the one that the bundled model was trained on


@dataclass(frozen=True)
class Dataset:
    """`classes`: lines for `text.parse`. `read(key)`: image uint8 [H W 3], truth uint8 [H W], 255 ignored; it raises
    `BrokenImage` for a file that cannot be used, and other pictures may be fine.

    `split`: "val", to be evaluated on, or "train", to learn from, whose `name` and `pictures` end in "-train".
    `protocol`: the paper's for this dataset; None: what suits the model.
    """

    name: str
    pictures: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    read: Read
    labelling: Labelling = Labelling()
    split: str = "val"
    protocol: Protocol | None = None


@dataclass(frozen=True)
class Benchmark:
    """What the SCLIP authors' configuration says of a benchmark: pictures (of readers.LAYOUTS), how many of them, the
    short side of their protocol, which is 224/112 otherwise, and how scores become labels."""

    pictures: str
    images: int
    short_side: int = 336
    labelling: Labelling = Labelling()
    vocabulary: str = ""  # where it is not the dataset's name

    @property
    def protocol(self) -> Protocol:
        return Protocol(self.short_side)


# Numbers of pictures are known from memory, but for VOC 2012 and COCO; `data check` counts.
BENCHMARKS = {
    "voc21": Benchmark("voc2012", 1449, labelling=Labelling(65, 0.1, 0.1)),
    "voc20": Benchmark("voc2012", 1449),
    "context60": Benchmark("pascal-context", 5105, labelling=Labelling(50, 0.1)),
    "context59": Benchmark("pascal-context", 5105),
    "coco-object": Benchmark("coco2017", 5000, labelling=Labelling(50, 0.1)),
    "coco-stuff": Benchmark("coco2017", 5000, short_side=448),
    "coco-stuff-10k": Benchmark("coco-stuff-10k", 1000, vocabulary="coco-stuff"),
    "ade20k": Benchmark("ade20k", 2000),
    "cityscapes": Benchmark("cityscapes", 500, short_side=560),
}


def datasets() -> pd.DataFrame:
    """What `load_dataset` knows: by name, the number of pictures and classes, and the paper's protocol and labelling.

    The bundled scenes have no protocol of their own. Pictures are those of the "val" split, as the owner has them.
    """
    plain = str(Labelling())
    rows = {f"scenes-{name}": (SCENES, len(words), "", plain) for name, words in scenes.VOCABULARIES.items()}
    for name, row in BENCHMARKS.items():
        rows[name] = (row.images, len(_vocabulary(name)), str(row.protocol), str(row.labelling))
    columns = ["images", "classes", "protocol", "labelling"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("dataset")


# By kind of vocabulary, the bundled scenes, and the benchmarks that may stand in their place, the paper's choice first
KINDS = {
    "background": ("scenes-background", "voc21", "context60", "coco-object"),
    "things": ("scenes-things", "voc20", "context59"),
    "everything": ("scenes-full", "coco-stuff", "context59", "ade20k", "coco-stuff-10k", "cityscapes", "voc20"),
}


def benchmarks(limit: int | None = None) -> dict[str, Dataset]:
    """All that notebooks can measure on, by name: the first `limit` of the bundled scenes, under each vocabulary.

    Where SCLIP_MODEL and SCLIP_DATA are both set, the BENCHMARKS that are there instead: SCLIP_LIMIT of their pictures,
    all of them unless it is set. Raises ValueError for a SCLIP_LIMIT that is no number, FileNotFoundError for a folder
    without any benchmark.
    """
    if chosen() == "tiny" or not (root := os.environ.get("SCLIP_DATA")):
        return {name: load_dataset(name, limit=limit) for name, *_ in KINDS.values()}
    number = os.environ.get("SCLIP_LIMIT") or None
    if number and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"SCLIP_LIMIT={number!r}: expected a number of pictures, at least 1")
    every = {name: _there(name, root, number and int(number)) for name in BENCHMARKS}
    if not any(every.values()):
        hint = f"`python -m sclip_lab data check {root}` says what to get"
        raise FileNotFoundError(f"SCLIP_DATA={root!r} holds none of {', '.join(BENCHMARKS)}: {hint}")
    return {name: dataset for name, dataset in every.items() if dataset}


def studied(limit: int | None = None) -> dict[str, Dataset]:
    """What most notebooks measure on, by kind of vocabulary: of `benchmarks`, the first in KINDS that is there.

    A kind of which none is there takes what another has.
    """
    there = benchmarks(limit)
    rest = next(iter(there.values()))
    return {kind: next((there[name] for name in names if name in there), rest) for kind, names in KINDS.items()}


def _there(name: str, root: str, limit: int | None) -> Dataset | None:
    try:
        return load_dataset(name, root, limit)
    except FileNotFoundError:
        return None


def load_dataset(
    name: str | PathLike[str], root: str | PathLike[str] | None = None, limit: int | None = None, split: str = "val"
) -> Dataset:
    """A dataset by name, the first `limit` pictures of its "val" or "train" split.

    `root`: the folder with the owners' files, laid out as in `readers`; None: SCLIP_DATA. The bundled scenes need none.
    A folder of your own is a dataset too, by its path or as ("folder", root): `images`, `masks` (PNGs of the pictures'
    stems, with numbers from 0 in the order of the classes, 255 ignored) and `classes.txt` (see `text.parse`).

    Picture i is the same under every limit. Raises ValueError for an unknown name or split and for a limit below 1,
    FileNotFoundError where a dataset's files are not there; a single broken file is `Dataset.read`'s to report.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} of {str(name)!r}: expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least one picture, or None for all")
    if name in _SCENES:
        dataset = _scenes(str(name).removeprefix("scenes-"), split)
    elif name in BENCHMARKS:
        dataset = _benchmark(str(name), _root(root, str(name)), split)
    elif name == "folder" or Path(name).is_dir():
        dataset = _folder(_root(root, "folder") if name == "folder" else Path(name), split)
    else:
        known = ", ".join([*_SCENES, *BENCHMARKS])
        raise ValueError(f"unknown dataset {str(name)!r}: expected one of {known}, or a folder of images and masks")
    return replace(dataset, keys=dataset.keys[:limit])


def _root(root: str | PathLike[str] | None, name: str) -> Path:
    folder = root or os.environ.get("SCLIP_DATA")
    if not folder:
        raise ValueError(f"dataset {name!r} has no root: expected the folder of its files, as root= or in SCLIP_DATA")
    return Path(folder).expanduser()


def _suffix(split: str) -> str:
    return "" if split == "val" else f"-{split}"


_SCENES = tuple(f"scenes-{vocabulary}" for vocabulary in scenes.VOCABULARIES)


def _scenes(vocabulary: str, split: str) -> Dataset:
    return Dataset(
        f"scenes-{vocabulary}{_suffix(split)}",
        f"scenes{_suffix(split)}",
        scenes.VOCABULARIES[vocabulary],
        tuple(map(str, range(SCENES))),
        partial(_scene, vocabulary, SPLITS[split]),
        split=split,
    )


def _scene(vocabulary: str, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, seed, SCENE_SIZE, start=int(key))
    return images[0], scenes.vocabulary_labels(labels[0], vocabulary)


def _benchmark(name: str, root: Path, split: str) -> Dataset:
    row = BENCHMARKS[name]
    layout = LAYOUTS[row.pictures]
    keys = readers.keys(layout, root, split)
    if not keys:
        expected = layout.path("keys" if layout.keys else "image", split, "*")
        hint = f"expected {expected}; `python -m sclip_lab data check {root}` says what to get"
        raise FileNotFoundError(f"no pictures of {name!r} ({split}) in {str(root)!r}: {hint}")
    return Dataset(
        name + _suffix(split),
        row.pictures + _suffix(split),
        _vocabulary(name),
        keys,
        partial(readers.read, layout, root, split, TABLES[name]),
        row.labelling,
        split,
        row.protocol,
    )


def _vocabulary(name: str) -> tuple[str, ...]:
    path = home() / "data" / "vocabularies" / f"{BENCHMARKS[name].vocabulary or name}.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


def _folder(root: Path, split: str) -> Dataset:
    """A folder of one's own. Its name has a fingerprint of its files, so that stored results never mix two folders."""
    files, listing = readers.pictures(root / "images"), root / "classes.txt"
    if not files or not listing.is_file():
        missing = "no classes.txt" if files else "no pictures in images/"
        raise FileNotFoundError(f"folder {str(root)!r} has {missing}: expected images/, masks/ and classes.txt")
    classes = tuple(listing.read_text(encoding="utf-8").splitlines())
    masks = root / "masks"
    sizes = [(path.name, path.stat().st_size) for path in [*files.values(), *sorted(masks.glob("*.png"))]]
    name = f"{root.resolve().name}-{crc32(repr((classes, sizes)).encode()):08x}{_suffix(split)}"
    table = {label: label for label in range(len(parse(classes)))} | {IGNORE: IGNORE}
    return Dataset(name, name, classes, tuple(files), partial(_pair, files, masks, table), split=split)


def _pair(files: dict[str, Path], masks: Path, table: dict[int, int], key: str) -> tuple[np.ndarray, np.ndarray]:
    return readers.read_pair(files[key], masks / f"{key}.png", table)
