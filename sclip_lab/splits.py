"""Classes that are learned from and classes that are not: generalised zero-shot segmentation.

A system sees the masks of some classes, the seen ones, and is asked to name all of them, unseen ones too, as in ZegCLIP
(Zhou et al., CVPR 2023, arXiv:2212.03588) and MVP-SEG (Guo et al., PRCV 2023, arXiv:2304.06957). Inductive: pixels of
unseen classes are void. Transductive: that they are of some unseen class is known, of which is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sclip_lab.datasets import Dataset
from sclip_lab.metrics import IGNORE, counts, miou, multiplicities
from sclip_lab.parallel import side_by_side

HIDDEN = 254  # label of a pixel of some unseen class


@dataclass(frozen=True)
class Split:
    """The `unseen` labels of a dataset (a name for `load_dataset`) of so many `classes`; all others are seen."""

    dataset: str
    classes: int
    unseen: tuple[int, ...]

    def __post_init__(self) -> None:
        labels = set(self.unseen)
        if len(labels) < len(self.unseen) or not set() < labels < set(range(self.classes)) or self.classes > HIDDEN:
            raise ValueError(
                f"unseen={self.unseen} of {self.classes} classes: expected some of their labels, each once, and at "
                f"most {HIDDEN} classes"
            )

    @property
    def seen(self) -> tuple[int, ...]:
        """Labels that masks are given of."""
        return tuple(label for label in range(self.classes) if label not in self.unseen)

    def inductive(self, truth: np.ndarray) -> np.ndarray:
        """Labels uint8 [..] -> places in `seen`; 255 for all else, so that nothing tells an unseen class from void."""
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.seen)] = range(len(self.seen))
        return table[truth]

    def transductive(self, truth: np.ndarray) -> np.ndarray:
        """Labels uint8 [..] -> the same, HIDDEN in the place of every unseen class."""
        table = np.arange(256, dtype=np.uint8)
        table[list(self.unseen)] = HIDDEN
        return table[truth]

    def guessed(self, truth: Tensor, scores: Tensor) -> Tensor:
        """Labels [b H W] with, wherever they are HIDDEN, the unseen one of highest score, [b classes H W]."""
        unseen = torch.tensor(self.unseen, dtype=truth.dtype, device=truth.device)
        return torch.where(truth == HIDDEN, unseen[scores[:, list(self.unseen)].argmax(dim=1)], truth)


COCO_UNSEEN = (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160)
CONTEXT_UNSEEN = (20, 34, 49, 15, 8, 25, 7, 55, 32, 1)

# The benchmarks' are those of SPNet and ZS3Net, which ZegCLIP and MVP-SEG took over; Context as in MaskCLIP+. Of the
# bundled world the last of its list are unseen, as in VOC: snow and lava; fish, leaf and cookie.
SPLITS = {
    "voc20": Split("voc20", 20, (15, 16, 17, 18, 19)),
    "coco-stuff": Split("coco-stuff", 171, COCO_UNSEEN),
    "context60": Split("context60", 60, CONTEXT_UNSEEN),
    "scenes": Split("scenes-full", 20, (6, 7, 17, 18, 19)),
    "scenes-unseen-things": Split("scenes-full", 20, (16, 17, 18, 19)),
    "scenes-unseen-stuff": Split("scenes-full", 20, (5, 6, 7)),
}

MEASURES = ["pixels", "seen", "unseen", "harmonic"]


def measure(label: Callable[[np.ndarray], Tensor], dataset: Dataset, classes: int) -> np.ndarray:
    """Counts [images classes 3] of what `label` (image [H W 3] -> labels [H W]) makes of every picture, in order."""

    def one(key: str) -> np.ndarray:
        image, truth = dataset.read(key)
        with torch.no_grad():
            return counts(label(image).cpu(), truth, classes)

    return np.stack(list(side_by_side(one, dataset.keys, dataset.name)))


def score(counts: np.ndarray, split: Split) -> np.ndarray:
    """MEASURES [.. 4], 0 to 1, of counts [.. classes 3]: share of pixels, mIoU of seen and of unseen, 2 S U / (S + U).

    All classes compete; a class's IoU counts what it takes from, and loses to, those of the other kind.
    """
    seen, unseen = (miou(counts[..., list(labels), :]) for labels in (split.seen, split.unseen))
    intersection, _, true = np.moveaxis(counts.sum(axis=-2), -1, 0)
    harmonic = 2 * seen * unseen / np.maximum(seen + unseen, np.finfo(float).tiny)
    return np.stack([intersection / true, seen, unseen, harmonic], axis=-1)


def zero_shot(counts: np.ndarray, split: Split, other: np.ndarray | None = None) -> pd.DataFrame:
    """MEASURES in percent of counts [images classes 3], by row: value, and its 95 % bootstrap interval, low and high.

    With `other`, counts of a second system on the same images in the same order, their paired difference, in points.
    Resamples without any seen or any unseen class are left out of what they say nothing of.
    """
    if other is not None and other.shape != counts.shape:
        raise ValueError(f"counts {list(counts.shape)} and {list(other.shape)}: expected those of the same images")
    times = multiplicities(len(counts), 2000, 0)

    def drawn(table: np.ndarray) -> np.ndarray:
        return score(np.stack([table.sum(axis=0), *np.tensordot(times, table, 1)]), split)  # 1 + samples 4

    scores = 100 * (drawn(counts) - (0 if other is None else drawn(other)))
    low, high = np.nanquantile(scores[1:], [0.025, 0.975], axis=0)
    return pd.DataFrame({"value": scores[0], "low": low, "high": high}, index=pd.Index(MEASURES, name="measure"))
