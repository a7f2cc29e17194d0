"""Measures of label maps (counts, IoU, bootstrap) and of attention maps (entropy, distance, invariance, alignment).

Letters: n tokens (`prefix` before the patches: 1, CLS, or 0 in towers without), p = n - prefix patches, s bootstrap
samples. Label maps are numpy, attention maps torch.

All attention measures look at patches only: the row and column of CLS are left out and each row is scaled to sum 1
again, so that maps of different methods (the rows of CSA's weights sum to 2) are compared on the same footing. Each
takes weights [... n n] and gives one number per map [...]; weights of shape [b h n n] give one per image and head.
Average the heads first (`weights.mean(1)`) for the map of a whole layer.
"""

from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

IGNORE = 255  # label of pixels that belong to no class

# Label maps


def counts(labels: ArrayLike | Tensor, truth: ArrayLike | Tensor, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Pixels per class [classes 3] int64 of two label maps of the same shape: intersection, predicted, true.

    Pixels whose truth is `ignore` are left out. Counts of several images add up to the counts of the data set.
    """
    predicted, true = (torch.as_tensor(map_).long() for map_ in (labels, truth))
    if predicted.shape != true.shape:
        raise ValueError(f"labels {list(predicted.shape)}, truth {list(true.shape)}: expected the same shape")
    seen = true != ignore
    for name, map_ in (("labels", predicted), ("truth", true)):
        low, high = torch.where(seen, map_, 0).aminmax() if seen.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"{name} from {low} to {high}: expected 0 to {classes - 1}, or {ignore}")
    return tally(predicted, true, classes, ignore).cpu().numpy()


def tally(labels: Tensor, truth: Tensor, classes: int, ignore: int = IGNORE) -> Tensor:
    """`counts` [classes 3] of maps that are known to be fit, int64, on their device and without waiting for it."""
    seen = truth != ignore
    parts = (seen & (labels == truth), labels), (seen, labels), (seen, truth)
    # What is left out is counted as one class more.
    found = [histogram(torch.where(where, map_, classes).flatten(), classes + 1) for where, map_ in parts]
    return torch.stack(found, dim=1)[:classes]


def histogram(values: Tensor, size: int) -> Tensor:
    """How often each of 0 to size - 1 is among int64 values [n]: as `bincount`, for which a GPU would have to wait."""
    return values.new_zeros(size).scatter_add_(0, values, torch.ones_like(values))


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union, 0 to 1, of counts [... classes 3] -> [... classes]. NaN: in neither labels nor truth."""
    intersection, predicted, true = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    union = predicted + true - intersection
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def miou(counts: np.ndarray) -> np.ndarray:
    """Mean IoU, 0 to 1, of counts [... classes 3] -> [...], over the classes that occur in labels or truth.

    The field's convention (MMSegmentation's IoUMetric): sum the counts of all images first, then take IoUs. The mean of
    per-image IoUs is another, usually higher number. A class predicted but nowhere true counts as 0.
    """
    ious = iou(counts)
    present = ~np.isnan(ious)
    total = present.sum(axis=-1)
    return np.divide(np.where(present, ious, 0).sum(axis=-1), total, out=np.full(total.shape, np.nan), where=total > 0)


def bootstrap(
    counts: np.ndarray, other: np.ndarray | None = None, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (low, high) of the data set's mIoU under resampling of images.

    `counts` [images classes 3] holds one image each. With `other`, the counts of a second method on the same images in
    the same order, it is the interval of miou(counts) - miou(other): both methods see the same resampled images.
    Efron 1979; the images are drawn by their multinomial multiplicities.
    """
    drawn = miou(_resampled(counts, samples, seed))
    if other is not None:
        if np.shape(other) != np.shape(counts):
            raise ValueError(f"counts {list(np.shape(counts))} and {list(np.shape(other))}: expected the same images")
        drawn = drawn - miou(_resampled(other, samples, seed))
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(counts: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Counts [images classes 3] -> counts [s classes 3] of as many data sets of the same size."""
    if np.ndim(counts) != 3 or len(counts) == 0:
        raise ValueError(f"counts of shape {list(np.shape(counts))}: expected [images classes 3], at least one image")
    times = multiplicities(len(counts), samples, seed)
    return (times @ counts.reshape(len(counts), -1)).reshape(samples, *counts.shape[1:])


@lru_cache(maxsize=8)
def multiplicities(images: int, samples: int, seed: int) -> np.ndarray:
    """How often each image is drawn into each sample, [s images]."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    return drawn.astype(np.float64)


def mean(values: ArrayLike, level: float = 0.95, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of one number per image [images], and its percentile interval under resampling of images."""
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(numbers, (samples, len(numbers))).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(numbers.mean()), float(low), float(high)


def retrieved(images: Tensor, texts: Tensor, captions: list[str]) -> np.ndarray:
    """Which images [n] bool find their own caption, or one with the same words, nearest among all: recall at 1.

    `images`, `texts`: unit vectors [n e] of the images and of their captions.
    """
    nearest = (images @ texts.T).argmax(dim=1).tolist()
    return np.array([captions[found] == own for found, own in zip(nearest, captions, strict=True)])


def borders(truth: ArrayLike | Tensor, within: float) -> np.ndarray:
    """Which pixels [H W] bool of a label map have one of another label, 255 among them, at most `within` pixels away.

    The band of a trimap (Kohli et al. 2009): where labels are hard to tell for want of resolution alone.
    """
    reach = np.arange(-int(within), int(within) + 1)
    disk = np.hypot(reach, reach[:, None]) <= within
    # Under the disk the largest label less the smallest one.
    return cv2.morphologyEx(_numpy(truth).astype(np.uint8), cv2.MORPH_GRADIENT, disk.astype(np.uint8)) > 0


# Attention maps


def entropy(weights: Tensor, prefix: int = 1) -> Tensor:
    """Shannon entropy of a source's attention in nats, mean over sources: 0 on one patch, log p on all alike."""
    rows = _patch_rows(weights, prefix)
    return torch.special.entr(rows).sum(dim=-1).mean(dim=-1)


def distance(weights: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Mean attention distance in patches: how far from the source, on a `grid` of (rows, columns), its attention lies.

    Dosovitskiy et al. 2021 (arXiv 2010.11929, figure 7 and appendix D.7), there in pixels.
    """
    rows = _patch_rows(weights, prefix)
    if grid[0] * grid[1] != rows.shape[-1]:
        raise ValueError(f"grid={tuple(grid)} for {rows.shape[-1]} patches: expected rows x columns of them")
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    centres = torch.stack([y, x], dim=-1).flatten(0, 1).to(rows)  # p 2
    apart = (centres[:, None] - centres[None]).norm(dim=-1)  # p p
    return (rows * apart).sum(dim=-1).mean(dim=-1)


def invariance(weights: Tensor, prefix: int = 1) -> Tensor:
    """Mean cosine between the attention maps of two different sources: 1 if every patch attends to the same places.

    The "spatial invariance" that Wang et al. 2024 (arXiv 2312.01597) see in CLIP's last layer, as a number.
    """
    rows = torch.nn.functional.normalize(_patch_rows(weights, prefix), dim=-1)
    p = rows.shape[-1]
    # The squared norm of the sum of all maps holds every pair's cosine, the p pairs of a map with itself included.
    same = rows.square().sum(dim=(-1, -2))
    return (rows.sum(dim=-2).square().sum(dim=-1) - same) / (p * (p - 1))


def alignment(weights: Tensor, labels: Tensor, ignore: int = IGNORE, prefix: int = 1) -> Tensor:
    """Share of a source's attention on patches of its own class, itself included, mean over sources.

    `labels` [... p] (see `patch_labels`) broadcast against the maps [...]; for weights [b h n n] pass labels[:, None].
    Sources labelled `ignore` are left out; as targets they belong to no class. NaN where no source is left.
    """
    rows = _patch_rows(weights, prefix)
    labels = torch.as_tensor(labels, device=rows.device)
    if labels.shape[-1] != rows.shape[-1]:
        raise ValueError(f"labels of {labels.shape[-1]} patches for maps of {rows.shape[-1]}: expected the same number")
    own = (rows * (labels[..., :, None] == labels[..., None, :])).sum(dim=-1)  # ... p
    return torch.where((labels != ignore).expand_as(own), own, torch.nan).nanmean(dim=-1)


def patch_labels(labels: ArrayLike | Tensor, grid: tuple[int, int]) -> Tensor:
    """The most frequent label of each patch [p], smallest first in a tie, of a label map [H W] under a patch grid.

    The grid of (rows, columns) is stretched over the whole map, whose sides need not be multiples of it.
    """
    map_ = _numpy(labels)
    if map_.ndim != 2 or map_.shape[0] < grid[0] or map_.shape[1] < grid[1]:
        raise ValueError(f"label map of shape {list(map_.shape)}: expected [H W], not below the grid {grid}")
    row, column = (np.arange(side) * patches // side for side, patches in zip(map_.shape, grid, strict=True))
    patch = row[:, None] * grid[1] + column  # H W
    kinds = int(map_.max()) + 1
    votes = np.bincount((patch * kinds + map_).ravel(), minlength=grid[0] * grid[1] * kinds)
    return torch.from_numpy(votes.reshape(-1, kinds).argmax(axis=1))


def _patch_rows(weights: Tensor, prefix: int) -> Tensor:
    """[... n n] -> [... p p]: from patches to patches, each row summing to 1 (or to 0, if all of it went to CLS)."""
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < prefix + 2:
        raise ValueError(f"weights of shape {list(weights.shape)}: expected [... n n], two patches or more")
    return torch.nn.functional.normalize(weights[..., prefix:, prefix:].float(), p=1, dim=-1)


def _numpy(map_: ArrayLike | Tensor) -> np.ndarray:
    return np.asarray(map_.cpu() if isinstance(map_, Tensor) else map_, dtype=np.int64)
