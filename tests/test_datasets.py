"""The registry of datasets."""

import numpy as np
import pytest

from sclip_lab import datasets, load_dataset, scenes, train_tiny
from sclip_lab.text import parse


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("name", datasets())
def test_truth_indexes_the_classes_and_fits_the_image(name: str, split: str) -> None:
    dataset = load_dataset(name, limit=3, split=split)
    expected = name if split == "val" else f"{name}-train"
    assert (dataset.name, dataset.split, len(dataset.keys)) == (expected, split, 3)
    for key in dataset.keys:
        image, truth = dataset.read(key)
        assert (image.dtype, image.shape) == (np.uint8, (*truth.shape, 3))
        assert set(np.unique(truth)) - {255} <= set(range(len(parse(dataset.classes))))


def test_datasets_over_the_same_pictures_read_the_same_pictures() -> None:
    full, things = load_dataset("scenes-full", limit=2), load_dataset("scenes-things", limit=2)
    assert (full.pictures, full.keys) == (things.pictures, things.keys)
    assert np.array_equal(full.read("1")[0], things.read("1")[0])


def test_the_training_split_has_the_seed_of_the_models_training_and_never_that_of_the_evaluation() -> None:
    val, train = (load_dataset("scenes-full", split=split) for split in ("val", "train"))
    assert len({val.pictures, train.pictures, "scenes-train"}) == 2
    for key in ("0", "63"):
        images, truths, _ = scenes.draw(1, train_tiny.SEED, (160, 213), start=int(key))
        image, truth = train.read(key)
        assert np.array_equal(image, images[0])
        assert np.array_equal(truth, truths[0])
        assert not np.array_equal(image, val.read(key)[0])


def test_a_picture_is_the_same_under_every_limit() -> None:
    few, many = (load_dataset("scenes-things", limit=limit, split="train") for limit in (2, 64))
    assert many.keys[:2] == few.keys
    assert np.array_equal(many.read(many.keys[1])[0], few.read(few.keys[1])[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("voc22",), "voc22"),
        (("scenes-full", None, 0), "limit=0"),
        (("scenes-full", None, None, "test"), "split='test' of 'scenes-full': expected one of val, train"),
    ],
)
def test_bad_requests_are_one_line(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_dataset(*arguments)
    assert "\n" not in str(error.value)
