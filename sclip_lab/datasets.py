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

HELD_OUT, SCENES, SCENE_SIZE = 1, 300, (160, 213)  # seed (training has 0), pictures, height and width in pixels


@dataclass(frozen=True)
class Dataset:
    """`classes`: lines for `text.parse`. `read(key)`: image uint8 [H W 3], truth uint8 [H W], 255 ignored."""

    name: str
    pictures: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    read: Read
    labelling: Labelling = Labelling()


def datasets() -> tuple[str, ...]:
    """Names of the datasets that `load_dataset` knows."""
    return tuple(_LOADERS)


def load_dataset(name: str, root: str | PathLike[str] | None = None, limit: int | None = None) -> Dataset:
    """A dataset by name, its first `limit` pictures. `root`: the owners' folder, which the bundled scenes don't need.

    Raises ValueError for an unknown name and for a limit below 1.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(_LOADERS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least one picture, or None for all")
    dataset = _LOADERS[name](root)
    return replace(dataset, keys=dataset.keys[:limit])


def _scenes(vocabulary: str, root: str | PathLike[str] | None) -> Dataset:
    keys = tuple(map(str, range(SCENES)))
    return Dataset(f"scenes-{vocabulary}", "scenes", scenes.VOCABULARIES[vocabulary], keys, partial(_scene, vocabulary))


def _scene(vocabulary: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, HELD_OUT, SCENE_SIZE, start=int(key))
    return images[0], scenes.vocabulary_labels(labels[0], vocabulary)


_LOADERS = {f"scenes-{vocabulary}": partial(_scenes, vocabulary) for vocabulary in scenes.VOCABULARIES}
