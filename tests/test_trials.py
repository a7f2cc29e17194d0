"""Trials: every system and seed is trained once, kept under all that it is of, and scored over pictures and seeds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from sclip_lab import load_dataset
from sclip_lab.datasets import Dataset
from sclip_lab.splits import MEASURES, SPLITS, Split, measure, zero_shot
from sclip_lab.store import COUNTS
from sclip_lab.trials import Labeller, scores, trials, written

SPLIT, LABELS = SPLITS["scenes"], [0, 1, 5, 6, 17]


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return load_dataset("scenes-full", limit=5)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    return tmp_path


def guessing(share: float) -> Callable[[int], Labeller]:
    """A system that is wrong in so many blocks of a picture, other ones for every seed and picture."""
    truths = {image.tobytes(): truth for image, truth in map(load_dataset("scenes-full", limit=5).read, "01234")}

    def system(seed: int) -> Labeller:
        def label(image: np.ndarray) -> Tensor:
            truth = truths[image.tobytes()]
            rng = np.random.default_rng([seed, int(image.sum())])
            blocks = np.kron(rng.uniform(size=(16, 22)) < share, np.ones((10, 10), bool))[
                : len(truth), : truth.shape[1]
            ]
            return torch.from_numpy(np.where(blocks, rng.choice(LABELS), truth))

        return label

    return system


def untrained(seed: int) -> Labeller:
    raise AssertionError("this was measured before")


def by_trial(frame: pd.DataFrame, images: int) -> dict[tuple[str, int], np.ndarray]:
    groups = frame.groupby(["system", "seed"], sort=False)
    return {key: part[COUNTS].to_numpy().reshape(images, -1, 3) for key, part in groups}


def test_every_system_and_seed_is_measured_once_and_kept(scenes: Dataset) -> None:
    systems = {"good": guessing(0.1), "bad": guessing(0.5)}
    frame = trials(systems, scenes, SPLIT, (0, 7), "15_any")
    for (name, seed), table in by_trial(frame, 5).items():
        np.testing.assert_array_equal(table, measure(systems[name](seed), scenes, 20))
    assert list(frame["system"].unique()) == ["good", "bad"]
    again = trials(dict.fromkeys(systems, untrained), scenes, SPLIT, (0, 7), "15_any")
    pd.testing.assert_frame_equal(again, frame)
    fewer = trials({"bad": untrained}, replace(scenes, keys=scenes.keys[:2]), SPLIT, [7], "15_any")
    np.testing.assert_array_equal(by_trial(fewer, 2)["bad", 7], by_trial(frame, 5)["bad", 7][:2])


def test_what_was_measured_stays_when_a_later_training_fails(scenes: Dataset, results: Path) -> None:
    with pytest.raises(AssertionError, match="measured before"):
        trials({"good": guessing(0.1), "late": untrained}, scenes, SPLIT, [0], "15_any")
    assert [path.name for path in results.iterdir()] == ["15_any.parquet"]
    assert len(trials({"good": untrained}, scenes, SPLIT, [0], "15_any")) == 5 * 20


@pytest.mark.parametrize("other", ["split", "dataset", "more images", "seed", "system"])
def test_a_stored_number_is_not_taken_for_anothers(scenes: Dataset, other: str) -> None:
    trials({"good": guessing(0.1)}, replace(scenes, keys=scenes.keys[:4]), SPLIT, [0], "15_any")
    dataset = scenes if other == "more images" else replace(scenes, keys=scenes.keys[:4])
    dataset = replace(dataset, name="other") if other == "dataset" else dataset
    split = SPLITS["scenes-unseen-stuff"] if other == "split" else SPLIT
    name, seed = ("better", 0) if other == "system" else ("good", int(other == "seed"))
    with pytest.raises(AssertionError, match="measured before"):
        trials({name: untrained}, dataset, split, [seed], "15_any")


def test_nor_for_another_models(scenes: Dataset, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials({"good": guessing(0.1)}, scenes, SPLIT, [0], "15_any")
    before = (results / "15_any.parquet").read_bytes()
    monkeypatch.setenv("SCLIP_MODEL", "ViT-B-16:openai")
    frame = trials({"good": guessing(0.2)}, scenes, SPLIT, [0], "15_any")
    assert set(frame["model"]) == {"ViT-B-16:openai"}
    assert (results / "15_any.parquet").read_bytes() == before


def test_the_file_does_not_tell_in_how_many_sittings_it_was_made(scenes: Dataset, results: Path) -> None:
    systems = {"good": guessing(0.1), "bad": guessing(0.5)}
    trials(systems, scenes, SPLIT, (0, 1), "15_once")
    for name, seed in (("good", 1), ("bad", 1), ("good", 0), ("bad", 0)):
        trials({name: systems[name]}, scenes, SPLIT, [seed], "15_often")
    assert (results / "15_once.parquet").read_bytes() == (results / "15_often.parquet").read_bytes()


def test_a_file_that_is_no_table_is_named_in_one_line(scenes: Dataset, results: Path) -> None:
    (results / "15_any.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match=r"15_any\.parquet cannot be read .*move it away") as error:
        trials({"good": untrained}, scenes, SPLIT, store="15_any")
    assert "\n" not in str(error.value)


def test_with_one_seed_scores_are_those_of_the_split(scenes: Dataset) -> None:
    frame = trials({"good": guessing(0.1), "bad": guessing(0.5)}, scenes, SPLIT, [0])
    good, bad = by_trial(frame, 5).values()
    alone, paired = scores(frame, SPLIT), scores(frame, SPLIT, "bad")
    columns = ["value", "low", "high"]
    for found, expected in (
        (alone[:4], zero_shot(good, SPLIT)),
        (alone[4:], zero_shot(bad, SPLIT)),
        (paired, zero_shot(good, SPLIT, bad)),
    ):
        assert list(found["measure"]) == MEASURES
        np.testing.assert_allclose(found[columns], expected[columns])


def test_of_several_seeds_the_mean_is_scored_and_their_spread_is_in_the_interval(scenes: Dataset) -> None:
    systems: dict = {"steady": lambda seed: guessing(0.3)(0), "fickle": lambda seed: guessing(0.1 + 0.3 * seed)(0)}
    frame = trials(systems, scenes, SPLIT)
    table = scores(frame, SPLIT).set_index(["system", "measure"])
    own = [zero_shot(counts, SPLIT)["value"] for counts in by_trial(frame, 5).values()]
    once = zero_shot(by_trial(frame, 5)["steady", 0], SPLIT)
    np.testing.assert_allclose(table.loc["steady", ["value", "low", "high"]].astype(float), once)
    np.testing.assert_allclose(table.loc["fickle", "value"], sum(own[3:]) / 3)
    assert table.loc[("fickle", "harmonic"), "each"] == ", ".join(f"{each['harmonic']:.1f}" for each in own[3:])
    width = table["high"] - table["low"]
    assert width["fickle", "pixels"] > 2 * width["steady", "pixels"]


def test_a_system_of_one_seed_is_a_baseline_of_each_of_anothers(scenes: Dataset) -> None:
    bad = trials({"bad": guessing(0.5)}, scenes, SPLIT, [0])
    frame = pd.concat([bad, trials({"good": guessing(0.1)}, scenes, SPLIT)])
    alone, paired = (scores(frame, SPLIT, baseline).set_index(["system", "measure"]) for baseline in (None, "bad"))
    assert set(paired.index.get_level_values("system")) == {"good"}
    np.testing.assert_allclose(paired["value"], alone.loc["good", "value"] - alone.loc["bad", "value"])
    turned = scores(frame, SPLIT, "good").set_index("measure")
    np.testing.assert_allclose(turned["value"], -paired["value"])
    assert float(turned.loc["unseen", "each"]) == pytest.approx(turned.loc["unseen", "value"], abs=0.05)
    shown = written(paired.reset_index())
    row = paired.loc["good", "unseen"]
    assert shown.loc["good", "unseen"] == f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
    assert shown.loc["good", "images"] == 5


def test_what_cannot_be_compared_is_refused_in_one_line(scenes: Dataset) -> None:
    good = trials({"good": guessing(0.1)}, scenes, SPLIT, [0])
    bad = trials({"bad": guessing(0.5)}, replace(scenes, keys=scenes.keys[1:]), SPLIT, [0])
    with pytest.raises(ValueError, match="'bad' and 'good' are not of the same images"):
        scores(pd.concat([good, bad]), SPLIT)
    with pytest.raises(ValueError, match="baseline='best': expected one of good"):
        scores(good, SPLIT, "best")
    with pytest.raises(ValueError, match="expected those of Split"):
        scores(good, Split("scenes-full", 20, (1,)))
