"""Pictures to learn from: what a crop holds, and what it may depend on."""

import dataclasses

import numpy as np
import pytest
from torch.utils.data import DataLoader

from sclip_lab import load_dataset
from sclip_lab.crops import Crops, photometric
from sclip_lab.datasets import Dataset
from sclip_lab.splits import SPLITS

SPLIT = SPLITS["scenes"]


def coded(labels: np.ndarray) -> Dataset:
    """One training picture whose red is its label, so that image and truth can be compared."""
    image = np.stack([labels, labels * 0, labels * 0], axis=-1).astype(np.uint8)
    return Dataset("coded-train", "coded-train", ("a", "b"), ("0",), lambda _: (image, labels), split="train")


def same(truth: np.ndarray) -> np.ndarray:
    return truth


def test_image_and_truth_are_cut_mirrored_and_resized_alike() -> None:
    blocks = np.random.RandomState(0).randint(0, 200, (6, 9)).astype(np.uint8)
    crops = Crops(coded(np.kron(blocks, np.ones((20, 20), np.uint8))), same, short_side=120, crop=64, scales=(0.7, 1.5))
    for index in range(20):
        image, truth = crops[index]
        assert (image.shape, truth.shape) == ((64, 64, 3), (64, 64))
        inner = (truth == np.roll(truth, 2, 0)) & (truth == np.roll(truth, -2, 0))
        inner &= (truth == np.roll(truth, 2, 1)) & (truth == np.roll(truth, -2, 1))
        assert inner.mean() > 0.4
        assert np.array_equal(image[inner][:, 0], truth[inner])


def test_a_crop_depends_on_seed_and_number_alone() -> None:
    dataset = load_dataset("scenes-full", split="train", limit=5)
    first, again, other = (Crops(dataset, SPLIT.inductive, 144, 96, seed=seed) for seed in (1, 1, 2))
    for index in (7, 0, 7):
        assert all(np.array_equal(a, b) for a, b in zip(first[index], again[index], strict=True))
    assert any(not np.array_equal(first[index][1], other[index][1]) for index in range(3))
    assert not np.array_equal(first[0][0], first[5][0])


def test_processes_that_read_ahead_make_the_same_crops() -> None:
    crops = Crops(load_dataset("scenes-full", split="train", limit=5), SPLIT.inductive, 144, 96, distort=photometric)
    here = [crops[index] for index in range(4)]  # after which it keeps pictures
    there = DataLoader(crops, batch_size=None, sampler=range(4), num_workers=1, multiprocessing_context="spawn")
    for (image, truth), (read_image, read_truth) in zip(here, there, strict=True):
        assert np.array_equal(image, read_image)
        assert np.array_equal(truth, read_truth)


def test_every_picture_is_read_once_before_any_is_read_again() -> None:
    read, dataset = [], load_dataset("scenes-full", split="train", limit=7)
    watched = dataclasses.replace(
        dataset, keys=tuple(map(str, range(600))), read=lambda key: read.append(key) or dataset.read("0")
    )
    crops = Crops(watched, SPLIT.inductive, 48, 32)
    for index in range(1200):
        if index in (0, 1, 2, 598, 599, 600, 601):
            crops[index]
    orders = [np.random.RandomState([0, epoch]).permutation(600)[:3] for epoch in (0, 1)]
    assert read[:3] == [str(key) for key in orders[0]]
    assert read[5:] == [str(key) for key in orders[1][:2]]


def test_what_is_too_small_is_padded_by_mean_grey_and_void() -> None:
    image, truth = Crops(coded(np.full((50, 50), 7, np.uint8)), same, short_side=40, crop=64, scales=(1, 1))[0]
    assert (truth == 7).sum() == 40 * 40
    assert np.unique(image[truth == 255], axis=0).tolist() == [[123, 117, 104]]


def test_padding_is_grey_whatever_is_done_to_colours() -> None:
    labels = coded(np.full((50, 50), 7, np.uint8))
    crops = Crops(labels, same, short_side=40, crop=64, scales=(1, 1), distort=lambda rng, image: image // 2)
    image, truth = crops[0]
    assert np.unique(image[truth == 255], axis=0).tolist() == [[123, 117, 104]]
    assert (truth[:40, :40] == 7).all()


def test_crops_avoid_places_that_one_class_fills() -> None:
    labels = np.zeros((100, 1000), np.uint8)
    labels[:, :100] = 1
    crops = Crops(coded(labels), same, short_side=100, crop=80, scales=(1, 1))
    mixed = np.mean([0 < crops[index][1].mean() < 1 for index in range(100)])
    anywhere = 100 / (1000 - 80 + 1)
    assert mixed > 2 * anywhere


@pytest.mark.parametrize("other", [6, 7, 17, 18, 19, 255])
def test_relabelled_unseen_pixels_change_no_crop(other: int) -> None:
    dataset = load_dataset("scenes-full", split="train", limit=3)

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        image, truth = dataset.read(key)
        return image, np.where(np.isin(truth, SPLIT.unseen), other, truth).astype(np.uint8)

    plain, changed = (
        Crops(one, SPLIT.inductive, 144, 96) for one in (dataset, dataclasses.replace(dataset, read=read))
    )
    for index in range(12):
        assert all(np.array_equal(a, b) for a, b in zip(plain[index], changed[index], strict=True))


def test_pictures_for_evaluation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'scenes-full' is for evaluation: expected load_dataset\(..., split='train'"):
        Crops(load_dataset("scenes-full", limit=1), SPLIT.inductive)


def test_distortion_of_colours_keeps_shape_and_some_pictures_whole() -> None:
    image = load_dataset("scenes-full", split="train", limit=1).read("0")[0]
    seen = [photometric(np.random.RandomState(seed), image) for seed in range(64)]
    apart = np.array([np.abs(one.astype(int) - image).mean() for one in seen])
    assert {(one.shape, one.dtype) for one in seen} == {(image.shape, image.dtype)}
    assert (apart < 3).any()  # nothing was drawn: but for the rounding of colour spaces it is the same
    assert (apart > 10).mean() > 0.5
