"""What the bundled model has to show, on 300 held-out scenes with everything as vocabulary."""

import numpy as np
import pandas as pd
import pytest
import torch

from sclip_lab import Clip, attention, compare, dense, encode, load, scenes, segment, summarise, sweep
from sclip_lab.datasets import HELD_OUT
from sclip_lab.files import home
from sclip_lab.images import pixels
from sclip_lab.metrics import invariance, retrieved

PICTURES = 300


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny")


@pytest.fixture(scope="module")
def frame(clip: Clip) -> pd.DataFrame:
    return sweep(clip, "scenes-full", ["vanilla", "identity", "csa"], readouts=["full", "bare"], limit=PICTURES)


@pytest.fixture(scope="module")
def whole(clip: Clip) -> tuple[torch.Tensor, list[str]]:
    images, _, captions = scenes.draw(PICTURES, HELD_OUT, (clip.image_size, clip.image_size))
    return pixels(torch.from_numpy(images), clip.mean, clip.std), captions


def test_it_is_a_small_clip_in_half_precision(clip: Clip) -> None:
    assert (home() / "data" / "tiny.safetensors").stat().st_size < 20e6
    assert type(clip.model).__name__ == "CLIP"
    assert clip.visual.grid_size == (12, 12)
    assert clip.visual.pool_type == "tok"


def test_it_finds_the_caption_of_a_picture(clip: Clip, whole: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = whole
    found = retrieved(torch.nn.functional.normalize(clip.visual(images), dim=-1), clip.encode_text(captions), captions)
    assert found.mean() >= 0.85


def test_csa_beats_clip_by_far_and_maskclip_surely(frame: pd.DataFrame) -> None:
    full = frame[frame["readout"] == "full"]
    over_clip, over_maskclip = (compare(full, "csa", other).iloc[0] for other in ("vanilla", "identity"))
    assert over_clip["images"] == PICTURES
    assert over_clip["difference"] >= 8
    assert min(over_clip["low"], over_maskclip["low"]) > 0


def test_things_are_found_by_the_best_variant(frame: pd.DataFrame) -> None:
    assert summarise(frame[frame["class"].isin(scenes.THINGS)])["miou"].max() >= 25


def test_attention_of_clip_hardly_depends_on_its_source(clip: Clip, whole: tuple[torch.Tensor, list[str]]) -> None:
    site = encode(clip.visual, whole[0][:100]).site()
    clip_, csa = (invariance(attention(name)(site).mean(1)).numpy() for name in ("vanilla", "csa"))
    assert np.mean(clip_ > csa) > 0.95
    assert clip_.mean() > csa.mean() + 0.15


def test_its_image_vector_is_the_cls_token(clip: Clip, whole: tuple[torch.Tensor, list[str]]) -> None:
    images = whole[0][:4]
    torch.testing.assert_close(
        dense(encode(clip.visual, images), "vanilla")[:, 0], clip.visual(images), atol=1e-5, rtol=0
    )


def test_a_word_that_it_never_saw_is_refused_in_one_line(clip: Clip) -> None:
    with pytest.raises(ValueError, match=r"'tiny' never saw the words of \['dog', 'wall'\]: expected") as error:
        segment(scenes.draw(1, HELD_OUT)[0][0], ["dog", "grass", "sky|wall"], clip)
    assert "\n" not in str(error.value)
