"""The learned projection: what it learns from, what it leaves alone, and the file it ends in."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_predict import with_timms

from sclip_lab import Clip, Protocol, attention, dense, load, load_dataset
from sclip_lab.datasets import BrokenImage
from sclip_lab.fit import Fit, Projection, curve, fit
from sclip_lab.images import MEAN, STD
from sclip_lab.segment import trunk_of
from sclip_lab.text import queries

ALL = 10_000  # more windows than there are


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def fitted(clip: Clip) -> Fit:
    return fit(clip, load_dataset("scenes-full", split="train"), samples=3, steps=12, batch=ALL, seed=5)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    return tmp_path


def test_the_loss_falls(fitted: Fit) -> None:
    assert fitted.losses.shape == (12,)
    assert fitted.losses[-1] < 0.95 * fitted.losses[0]
    assert (np.diff(fitted.losses) < 0).mean() > 0.8


@pytest.mark.parametrize("vocabulary", ["full", "things", "background"])
def test_the_first_loss_is_the_cross_entropy_of_qq_computed_by_hand(clip: Clip, vocabulary: str) -> None:
    dataset = load_dataset(f"scenes-{vocabulary}", split="train", limit=2)
    words = queries(clip, dataset.classes)
    best, targets = [], []
    for key in dataset.keys:
        image, truth = dataset.read(key)
        trunk = trunk_of(clip.visual, image, Protocol(144, 96, 48), MEAN, STD)
        patches = F.normalize(dense(trunk, "qq")[:, 1:], dim=-1)  # 6 144 e
        for k in range(len(words.names)):
            cosines = [
                patches @ vector for vector, own in zip(words.vectors, words.query_class, strict=True) if own == k
            ]
            best.append(torch.stack(cosines).max(0).values)  # 6 144
        rows, cols = ((2 * np.arange(side) + 1) * own // (2 * side) for side, own in ((144, 160), (192, 213)))
        resized = truth[rows][:, cols]  # the pixel whose centre is nearest
        for top, left in ((0, 0), (0, 48), (0, 96), (48, 0), (48, 48), (48, 96)):
            tiles = resized[top : top + 96, left : left + 96].reshape(12, 8, 12, 8).swapaxes(1, 2).reshape(144, 64)
            targets.append([np.bincount(tile).argmax() for tile in tiles])
    scores = torch.stack(best).unflatten(0, (2, -1)).movedim(1, -1).flatten(0, 2)  # 2*6*144 k
    target = torch.tensor(np.array(targets)).flatten()
    seen = target != 255
    expected = -(40 * scores[seen]).log_softmax(-1)[torch.arange(int(seen.sum())), target[seen]].mean()
    loss = fit(clip, dataset, samples=2, steps=1, batch=ALL).losses[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_only_the_projection_learns(clip: Clip) -> None:
    before = {name: p.clone() for name, p in clip.model.named_parameters()}
    learned = fit(clip, load_dataset("scenes-full", split="train"), samples=1, steps=2).projection
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in clip.model.named_parameters())
    q = before["visual.transformer.resblocks.5.attn.in_proj_weight"][:192]
    assert not torch.equal(learned.weight, q)
    assert not any(p.requires_grad for p in learned.parameters())


def test_the_seed_decides(clip: Clip) -> None:
    dataset = load_dataset("scenes-full", split="train", limit=2)
    first, again, other = (fit(clip, dataset, samples=2, steps=3, batch=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.projection.weight, again.projection.weight)
    assert np.array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)


def test_how_many_pictures_are_loaded_does_not_matter(clip: Clip, fitted: Fit) -> None:
    few = fit(clip, load_dataset("scenes-full", split="train", limit=3), samples=3, steps=2, batch=ALL, seed=5)
    assert np.array_equal(few.losses, fitted.losses[:2])


def test_pictures_without_labels_teach_nothing(clip: Clip) -> None:
    dataset = load_dataset("scenes-full", split="train", limit=2)

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        image, truth = dataset.read(key)
        return image, truth if key == "0" else np.full_like(truth, 255)

    partly = fit(clip, dataclasses.replace(dataset, read=read), samples=2, steps=3, batch=1)
    alone = fit(clip, dataset, samples=1, steps=3, batch=1)
    assert np.array_equal(partly.losses, alone.losses)


def test_a_broken_picture_is_left_out_with_a_warning(clip: Clip) -> None:
    dataset = load_dataset("scenes-full", split="train", limit=2)

    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        if key == "0":
            raise BrokenImage("0.png is cut short")
        return dataset.read(key)

    with pytest.warns(UserWarning, match="left out, 1 in all: 0.png is cut short"):
        partly = fit(clip, dataclasses.replace(dataset, read=read), samples=2, steps=3, batch=2)
    whole = fit(clip, dataclasses.replace(dataset, keys=("1",)), samples=1, steps=3, batch=2)
    assert np.array_equal(partly.losses, whole.losses)
    alone = dataclasses.replace(dataset, read=read, keys=("0",))
    with pytest.warns(UserWarning, match="0.png"), pytest.raises(ValueError, match="no picture of 'scenes-full-train'"):
        fit(clip, alone, samples=1, steps=1)


def test_the_windows_are_those_of_the_evaluation(clip: Clip) -> None:
    dataset = load_dataset("scenes-full", split="train", limit=1)
    own = fit(clip, dataclasses.replace(dataset, protocol=Protocol(96, 96, 48)), samples=1, steps=1)
    assert own.made_with["protocol"] == "96/96/48"


@pytest.mark.parametrize(
    ("split", "samples", "words"),
    [
        ("val", 2, r"'scenes-full' is of split 'val', .* load_dataset\(\.\.\., split='train'\)"),
        ("train", 3, "samples=3 of 'scenes-full-train': expected 1 to 2"),
        ("train", 0, "samples=0 of 'scenes-full-train': expected 1 to 2"),
    ],
)
def test_what_it_may_not_learn_from_is_refused_in_one_line(clip: Clip, split: str, samples: int, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        fit(clip, load_dataset("scenes-full", split=split, limit=2), samples=samples, steps=1)
    assert "\n" not in str(error.value)


def test_what_is_saved_is_what_the_attention_reads(fitted: Fit, clip: Clip, results: Path) -> None:
    fitted.save("own/three.safetensors")
    image, _ = load_dataset("scenes-full", limit=1).read("0")
    trunk = trunk_of(clip.visual, image, Protocol(144, 96, 48))
    read = attention("learned('own/three.safetensors')")
    assert torch.equal(read(trunk.site()), fitted.projection(trunk.site()))
    torch.testing.assert_close(dense(trunk, read), dense(trunk, fitted.projection), rtol=0, atol=0)
    assert np.array_equal(curve("own/three.safetensors"), fitted.losses)


def test_the_file_says_what_it_was_made_with(fitted: Fit, results: Path) -> None:
    fitted.save(results / "three.safetensors")
    with safe_open(results / "three.safetensors", "pt") as file:
        made_with = file.metadata()
    assert made_with == {
        "model": "tiny",
        "dataset": "scenes-full-train",
        "split": "train",
        "samples": "3",
        "steps": "12",
        "batch": str(ALL),
        "lr": made_with["lr"],
        "seed": "5",
        "protocol": "144/96/48",
        "labelling": "40/0",
    }
    assert 0 < float(made_with["lr"]) < 1


def test_a_save_that_fails_leaves_no_file(fitted: Fit, results: Path) -> None:
    with pytest.raises(TypeError):
        dataclasses.replace(fitted, made_with={"seed": 5}).save("broken.safetensors")
    assert list(results.iterdir()) == []


def test_the_projection_of_a_half_precision_tower_is_float32(clip: Clip) -> None:
    half = load("tiny", device="cpu", dtype=torch.bfloat16)
    learned = fit(half, load_dataset("scenes-full", split="train"), samples=1, steps=2).projection
    assert isinstance(learned, Projection)
    assert {p.dtype for p in learned.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["SigLIP", "MobileCLIP"], ids=["no CLS", "no bias"])
def test_towers_of_timm_learn_as_any(clip: Clip, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    dataset = load_dataset("scenes-full", split="train")
    losses = fit(with_timms(clip, monkeypatch, kind), dataset, samples=2, steps=10, batch=ALL).losses
    assert (np.diff(losses) < 0).all()
