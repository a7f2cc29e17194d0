"""What predicts mIoU: measures against loops over windows and patches, correlations against scipy."""

import copy
import dataclasses
import math
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pandas as pd
import pytest
import torch
from open_clip.timm_model import TimmModel
from scipy.stats import spearmanr
from test_towers import KINDS, shrunk

from sclip_lab import Clip, Protocol, encode, load, load_dataset
from sclip_lab.datasets import BrokenImage
from sclip_lab.images import pixels
from sclip_lab.predict import MEASURES, compare_measures, measures, rank_correlation
from sclip_lab.protocol import windows
from sclip_lab.store import Record, tidy

CORNERS = [(0, 0), (0, 48), (0, 96), (48, 0), (48, 48), (48, 96)]  # of the windows in 144 x 192
ATTENTIONS = ["vanilla", "borrow(layer=1, of='vanilla')", "qq", "kk", "borrow(layer=1, of='kk')", "identity", "vv"]


def halved(site):
    """q kᵀ, of rows that sum to a half."""
    return (site.scale * site.q @ site.k.mT).softmax(-1) / 2


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny", device="cpu")


def with_timms(clip: Clip, monkeypatch: pytest.MonkeyPatch, kind: str = "SigLIP") -> Clip:
    """The same with a small random tower of timm's, of 4 x 4 patches, and in SigLIP's no other token."""
    torch.manual_seed(0)
    shrunk(monkeypatch, kind)
    name, pool, _ = KINDS[kind]
    model = copy.deepcopy(clip.model)
    model.visual = TimmModel(name, clip.visual.output_dim, 32, pool=pool, proj="linear")
    return dataclasses.replace(clip, name=kind, model=model.eval().requires_grad_(False))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    return tmp_path


