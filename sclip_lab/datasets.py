"""Pictures with ground truth, and the words they are to be labelled with.

A dataset is a list of keys and a function that reads one. Datasets over the same pictures (`pictures`) differ in
vocabulary only, so that a sweep runs the tower once for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike

import numpy as np

from sclip_lab import scenes
from sclip_lab.label import Labelling

Read = Callable[[str], tuple[np.ndarray, np.ndarray]]

HELD_OUT, SCENES, SCENE_SIZE = 1, 300, (160, 213)  # seed, pictures of a split, height and width in pixels
SPLITS = {"val": HELD_OUT, "train": 0}  # seed of the scenes; 0 is the one that the bundled model was trained on


@dataclass(frozen=True)
class Dataset:
    """`classes`: lines for `text.parse`. `read(key)`: image uint8 [H W 3], truth uint8 [H W], 255 ignored.

    `split`: "val", to be evaluated on, or "train", to learn from, whose `name` and `pictures` end in "-train".
    """

    name: str
    pictures: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    read: Read
    labelling: Labelling = Labelling()
    split: str = "val"


def datasets() -> tuple[str, ...]:
    """Names of the datasets that `load_dataset` knows."""
    return tuple(_LOADERS)


def load_dataset(
    name: str, root: str | PathLike[str] | None = None, limit: int | None = None, split: str = "val"
) -> Dataset:
    """A dataset by name, the first `limit` pictures of its "val" or "train" split.

    `root`: the owners' folder, which the bundled scenes don't need. Picture i is the same under every limit. Raises
    ValueError for an unknown name or split and for a limit below 1.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(_LOADERS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} of {name!r}: expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least one picture, or None for all")
    dataset = _LOADERS[name](root, split)
    return replace(dataset, keys=dataset.keys[:limit])


def _scenes(vocabulary: str, root: str | PathLike[str] | None, split: str) -> Dataset:
    keys = tuple(map(str, range(SCENES)))
    suffix = "" if split == "val" else f"-{split}"
    return Dataset(
        f"scenes-{vocabulary}{suffix}",
        f"scenes{suffix}",
        scenes.VOCABULARIES[vocabulary],
        keys,
        partial(_scene, vocabulary, SPLITS[split]),
        split=split,
    )


def _scene(vocabulary: str, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, seed, SCENE_SIZE, start=int(key))
    return images[0], scenes.vocabulary_labels(labels[0], vocabulary)


_LOADERS = {f"scenes-{vocabulary}": partial(_scenes, vocabulary) for vocabulary in scenes.VOCABULARIES}
