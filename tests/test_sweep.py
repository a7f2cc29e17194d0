"""Sweeps against segmenting image by image, and against scikit-learn's confusion matrix."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from sclip_lab import Clip, Protocol, compare, encode, load, load_dataset, logits, repair, segment, summarise, sweep
from sclip_lab.datasets import BrokenImage, Dataset
from sclip_lab.images import pixels
from sclip_lab.later import repaired
from sclip_lab.protocol import stitch, windows
from sclip_lab.refine import Pamr
from sclip_lab.segment import scores
from sclip_lab.store import CELL, COUNTS
from sclip_lab.text import queries

LIMIT, PROTOCOL = 3, Protocol(96, 96, 48)
SETS = ("scenes-full", "scenes-background", "scenes-things")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny")


@pytest.fixture(scope="module")
def frame(clip: Clip) -> pd.DataFrame:
    return sweep(clip, SETS, ["csa", "identity"], PROTOCOL, ["full", "bare"], limit=LIMIT)


def _miou_by_hand(clip: Clip, name: str, attention: str, readout: str) -> float:
    dataset = load_dataset(name, limit=LIMIT)
    total: np.ndarray | int = 0
    for key in dataset.keys:
        image, truth = dataset.read(key)
        result = segment(image, dataset.classes, clip, attention, readout, PROTOCOL)
        seen = truth != 255
        total = total + confusion_matrix(truth[seen], result.labels[seen], labels=range(len(result.names)))
    hit, union = np.diag(total), total.sum(0) + total.sum(1) - np.diag(total)
    return 100 * float(np.mean(hit[union > 0] / union[union > 0]))


@pytest.mark.parametrize(
    ("name", "attention", "readout"),
    [(SETS[0], "csa", "full"), (SETS[1], "identity", "bare"), (SETS[2], "csa", "bare")],
)
def test_shared_trunks_and_vocabularies_give_the_same_as_one_at_a_time(
    clip: Clip, frame: pd.DataFrame, name: str, attention: str, readout: str
) -> None:
    table = summarise(frame).set_index(["dataset", "attention", "readout"])
    row = table.loc[(name, attention, readout)]
    assert row["miou"] == pytest.approx(_miou_by_hand(clip, name, attention, readout), abs=1e-9)
    assert row["images"] == LIMIT


def test_one_row_per_cell_image_and_class(frame: pd.DataFrame) -> None:
    assert not frame.duplicated([*CELL, "image", "class"]).any()
    assert len(frame) == 4 * LIMIT * (20 + 13 + 12)
    assert (frame["intersection"] <= frame[["predicted", "true"]].min(axis=1)).all()


def test_a_callable_is_an_attention(clip: Clip, frame: pd.DataFrame) -> None:
    def mine(site):
        return (site.scale * site.q @ site.q.mT).softmax(-1) + (site.scale * site.k @ site.k.mT).softmax(-1)

    own = summarise(sweep(clip, "scenes-full", mine, PROTOCOL, limit=LIMIT)).iloc[0]
    table = summarise(frame).set_index(["dataset", "attention", "readout"])
    assert (own["attention"], own["miou"]) == ("mine", table.loc[("scenes-full", "csa", "full"), "miou"])


def test_what_was_asked_comes_in_the_order_of_the_asking(clip: Clip) -> None:
    frame = sweep(clip, ["scenes-things", "scenes-full"], ["kk", "csa", "kk"], PROTOCOL, limit=2)
    assert list(frame["attention"].unique()) == ["kk", "csa"]
    assert list(frame["dataset"].unique()) == ["scenes-things", "scenes-full"]
    assert not frame.duplicated([*CELL, "image", "class"]).any()


def test_pictures_side_by_side_are_the_same_as_one_by_one_and_threads_are_given_back(clip: Clip) -> None:
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tables.append(sweep(clip, "scenes-full", ["csa", "random(n=2)"], PROTOCOL, ["full", "bare"], limit=5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    pd.testing.assert_frame_equal(*tables)


def test_a_failure_in_one_picture_is_the_sweeps(clip: Clip) -> None:
    def failing(site):
        raise ArithmeticError("in one of them")

    with pytest.raises(ArithmeticError, match="in one of them"):
        sweep(clip, "scenes-full", failing, PROTOCOL, limit=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of scenes, the second cut off, with the words and masks of the whole vocabulary."""
    full = load_dataset("scenes-full", limit=3)
    for sub in ("images", "masks"):
        (tmp_path / sub).mkdir()
    (tmp_path / "classes.txt").write_text("\n".join(full.classes))
    for key in full.keys:
        picture, truth = full.read(key)
        Image.fromarray(picture).save(tmp_path / "images" / f"{key}.png")
        Image.fromarray(truth).save(tmp_path / "masks" / f"{key}.png")
    broken = tmp_path / "images" / "1.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    return tmp_path


