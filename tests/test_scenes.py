"""The bundled world: the same everywhere, and captions that say what the label maps hold."""

from pathlib import Path

import numpy as np
import pytest

from sclip_lab import scenes, train_tiny
from sclip_lab.datasets import HELD_OUT
from sclip_lab.text import parse

STORED = Path(__file__).parent / "reference" / "scenes.npz"


@pytest.mark.parametrize(("prefix", "n", "seed", "size"), [("", 6, 5, (96, 96)), ("large_", 2, 6, (120, 161))])
def test_pictures_are_those_stored(prefix: str, n: int, seed: int, size: tuple[int, int]) -> None:
    images, labels, _ = scenes.draw(n, seed, size)
    with np.load(STORED) as stored:
        same = labels == stored[prefix + "labels"]
        apart = np.abs(images.astype(int) - stored[prefix + "images"])[same]
    assert (~same).mean() < 5e-4  # a handful of border pixels
    assert apart.max() <= 1


def test_captions_are_those_stored() -> None:
    with np.load(STORED) as stored:
        assert scenes.draw(6, 5)[2] == stored["captions"].tolist()


def test_a_picture_depends_on_its_seed_and_number_alone() -> None:
    for all_, part in zip(scenes.draw(5, 3), scenes.draw(2, 3, start=3), strict=True):
        assert np.array_equal(all_[3:], part)
    assert not np.array_equal(scenes.draw(1, 3)[0], scenes.draw(1, 4)[0])


def test_captions_name_what_shows_and_nothing_else() -> None:
    _, labels, captions = scenes.draw(60, 11)
    for label_map, caption in zip(labels, captions, strict=True):
        found = {
            scenes.NAMES[value]
            for value, pixels in zip(*np.unique(label_map, return_counts=True), strict=True)
            if pixels >= 30
        }
        assert set(caption.replace(" on ", " and ").split(" and ")) == found


def test_every_class_occurs_and_no_stuff_hides_the_others() -> None:
    _, labels, _ = scenes.draw(300, 12)
    share = np.bincount(labels.ravel(), minlength=len(scenes.NAMES)) / labels.size
    assert len(share) == len(scenes.NAMES)
    assert share[: len(scenes.STUFF)].min() > 0.04
    assert share[len(scenes.STUFF) :].min() > 0.004


def test_vocabularies_index_the_classes_they_parse_to() -> None:
    labels = np.arange(len(scenes.NAMES))
    for vocabulary, classes in scenes.VOCABULARIES.items():
        words = list(parse(classes).values())
        for name, index in zip(scenes.NAMES, scenes.vocabulary_labels(labels, vocabulary), strict=True):
            if vocabulary == "things" and name in scenes.STUFF:
                assert index == 255
            else:
                assert name in words[index]


def test_held_out_pictures_are_not_trained_on() -> None:
    assert HELD_OUT != train_tiny.SEED


@pytest.mark.parametrize("arguments", [(0, 1), (1, 1, (8, 96))])
def test_nothing_to_draw_is_one_line(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="at least one picture of at least 16x16") as error:
        scenes.draw(*arguments)
    assert "\n" not in str(error.value)
