"""The registry of datasets."""

import numpy as np
import pytest

from sclip_lab import datasets, load_dataset
from sclip_lab.text import parse


@pytest.mark.parametrize("name", datasets())
def test_truth_indexes_the_classes_and_fits_the_image(name: str) -> None:
    dataset = load_dataset(name, limit=3)
    assert (dataset.name, len(dataset.keys)) == (name, 3)
    for key in dataset.keys:
        image, truth = dataset.read(key)
        assert (image.dtype, image.shape) == (np.uint8, (*truth.shape, 3))
        assert set(np.unique(truth)) - {255} <= set(range(len(parse(dataset.classes))))


def test_datasets_over_the_same_pictures_read_the_same_pictures() -> None:
    full, things = load_dataset("scenes-full", limit=2), load_dataset("scenes-things", limit=2)
    assert (full.pictures, full.keys) == (things.pictures, things.keys)
    assert np.array_equal(full.read("1")[0], things.read("1")[0])


@pytest.mark.parametrize(("arguments", "words"), [(("voc22",), "voc22"), (("scenes-full", None, 0), "limit=0")])
def test_bad_requests_are_one_line(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_dataset(*arguments)
    assert "\n" not in str(error.value)
