"""Seen and unseen classes: which they are, what training may know of their pixels, and how systems are scored."""

import numpy as np
import pandas as pd
import pytest
import torch

from sclip_lab import load_dataset, scenes
from sclip_lab.files import home
from sclip_lab.metrics import counts
from sclip_lab.splits import HIDDEN, SPLITS, Split, measure, score, zero_shot

THREE = Split("any", 3, (1,))

# The literature's unseen classes, by their names in the datasets' own spelling, against the labels in SPLITS.
UNSEEN = {
    "voc20": ["pottedplant", "sheep", "sofa", "train", "television monitor"],
    "coco-stuff": [
        "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard", "clouds", "grass",
        "playingfield", "river", "road", "tree", "wall-concrete",
    ],
    "context60": [
        "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "seen"), [("voc20", 15), ("coco-stuff", 156), ("context60", 50)])
def test_splits_of_benchmarks_are_those_of_the_literature(name: str, seen: int) -> None:
    split = SPLITS[name]
    words = (home() / "data" / "vocabularies" / f"{name}.txt").read_text().splitlines()
    assert [words[label].split("|")[0] for label in split.unseen] == UNSEEN[name]
    assert (split.dataset, split.classes, len(split.seen)) == (name, len(words), seen)
    assert sorted(split.seen + split.unseen) == list(range(split.classes))


def test_splits_of_scenes_hold_out_things_and_stuff() -> None:
    unseen = {name: {scenes.NAMES[label] for label in SPLITS[name].unseen} for name in SPLITS if "scenes" in name}
    assert unseen["scenes-unseen-things"] < set(scenes.THINGS)
    assert unseen["scenes-unseen-stuff"] < set(scenes.STUFF)
    assert unseen["scenes"] & set(scenes.THINGS)
    assert unseen["scenes"] & set(scenes.STUFF)


def test_every_split_of_scenes_shows_all_its_classes_in_both_splits_of_pictures() -> None:
    for part in ("train", "val"):
        dataset = load_dataset("scenes-full", split=part, limit=150)
        shown = set(np.unique(np.concatenate([dataset.read(key)[1].ravel() for key in dataset.keys])))
        assert shown == set(range(SPLITS["scenes"].classes))


def test_inductive_labels_tell_nothing_of_unseen_pixels() -> None:
    truth = np.array([[0, 1, 2, 255]], np.uint8)
    assert THREE.inductive(truth).tolist() == [[0, 255, 1, 255]]
    relabelled = np.array([[0, 255, 2, 1]], np.uint8)
    assert np.array_equal(THREE.inductive(truth), THREE.inductive(relabelled))


def test_transductive_labels_tell_unseen_pixels_from_void_but_not_from_each_other() -> None:
    truth = np.array([0, 1, 2, 3, 255], np.uint8)
    assert Split("any", 4, (1, 3)).transductive(truth).tolist() == [0, HIDDEN, 2, HIDDEN, 255]


@pytest.mark.parametrize("unseen", [(), (0, 1, 2), (1, 1), (3,), (-1,)])
def test_a_split_that_is_none_is_refused_in_one_line(unseen: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"of 3 classes: expected some of their labels") as error:
        Split("any", 3, unseen)
    assert "\n" not in str(error.value)


def by_hand(maps: list[np.ndarray], truths: list[np.ndarray]) -> list[float]:
    """Pixel accuracy, mIoU of classes 0 and 2, of class 1, and their harmonic mean, pixel by pixel."""
    pairs = [(p, t) for map_, truth in zip(maps, truths, strict=True) for p, t in zip(map_, truth, strict=True)]
    pairs = [(p, t) for p, t in pairs if t != 255]
    iou = [sum(p == t == k for p, t in pairs) / sum(k in (p, t) for p, t in pairs) for k in range(3)]
    seen, unseen = (iou[0] + iou[2]) / 2, iou[1]
    return [sum(p == t for p, t in pairs) / len(pairs), seen, unseen, 2 * seen * unseen / (seen + unseen)]


def test_scores_are_those_counted_by_hand() -> None:
    rng = np.random.RandomState(0)
    maps, truths = rng.randint(0, 3, (4, 50)), rng.choice([0, 1, 2, 255], (4, 50))
    table = np.stack([counts(map_, truth, 3) for map_, truth in zip(maps, truths, strict=True)])
    np.testing.assert_allclose(score(table.sum(axis=0), THREE), by_hand(maps, truths))
    np.testing.assert_allclose(zero_shot(table, THREE)["value"], 100 * np.array(by_hand(maps, truths)))


def test_a_system_that_never_says_an_unseen_name_has_no_harmonic_mean() -> None:
    assert score(np.array([[5, 5, 5], [0, 0, 5], [5, 10, 5]]), THREE).tolist() == [10 / 15, 0.75, 0.0, 0.0]


def test_resamples_without_an_unseen_class_leave_an_interval() -> None:
    table = np.zeros((4, 3, 3), int)
    table[:, [0, 2]] = (3, 5, 5)
    table[0, 1] = (4, 5, 5)  # nearly a third of all resamples are without this picture
    found = zero_shot(table, THREE)
    assert found.notna().all(axis=None)
    assert found.loc["unseen"].tolist() == pytest.approx([100 * 4 / 6] * 3)


def test_intervals_hold_the_value_and_paired_ones_are_narrower() -> None:
    rng = np.random.RandomState(0)
    truths = rng.randint(0, 3, (40, 400))
    weak = np.where(rng.uniform(size=truths.shape) < rng.uniform(0.2, 0.9, (40, 1)), truths, 0)  # pictures differ
    strong = np.where(rng.uniform(size=truths.shape) < 0.2, truths, weak)
    a, b = (np.stack([counts(p, t, 3) for p, t in zip(maps, truths, strict=True)]) for maps in (strong, weak))
    alone, paired = zero_shot(a, THREE), zero_shot(a, THREE, b)
    assert ((alone["low"] < alone["value"]) & (alone["value"] < alone["high"])).all()
    pd.testing.assert_series_equal(paired["value"], alone["value"] - zero_shot(b, THREE)["value"])
    assert (paired["low"] > 0).all()
    width = alone["high"] - alone["low"]
    assert ((paired["high"] - paired["low"]) < width).all()
    with pytest.raises(ValueError, match="expected those of the same images"):
        zero_shot(a, THREE, b[1:])


def test_measure_counts_every_picture_in_its_order() -> None:
    dataset = load_dataset("scenes-full", limit=3)
    table = measure(lambda image: torch.full(image.shape[:2], 4), dataset, 20)
    truths = [dataset.read(key)[1] for key in dataset.keys]
    np.testing.assert_array_equal(table, [counts(np.full_like(truth, 4), truth, 20) for truth in truths])