def by_hand(clip: Clip, image: np.ndarray, truth: np.ndarray, of: str) -> list[float]:
    """MEASURES of softmax(s q kᵀ) or softmax(s q qᵀ), window by window, patch by patch."""
    rows, cols = ((2 * np.arange(side) + 1) * own // (2 * side) for side, own in ((144, 160), (192, 213)))
    resized = truth[rows][:, cols]  # the pixel whose centre is nearest
    place = [(row, col) for row in range(12) for col in range(12)]
    found = []
    for (top, left), window in zip(CORNERS, windows(image, Protocol(144, 96, 48)), strict=True):
        site = encode(clip.visual, pixels(torch.from_numpy(window)[None], clip.mean, clip.std)).site()
        other = site.k if of == "k" else site.q
        map_ = sum((site.q[0, h] @ other[0, h].T / 8).softmax(-1) for h in range(3))[1:, 1:].double().numpy()
        map_ = map_ / map_.sum(axis=1, keepdims=True)
        tiles = resized[top : top + 96, left : left + 96].reshape(12, 8, 12, 8).swapaxes(1, 2).reshape(144, 64)
        labels = [np.bincount(tile).argmax() for tile in tiles]
        unit = map_ / np.linalg.norm(map_, axis=1, keepdims=True)
        labelled = [i for i in range(144) if labels[i] != 255]
        own = [sum(map_[i, j] for j in range(144) if labels[j] == labels[i]) for i in labelled]
        others = [sum(map_[i, j] for j in range(144) if labels[j] == labels[i] and j != i) for i in labelled]
        found.append([
            np.mean([unit[i] @ unit[j] for i in range(144) for j in range(144) if i != j]),
            np.mean([sum(map_[i, j] * math.dist(place[i], place[j]) for j in range(144)) for i in range(144)]),
            np.mean([-(row * np.log(row)).sum() for row in map_]),
            np.mean(own) if own else np.nan,
            np.mean(others) if own else np.nan,
        ])  # fmt: skip
    return np.nanmean(found, axis=0).tolist()


@pytest.mark.parametrize("vocabulary", ["full", "things"])
def test_measures_are_those_of_a_loop_over_windows_and_patches(clip: Clip, vocabulary: str) -> None:
    dataset = load_dataset(f"scenes-{vocabulary}", limit=2)
    table = measures(clip, dataset, [halved, "qq"]).set_index(["attention", "image"])
    assert list(table.index) == [("halved", "0"), ("halved", "1"), ("qq", "0"), ("qq", "1")]
    assert set(zip(table["model"], table["dataset"], table["protocol"], strict=True)) == {
        ("tiny", dataset.name, "144/96/48")
    }
    image, truth = dataset.read("1")
    for name, of in (("halved", "k"), ("qq", "q")):
        np.testing.assert_allclose(
            table.loc[(name, "1"), MEASURES].tolist(), by_hand(clip, image, truth, of), rtol=1e-4
        )


def test_looking_at_oneself_alone_is_no_attention_on_others(clip: Clip) -> None:
    found = measures(clip, load_dataset("scenes-full", limit=1), ["identity"], Protocol(96, 96, 48)).iloc[0]
    assert found[MEASURES].tolist() == [0, 0, 0, 1, 0]


def test_a_factor_does_not_count(clip: Clip) -> None:
    found = measures(clip, load_dataset("scenes-full", limit=1), ["csa", "blend"], Protocol(96, 96, 48))[MEASURES]
    np.testing.assert_allclose(found.iloc[0], found.iloc[1], rtol=1e-5)


def test_what_is_stored_is_not_measured_again(clip: Clip, folder: Path) -> None:
    dataset, small = load_dataset("scenes-full", limit=2), Protocol(96, 96, 48)
    whole = measures(clip, dataset, ["qq", "vanilla"], small, "whole")
    first = measures(clip, dataclasses.replace(dataset, keys=("1",)), ["vanilla"], small, "bits")
    reads = []

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        reads.append(key)
        return dataset.read(key)

    watched = dataclasses.replace(dataset, read=read)
    pd.testing.assert_frame_equal(measures(clip, watched, ["qq", "vanilla"], small, "bits"), whole)
    assert sorted(reads) == ["0", "1"]
    assert (folder / "bits.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    again = measures(clip, watched, ["vanilla()"], small, "bits")
    pd.testing.assert_frame_equal(again, whole[whole["attention"] == "vanilla"].reset_index(drop=True))
    pd.testing.assert_frame_equal(again[again["image"] == "1"].reset_index(drop=True), first)
    assert sorted(reads) == ["0", "1"]


def test_what_was_measured_before_an_interruption_is_kept(clip: Clip, folder: Path) -> None:
    dataset, small = load_dataset("scenes-full", limit=3), Protocol(96, 96, 48)
    whole = measures(clip, dataset, ["qq"], small, "whole")

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        if key == "2":
            raise KeyboardInterrupt
        return dataset.read(key)

    with pytest.raises(KeyboardInterrupt):
        measures(clip, dataclasses.replace(dataset, read=read), ["qq"], small, "bits")
    kept = pd.read_parquet(folder / "bits.parquet")
    pd.testing.assert_frame_equal(kept, whole[whole["image"] != "2"])
    rest = dataclasses.replace(dataset, read={"2": dataset.read("2")}.__getitem__)
    pd.testing.assert_frame_equal(measures(clip, rest, ["qq"], small, "bits"), whole)


def test_the_file_is_written_while_pictures_wait(clip: Clip, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sclip_lab.predict.EVERY", 0)
    dataset, path, stored = load_dataset("scenes-full", limit=3), folder / "bits.parquet", []

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        deadline = monotonic() + 10
        while key == "2" and not path.is_file() and monotonic() < deadline:
            sleep(0.01)
        stored.append(path.is_file())
        return dataset.read(key)

    measures(clip, dataclasses.replace(dataset, read=read), ["qq"], Protocol(96, 96, 48), "bits")
    assert stored[0] is False
    assert stored[-1] is True


def test_a_broken_picture_is_left_out_by_name(clip: Clip) -> None:
    dataset, small = load_dataset("scenes-full", limit=2), Protocol(96, 96, 48)

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        if key == "0":
            raise BrokenImage("0.jpg is cut off")
        return dataset.read(key)

    with pytest.warns(UserWarning, match="picture left out: 0.jpg is cut off"):
        found = measures(clip, dataclasses.replace(dataset, read=read), ["qq"], small)
    assert list(found["image"]) == ["1"]


def test_another_file_is_one_line(clip: Clip, folder: Path) -> None:
    pd.DataFrame({"image": ["0"]}).to_parquet(folder / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine.parquet cannot be read .* move it away to measure anew$") as error:
        measures(clip, load_dataset("scenes-full", limit=1), ["qq"], store="mine")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def counts() -> dict[str, np.ndarray]:
    """[images classes 3] of attentions that differ little, by the scatter of images."""
    generator, found = np.random.default_rng(0), {}
    for quality, name in enumerate(ATTENTIONS):
        true = generator.integers(50, 100, (12, 2))
        hit = (true * np.clip(0.3 + 0.05 * quality + generator.normal(0, 0.3, (12, 2)), 0, 1)).astype(int)
        found[name] = np.stack([hit, true + 10, true], axis=-1)
    return found


@pytest.fixture(scope="module")
def frame(counts: dict[str, np.ndarray]) -> pd.DataFrame:
    records: list[Record] = [
        (("tiny", "scenes", "p", "l", name, "full", "-1", str(image)), ["a", "b"], table[image])
        for name, table in counts.items()
        for image in range(12)
    ]
    return tidy(records)


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    generator, rows = np.random.default_rng(1), []
    for place, name in enumerate(ATTENTIONS):
        for image in range(12):
            noise = generator.normal(0, 1, 3)
            rows.append((name, str(image), -place + noise[0], (place - 3) ** 2 + noise[1], noise[2], place, -place))
    return pd.DataFrame(rows, columns=["attention", "image", *MEASURES])


def miou(table: np.ndarray) -> float:
    hit, predicted, true = table.sum(axis=0).T
    return np.mean(hit / (predicted + true - hit))


@pytest.fixture(scope="module")
def drawn(counts: dict[str, np.ndarray], measured: pd.DataFrame) -> np.ndarray:
    """rho of each measure [times measures], one resampling after another."""
    tables = [measured[measured["attention"] == name].set_index("image")[MEASURES] for name in counts]
    values = np.stack([table.loc[list(map(str, range(12)))].to_numpy() for table in tables])  # a images measures
    generator, found = np.random.default_rng(5), []
    for _ in range(1000):
        chosen = generator.integers(12, size=12)
        mious = [miou(table[chosen]) for table in counts.values()]
        found.append([spearmanr(mious, column).statistic for column in values[:, chosen].mean(axis=1).T])
    return np.array(found)


def of_all(counts: dict[str, np.ndarray], measured: pd.DataFrame, measure: str, without: tuple[str, ...] = ()) -> float:
    names = [name for name in counts if name not in without]
    mious = [miou(counts[name]) for name in names]
    return spearmanr(mious, measured.groupby("attention")[measure].mean()[names]).statistic


def test_rank_correlation_is_scipys(frame, counts, measured, drawn) -> None:
    table = rank_correlation(frame, measured).set_index("measure")
    assert list(table.index) == MEASURES
    assert set(table["points"]) == {7}
    assert set(table["images"]) == {12}
    for column, measure in enumerate(MEASURES):
        np.testing.assert_allclose(table["rho"][measure], of_all(counts, measured, measure), atol=1e-12)
        ends = np.quantile(drawn[:, column], [0.025, 0.975])
        np.testing.assert_allclose([table["low"][measure], table["high"][measure]], ends, atol=0.08)
    assert table["rho"]["others"] == -table["rho"]["alignment"]
    assert (table["low"] < table["high"]).all()


def test_variants_are_left_out_with_all_their_layers(frame, counts, measured) -> None:
    families = (ATTENTIONS[:2], ["qq"], ["kk", "borrow(layer=1, of='kk')"], ["identity"], ["vv"])
    table = rank_correlation(frame, measured).set_index("measure")
    for measure in MEASURES:
        rhos = [of_all(counts, measured, measure, tuple(family)) for family in families]
        np.testing.assert_allclose(table.loc[measure, ["least", "most"]].tolist(), [min(rhos), max(rhos)], atol=1e-12)


def test_a_measure_that_is_miou_of_every_image_is_so_of_every_resampling(frame, measured) -> None:
    hit = np.random.default_rng(2).integers(0, 10**6, len(frame))
    like = frame.assign(intersection=hit, predicted=10**6 + hit, true=10**6)  # unions of one size: IoUs average
    own = like.groupby(["attention", "image"], observed=True)["intersection"].mean()
    pairs = zip(measured["attention"], measured["image"], strict=True)
    perfect = measured.assign(invariance=[own[pair] for pair in pairs])
    perfect["entropy"] = -perfect["invariance"]
    table = rank_correlation(like, perfect).set_index("measure")[["rho", "low", "high"]]
    np.testing.assert_allclose(table.loc["invariance"], 1)
    np.testing.assert_allclose(table.loc["entropy"], -1)


def test_measures_are_compared_on_the_same_resampled_images(frame, counts, measured, drawn) -> None:
    found = compare_measures(frame, measured, "alignment", "invariance").iloc[0]
    sizes = [abs(of_all(counts, measured, measure)) for measure in ("alignment", "invariance")]
    assert found["difference"] == pytest.approx(sizes[0] - sizes[1])
    ends = np.quantile(np.abs(drawn[:, 3]) - np.abs(drawn[:, 0]), [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], ends, atol=0.08)
    opposite = compare_measures(frame, measured, "alignment", "others").iloc[0]
    assert opposite[["difference", "low", "high"]].tolist() == [0, 0, 0]


def test_read_outs_are_correlated_apart(frame, measured) -> None:
    worse = frame.assign(readout="bare", intersection=frame["true"].max() - frame["intersection"])
    both = pd.concat([frame.astype({"readout": str}), worse]).astype({"readout": "category"})
    table = rank_correlation(both, measured)
    assert list(table["readout"].unique()) == ["full", "bare"]
    alone = rank_correlation(frame, measured)
    pd.testing.assert_frame_equal(
        table[table["readout"] == "full"].drop(columns="readout"), alone.drop(columns="readout")
    )
    assert table["rho"].iloc[0] * table["rho"].iloc[5] < 0


@pytest.mark.parametrize("column", ["image", "attention"])
def test_measures_of_other_images_or_attentions_are_refused(frame, measured, column: str) -> None:
    fewer = measured[measured[column] != measured[column].iloc[0]]
    with pytest.raises(ValueError, match="mIoU of 7 attentions on 12 images: expected measures of all of them"):
        rank_correlation(frame, fewer)
    with pytest.raises(ValueError, match="mIoU of 7 attentions on 12 images"):
        rank_correlation(frame[(frame["image"] != "0") | (frame["attention"] != "qq")], measured)


def test_maps_of_a_tower_without_cls_are_of_patches_throughout(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(site):
        return torch.zeros_like(site.q @ site.k.mT).softmax(-1)

    dataset = load_dataset("scenes-full", limit=1)
    found = measures(with_timms(clip, monkeypatch), dataset, ["identity", uniform], Protocol(48, 32, 16))
    found = found.set_index("attention")
    assert found.loc["identity", MEASURES[1:]].tolist() == [0, 0, 1, 0]  # a patch looks at itself alone
    assert found.loc["uniform", "invariance"] == pytest.approx(1)
    assert found.loc["uniform", "entropy"] == pytest.approx(math.log(16))
