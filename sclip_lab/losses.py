"""Losses of maps, one logit per class and patch, under labels of pixels.

Letters: b images, k classes, i j patch grid, H W pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from sclip_lab.metrics import IGNORE

Loss = Callable[[Tensor, Tensor], Tensor]  # maps [b k i j], truth [b H W] with 255 for void -> a number


def non_exclusive(maps: Tensor, truth: Tensor, focal: float = 100.0, dice: float = 1.0, void: bool = False) -> Tensor:
    """ZegCLIP's loss: focal on all classes and dice on those present, each class by its own sigmoid.

    maps [b k i j], resized to truth [b H W], places of classes. Focal (Lin et al., ICCV 2017, α 0.25, γ 2) is the mean
    over pixels, dice (Milletari et al., 3DV 2016) 1 - (2 Σpy + 1) / (Σp + Σy + 1); both are summed over pictures and
    classes and divided by how many of these are present, here in this process's batch. Void pixels, 255, are left
    out of both. With `void`, as in the authors' code, they are negatives of every class instead: of the seen ones
    where they belong to unseen ones.
    """
    y, known = _one_hot(truth, maps.shape[1])
    maps = resized(maps, truth.shape[-2:])
    known = torch.ones_like(known) if void else known
    present = y.flatten(2).any(dim=-1)  # b k
    number = present.sum().clamp(min=1)
    each = sigmoid_focal_loss(maps, y, alpha=0.25, gamma=2) * known  # b k H W
    p, y = ((share * known).flatten(2)[present] for share in (maps.sigmoid(), y))  # one row per picture and class
    overlap = (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)
    return (focal * each.flatten(2).mean(-1).sum() + dice * (1 - overlap).sum()) / number


def void_negative(maps: Tensor, truth: Tensor) -> Tensor:
    """`non_exclusive` as the authors' code has it, where void pixels are negatives of every class."""
    return non_exclusive(maps, truth, void=True)


def exclusive(maps: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy over classes: maps [b k i j], resized to truth [b H W]; 255 is left out. Without any other, 0."""
    return likelihood(resized(maps, truth.shape[-2:]).log_softmax(dim=1), truth)


def likelihood(shares: Tensor, truth: Tensor) -> Tensor:
    """-log of the share of what is true, mean over pixels: log shares [b k H W] and truth [b H W], as `exclusive`."""
    known = (truth != IGNORE).sum().clamp(min=1)
    return F.nll_loss(shares, truth.long(), ignore_index=IGNORE, reduction="sum") / known


def presence(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of whether each class is in a picture, sum over classes, mean over pictures.

    logits [b k]; truth [b H W], in which 255 says nothing.
    """
    there = _one_hot(truth, logits.shape[1])[0].amax(dim=(2, 3))
    return F.binary_cross_entropy_with_logits(logits, there, reduction="sum") / len(logits)


def presence_of_these(logits: Tensor, truth: Tensor) -> Tensor:
    """`presence` as MVP-SEG's paper writes it, where classes that are not in a picture have no part."""
    there = _one_hot(truth, logits.shape[1])[0].amax(dim=(2, 3))
    return -(there * F.logsigmoid(logits)).sum() / len(logits)


def overlap(vectors: Tensor) -> Tensor:
    """MVP-SEG's orthogonal constraint: the absolute cosines of vectors [v w] with one another, summed over pairs."""
    units = F.normalize(vectors, dim=-1)
    return (units @ units.T).triu(1).abs().sum()


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [b k i j] at the pixels of a size (H, W), [b k H W] float32."""
    return F.interpolate(maps.float(), tuple(size), mode="bilinear", align_corners=False)


def _one_hot(truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whether a pixel is of each class, [b k H W], and whether it is of any, [b 1 H W], as 0 and 1."""
    y = (truth[:, None] == torch.arange(classes, device=truth.device)[:, None, None]).float()
    return y, (truth != IGNORE)[:, None].float()