def test_a_broken_picture_is_named_and_left_out_unless_strict(clip: Clip, folder: Path) -> None:
    dataset = load_dataset(folder)
    with pytest.warns(UserWarning, match=r"pictures left out, 1 in all: .*1\.png"):
        frame = sweep(clip, dataset, ["csa", "kk"], PROTOCOL)
    assert set(frame["image"]) == {"0", "2"}
    whole = sweep(clip, "scenes-full", ["csa", "kk"], PROTOCOL, limit=3)
    rest = whole[whole["image"] != "1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(frame[COUNTS], rest[COUNTS])
    with pytest.warns(UserWarning, match="1 in all"), pytest.raises(BrokenImage, match=r"no picture is left .*1\.png"):
        sweep(clip, replace(dataset, keys=("1",)), "csa", PROTOCOL)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(BrokenImage, match=r"1\.png") as ended:
            sweep(clip, dataset, "csa", PROTOCOL, strict=True)
        assert torch.get_num_threads() == 2, ended  # while the error is still held
    finally:
        torch.set_num_threads(before)


def test_pictures_of_no_use_to_the_tower_are_named_and_left_out(clip: Clip) -> None:
    sizes = {"fit": (60, 80), "long": (1, 9000), "thin": (3000, 4)}

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((*sizes[key], 3), np.uint8), np.zeros(sizes[key], np.uint8)

    dataset = Dataset("odd", "odd", ("sky", "grass"), tuple(sizes), read)
    with pytest.warns(UserWarning, match="2 in all: picture 'long': .*elongated; picture 'thin' .* narrower than a p"):
        assert set(sweep(clip, dataset, "csa", PROTOCOL)["image"]) == {"fit"}
    with pytest.raises(ValueError, match=r"labels \[3, 4\] for an image \[60, 80, 3\] of picture 'fit'"):
        sweep(clip, replace(dataset, read=lambda key: (read(key)[0], np.zeros((3, 4), np.uint8))), "csa", PROTOCOL)


def test_one_name_stands_for_one_list_of_classes(clip: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    dataset = load_dataset("scenes-full", limit=1)
    turned = replace(dataset, classes=dataset.classes[::-1])
    longer = replace(dataset, classes=("|".join(dataset.classes[:2]), *dataset.classes[1:]))
    fewer = replace(dataset, classes=dataset.classes[:-1])
    for other in (turned, longer, fewer):
        with pytest.raises(ValueError, match="'scenes-full'"):
            sweep(clip, [dataset, other], "csa", PROTOCOL)
    sweep(clip, dataset, "csa", PROTOCOL, store="kept")
    with pytest.raises(ValueError, match="'scenes-full' is known with other classes"):
        sweep(clip, fewer, "csa", PROTOCOL, store="kept")


def test_nothing_goes_on_after_an_error(clip: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    monkeypatch.setattr("sclip_lab.store.EVERY", 0.0)
    (tmp_path / "full.pieces").write_text("a file where a folder would be")
    dataset, begun = load_dataset("scenes-full", limit=40), []
    watched = replace(dataset, read=lambda key: begun.append(key) or dataset.read(key))
    with pytest.raises(OSError, match="counts cannot be written") as ended:
        sweep(clip, watched, "csa", PROTOCOL, store="full")
    number = len(begun)
    time.sleep(0.5)
    assert number == len(begun) < 40, ended  # while the error is still held


def test_a_dataset_brings_its_own_protocol_unless_one_is_given(clip: Clip) -> None:
    own = replace(load_dataset("scenes-things", limit=1), protocol=Protocol(96, 0))
    frame = sweep(clip, [own, "scenes-full"], "csa", limit=1)
    found = frame.groupby("dataset", observed=True)["protocol"].unique()
    assert found["scenes-things"].tolist() == ["96/whole"]
    assert found["scenes-full"].tolist() == [str(Protocol.for_image_size(clip.image_size))]
    assert set(sweep(clip, [own, "scenes-full"], "csa", PROTOCOL, limit=1)["protocol"]) == {str(PROTOCOL)}


def test_refined_labels_are_those_of_segment_and_named_in_the_labelling(clip: Clip) -> None:
    pamr = Pamr(steps=3, dilations=(1, 2))
    frame = sweep(clip, "scenes-full", "csa", PROTOCOL, limit=2, refiners=[None, pamr])
    assert list(frame["labelling"].unique()) == ["40/0", "40/0+pamr(3/1,2)"]
    dataset = load_dataset("scenes-full", limit=2)
    for labelling, refine in zip(frame["labelling"].unique(), (None, pamr), strict=True):
        rows = frame[frame["labelling"] == labelling]
        for key in dataset.keys:
            image, truth = dataset.read(key)
            found = segment(image, dataset.classes, clip, "csa", protocol=PROTOCOL, refine=refine).labels
            assert rows.loc[rows["image"] == key, "intersection"].sum() == (found == truth).sum()
    refined, plain = (
        frame.loc[frame["labelling"] == name, "intersection"].sum() for name in ("40/0+pamr(3/1,2)", "40/0")
    )
    assert refined != plain


def test_a_repaired_trunk_is_read_in_sweep_segment_and_logits_and_has_a_name_of_its_own(clip: Clip) -> None:
    dataset, with_repair = load_dataset("scenes-full", limit=2), repaired(clip)
    words = queries(clip, dataset.classes)
    frame = pd.concat(sweep(model, dataset, "csa", PROTOCOL) for model in (clip, with_repair))
    assert list(frame["model"].unique()) == ["tiny", "tiny+repair"]
    for key in dataset.keys:
        image, truth = dataset.read(key)
        shown = pixels(torch.from_numpy(windows(image, PROTOCOL)), clip.mean, clip.std)
        by_hand = stitch(scores(repair(encode(clip.visual, shown)), words.vectors), PROTOCOL, image.shape[:2])
        found = logits(clip.visual, image, words.vectors, protocol=PROTOCOL, step=repair)
        torch.testing.assert_close(found, by_hand)
        labels = dataset.labelling(by_hand, words.query_class).numpy()
        assert (labels == segment(image, dataset.classes, with_repair, protocol=PROTOCOL).labels).all()
        assert (labels != segment(image, dataset.classes, clip, protocol=PROTOCOL).labels).any()
        rows = frame[(frame["model"] == "tiny+repair") & (frame["image"] == key)]
        assert rows["intersection"].sum() == (labels == truth).sum()
    gain = compare(frame, {"model": "tiny+repair"}, {"model": "tiny"})
    assert gain["difference"].item() != 0


def test_what_a_sweep_cannot_tell_apart_or_use_is_one_line(clip: Clip) -> None:
    two = [lambda site: site.q @ site.k.mT, lambda site: site.k @ site.q.mT]
    with pytest.raises(ValueError, match="two attentions are called '<lambda>'"):
        sweep(clip, "scenes-full", two, PROTOCOL, limit=1)
    with pytest.raises(ValueError, match=r"layers=\(-2, -1\): expected tuples, \(\(-2, -1\),\) for all at once"):
        sweep(clip, "scenes-full", "csa", PROTOCOL, layers=(-2, -1), limit=1)

    def nan(site):
        return torch.full_like(site.q @ site.k.mT, torch.nan)

    with pytest.raises(ValueError, match="attention nan makes NaN or infinite features of picture '0'"):
        sweep(clip, "scenes-full", nan, PROTOCOL, limit=1)


def test_one_layer_may_be_a_number(clip: Clip) -> None:
    one, tuples = (sweep(clip, "scenes-full", "csa", PROTOCOL, layers=layers, limit=1) for layers in (-1, [(-1,)]))
    pd.testing.assert_frame_equal(one, tuples)
