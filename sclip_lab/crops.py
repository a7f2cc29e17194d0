"""Pictures to learn from: crops, mirrored and resized at random, as mmsegmentation's recipes have them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import torch

from sclip_lab.datasets import Dataset
from sclip_lab.images import MEAN
from sclip_lab.metrics import IGNORE

KEPT = 512  # pictures of a dataset that are kept in memory, where it has no more


@dataclass(frozen=True, eq=False)
class Crops(torch.utils.data.Dataset):
    """Endless augmented crops of a dataset, numbered: images uint8 [H W 3] and truth uint8 [H W], `crop` pixels square.

    A picture is resized to a short side of `short_side` times a factor from `scales`, cut where no class fills more
    than three quarters (ten tries), and mirrored at random; `distort` changes its colours, and mean grey and void pad
    what is too small, at the right and below. `hide`, such as `Split.inductive`, is applied to labels before anything
    looks at them. Crop i depends on (seed, i) alone; every picture is seen once before any is seen again. Pictures of
    small datasets are kept in memory. Raises ValueError for a split that is for evaluation.
    """

    dataset: Dataset
    hide: Callable[[np.ndarray], np.ndarray]
    short_side: int = 512
    crop: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    distort: Callable[[np.random.RandomState, np.ndarray], np.ndarray] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset.split != "train":
            raise ValueError(f"{self.dataset.name!r} is for evaluation: expected load_dataset(..., split='train')")

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that reads ahead keeps pictures of its own: the cache cannot be sent to it.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def _read(self) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
        read = self.dataset.read
        return lru_cache(KEPT)(read) if len(self.dataset.keys) <= KEPT else read

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(index, len(self.dataset.keys))
        order = _order(len(self.dataset.keys), self.seed, epoch)
        rng = np.random.RandomState([self.seed, index, 1])
        image, truth = self._read(self.dataset.keys[order[place]])
        image, truth = self._cut(rng, *self._resized(rng, image, self.hide(truth)))
        if rng.uniform() < 0.5:
            image, truth = image[:, ::-1], truth[:, ::-1]
        return self._padded(self.distort(rng, image) if self.distort else image, truth)

    def _resized(self, rng: np.random.RandomState, image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
        factor = self.short_side * rng.uniform(*self.scales) / min(truth.shape)
        size = [round(side * factor) for side in reversed(truth.shape)]
        return cv2.resize(image, size), cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST)

    def _cut(self, rng: np.random.RandomState, image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
        for _ in range(10):
            top, left = (rng.randint(max(side - self.crop, 0) + 1) for side in truth.shape)
            window = np.s_[top : top + self.crop, left : left + self.crop]
            areas = np.bincount(truth[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
            if areas.max() < 0.75 * areas.sum():
                break
        return image[window], truth[window]

    def _padded(self, image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        short = [self.crop - side for side in truth.shape]  # rows and columns that are missing
        edges = (0, short[0], 0, short[1], cv2.BORDER_CONSTANT)
        grey = [255 * value for value in MEAN]
        return cv2.copyMakeBorder(image, *edges, value=grey), cv2.copyMakeBorder(truth, *edges, value=IGNORE)


@lru_cache(2)
def _order(pictures: int, seed: int, epoch: int) -> np.ndarray:
    """In which order an epoch shows so many pictures."""
    return np.random.RandomState([seed, epoch]).permutation(pictures)


def photometric(rng: np.random.RandomState, image: np.ndarray) -> np.ndarray:
    """Change brightness by up to 32, contrast and saturation by a half, hue by 36 degrees, each in every other picture.

    As mmsegmentation's PhotoMetricDistortion, but for its order of contrast and colour, which is random.
    """
    bounds = ((-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-18, 18, 0))
    shift, gain, saturation, hue = (rng.uniform(low, high) if rng.rand() < 0.5 else off for low, high, off in bounds)
    hsv = cv2.cvtColor(np.clip((image + shift) * gain, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue) % 180
    hsv[..., 1] = np.minimum(hsv[..., 1] * saturation, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
