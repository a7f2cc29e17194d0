"""Losses of maps against the same, pixel by pixel, in which void pixels, unseen ones among them, have no part."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sclip_lab.losses import Loss, exclusive, non_exclusive, void_negative
from sclip_lab.splits import SPLITS

SPLIT = SPLITS["scenes"]


def slow_loss(maps: Tensor, truth: Tensor, void: bool) -> float:
    """Focal and dice, pixel by pixel in Python: maps [b k H W], truth [b H W]."""
    focal, dice, present = 0.0, 0.0, 0
    for image in range(maps.shape[0]):
        labels = truth[image].flatten().tolist()
        for k in range(maps.shape[1]):
            total, overlap, mass, area = 0.0, 0.0, 0.0, 0
            for logit, true in zip(maps[image, k].flatten().tolist(), labels, strict=True):
                if true == 255 and not void:
                    continue
                p = 1 / (1 + math.exp(-logit))
                right = p if true == k else 1 - p
                total -= (0.25 if true == k else 0.75) * (1 - right) ** 2 * math.log(right)
                overlap, mass, area = overlap + p * (true == k), mass + p, area + (true == k)
            focal += total / len(labels)
            if area:
                present += 1
                dice += 1 - (2 * overlap + 1) / (mass + area + 1)
    return (100 * focal + dice) / max(present, 1)


@pytest.mark.parametrize("void", [False, True])
def test_the_loss_is_the_one_computed_by_hand(void: bool) -> None:
    torch.manual_seed(0)
    maps, truth = torch.randn(2, 4, 6, 5), torch.randint(0, 5, (2, 6, 5))
    truth[truth == 4] = 255
    truth[1][truth[1] == 2] = 0  # absent from one picture
    ours = non_exclusive(maps, truth.to(torch.uint8), void=void)
    assert ours.item() == pytest.approx(slow_loss(maps, truth, void), rel=1e-5)


def test_the_exclusive_loss_is_the_one_computed_by_hand() -> None:
    maps, truth = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 2], [255, 1]]])
    flat = maps[0].flatten(1).T  # pixel k
    expected = sum(math.log(flat[i].exp().sum()) - flat[i, k].item() for i, k in ((0, 0), (1, 2), (3, 1))) / 3
    assert exclusive(maps, truth).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [non_exclusive, exclusive])
def test_pictures_without_a_seen_pixel_have_no_loss(loss: Loss) -> None:
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(maps, torch.full((2, 4, 4), 255))
    value.backward()
    assert value.item() == 0
    assert not maps.grad.any()


@pytest.mark.parametrize("loss", [non_exclusive, exclusive])
def test_no_pixel_of_an_unseen_class_reaches_an_inductive_loss(loss: Loss) -> None:
    labels = np.random.RandomState(0).randint(0, 20, (2, 12, 12)).astype(np.uint8)
    truth = torch.from_numpy(SPLIT.inductive(labels))
    maps = torch.randn(2, 15, 12, 12, requires_grad=True)
    loss(maps, truth).backward()
    unseen = torch.from_numpy(np.isin(labels, SPLIT.unseen))
    assert unseen.any()
    assert not maps.grad.movedim(1, -1)[unseen].any()
    assert maps.grad.movedim(1, -1)[~unseen].all()


def test_the_authors_loss_takes_unseen_pixels_for_negatives() -> None:
    maps, truth = torch.randn(1, 3, 4, 4, requires_grad=True), torch.full((1, 4, 4), 255)
    void_negative(maps, truth).backward()
    assert (maps.grad > 0).all()
