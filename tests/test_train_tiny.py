"""The recipe of the bundled model: its loss, its resumption, its file."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from sclip_lab import load, train_tiny


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny, "BATCH", 4)
    vision = train_tiny.CONFIG["vision_cfg"] | {"width": 64, "layers": 2}
    text = train_tiny.CONFIG["text_cfg"] | {"width": 32, "heads": 2, "layers": 1}
    monkeypatch.setattr(train_tiny, "CONFIG", train_tiny.CONFIG | {"vision_cfg": vision, "text_cfg": text})


def test_a_killed_run_resumed_ends_like_an_unbroken_one(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_tiny.train(4, tmp_path / "whole.safetensors")
    step = train_tiny._step

    def killed(model, optimiser, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return step(model, optimiser, number, *rest)

    monkeypatch.setattr(train_tiny, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny.train(4, tmp_path / "broken.safetensors", every=2)
    monkeypatch.setattr(train_tiny, "_step", step)
    resumed = train_tiny.train(4, tmp_path / "broken.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="belongs to a run of 4 steps, not 5: delete it"):
        train_tiny.train(5, tmp_path / "broken.safetensors")


def test_a_bundle_loads_as_the_model_that_was_written(small: None, tmp_path: Path) -> None:
    model, _ = train_tiny._start(1)
    train_tiny.bundle(model, tmp_path / "tiny.safetensors", {})
    clip = load(f"tiny:{tmp_path / 'tiny.safetensors'}")
    captions = ["ladybug and moon on brick and water", "itap of a cookie.", "a tattoo of the zebra and leaf on snow."]
    with torch.no_grad():
        expected = model.eval().encode_text(clip.tokenizer(captions), normalize=True)
    torch.testing.assert_close(clip.encode_text(captions), expected, atol=2e-3, rtol=0)
    pixels = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(clip.visual(pixels), model.visual(pixels), atol=1e-2, rtol=0)


def test_loss_of_different_captions_is_open_clips() -> None:
    torch.manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    tokens, scale = torch.arange(10).view(5, 2), torch.tensor(7.0)
    expected = open_clip.ClipLoss()(images, texts, scale)
    torch.testing.assert_close(train_tiny.contrastive_loss(images, texts, scale, tokens), expected)


def test_equal_captions_are_positives_of_each_other() -> None:
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4]])
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    scale = torch.tensor(50.0)
    # both pictures share both captions: the least possible loss, log 2 for each of two rows in three, is reached
    assert train_tiny.contrastive_loss(vectors, vectors, scale, tokens).item() == pytest.approx(2 / 3 * np.log(2))


def test_retold_captions_name_nothing_that_is_not_there() -> None:
    batches, rng = train_tiny.Batches(0), np.random.RandomState(0)
    told = {batches._retell(rng, "bee and sun on brick") for _ in range(300)}
    assert len(told) > 50
    assert {"bee and sun on brick", "brick", "bee", "bee on brick"} <= told
    names = set(train_tiny.scenes.NAMES) - {"bee", "sun", "brick"}
    assert not any(f" {name} " in f" {caption.strip('.')} " for caption in told for name in names)


def test_a_loss_that_is_no_number_stops_the_run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny, "LEARNING_RATE", float("inf"))
    with pytest.raises(FloatingPointError, match="loss nan at step"):
        train_tiny.train(3, tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())
