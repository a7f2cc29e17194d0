"""Refinement against loops over pixels, and what it does to a picture. Parity is in test_parity.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sclip_lab import refine
from sclip_lab.images import STD
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol
from sclip_lab.refine import DenseCrf, Pamr

HEIGHT, WIDTH = 7, 9
SAME = Protocol(HEIGHT, long_side=WIDTH)  # a resize that leaves the image as it is


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def logits():
    return torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def around(maps, y, x, dilations):
    """The neighbours of a pixel of maps [m H W] by the formula, border repeated: one [m] each."""
    found = []
    for d in dilations:
        for dy in (-d, 0, d):
            for dx in (-d, 0, d):
                if dy or dx:
                    found.append(maps[:, min(max(y + dy, 0), HEIGHT - 1), min(max(x + dx, 0), WIDTH - 1)])
    return found


def pamr(image, logits, steps, dilations):
    x = image.transpose(2, 0, 1) / 255 / np.array(STD)[:, None, None]
    masks = logits.double().numpy()
    for _ in range(steps):
        result = np.zeros_like(masks)
        for row, col in np.ndindex(HEIGHT, WIDTH):
            own, near = x[:, row, col], around(x, row, col, dilations)
            affinities = []
            for other in near:
                total = 0
                for c in range(3):
                    samples = [value[c] for value in near] + [own[c]] * len(dilations)
                    total += abs(own[c] - other[c]) / (1e-8 + 0.1 * np.std(samples, ddof=1))
                affinities.append(np.exp(-total / 3))
            for affinity, mask in zip(affinities, around(masks, row, col, dilations), strict=True):
                result[:, row, col] += affinity / sum(affinities) * mask
        masks = result
    return masks


@pytest.mark.parametrize(("steps", "dilations"), [(1, (1,)), (3, (2, 1)), (2, (3, 12))])
def test_pamr_is_its_formula_in_loops(image, logits, steps, dilations):
    found = Pamr(steps, dilations)(image, SAME)(logits)
    np.testing.assert_allclose(found, pamr(image, logits, steps, dilations), atol=1e-5, rtol=0)


def test_one_refinement_serves_any_logits_in_any_company(image, logits, monkeypatch):
    monkeypatch.setattr(refine, "CHUNK", 2 * HEIGHT * WIDTH)
    refined = Pamr()(image, SAME)
    before = logits.clone()
    together = refined(logits)
    torch.testing.assert_close(together, torch.cat([refined(logits[:1]), refined(logits[1:])]))
    torch.testing.assert_close(refined(2 * logits[:1] - logits[1:2]), 2 * together[:1] - together[1:2])
    assert logits.equal(before)


def test_no_step_changes_nothing_and_what_is_flat_stays(image, logits):
    assert Pamr(steps=0)(image, SAME)(logits).equal(logits)
    flat = torch.full((2, HEIGHT, WIDTH), 0.3)
    torch.testing.assert_close(Pamr()(image, SAME)(flat), flat)


def two_halves():
    """A picture, dark on the left and bright on the right, its truth, and cosines that put the border 12 pixels off."""
    random = np.random.default_rng(0)
    truth = np.zeros((64, 96), dtype=np.int64)
    truth[:, 48:] = 1
    image = (60 + 120 * truth[..., None] + random.normal(0, 4, (64, 96, 3))).astype(np.uint8)
    slope = torch.linspace(-0.1, 0.1, 96).roll(12)
    slope[:12] = -0.1
    noise = 0.005 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    right = 0.2 + slope.expand(64, 96) + noise
    image.setflags(write=False)  # as arrays of `images.read` are
    return image, truth, torch.stack([0.4 - right, right])


@pytest.mark.parametrize("recipe", [Pamr(), DenseCrf()], ids=str)
def test_labels_move_to_where_the_picture_changes(recipe):
    if isinstance(recipe, DenseCrf):
        pytest.importorskip("pydensecrf", reason="the optional extra crf is not installed")
    image, truth, logits = two_halves()
    refined = recipe(image, Protocol(64))(logits)
    before, after = (
        (Labelling()(values, torch.tensor([0, 1])).numpy() != truth).mean() for values in (logits, refined)
    )
    assert before > 0.1
    assert after < before / 2


def test_a_crf_without_ties_between_pixels_leaves_the_probabilities(image, logits):
    pytest.importorskip("pydensecrf", reason="the optional extra crf is not installed")
    refined = DenseCrf(scale=2, near_weight=0, alike_weight=0)(image)(logits)
    torch.testing.assert_close((2 * refined).softmax(0), (2 * logits).softmax(0))


def test_a_missing_crf_says_what_to_install(image, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ImportError, match=r"install sclip-lab\[crf\]"):
        DenseCrf()(image)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system keeps no peak of memory in /proc")
def test_memory_for_171_words_at_480_by_640_stays_under_500_megabytes():
    # The peak of a process, less what it held before: logits, result, weights and all between. One step takes as much
    # as ten.
    code = """
import re, numpy as np, torch
from pathlib import Path
from sclip_lab.refine import Pamr
held = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
torch.set_num_threads(1)
Pamr()(np.zeros((32, 32, 3), np.uint8))(torch.zeros(2, 32, 32))
before = held("VmRSS")
Pamr(steps=1)(np.zeros((480, 640, 3), np.uint8))(torch.ones(171, 480, 640))
print(held("VmHWM") - before)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 420 < float(shown) < 500


@pytest.mark.parametrize(
    ("recipe", "key"),
    [(Pamr(), "pamr(10/8,16)"), (Pamr(2, (1,)), "pamr(2/1)"), (DenseCrf(), "crf(40/10/3,1/4,67,3)")],
)
def test_its_str_is_the_key(recipe, key):
    assert str(recipe) == key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda image: Pamr(steps=-1), "Pamr steps=-1: expected a whole number"),
        (lambda image: Pamr(dilations=()), r"Pamr dilations=\(\): expected distances in whole pixels"),
        (lambda image: Pamr(dilations=(0, 8)), r"Pamr dilations=\(0, 8\): expected distances"),
        (
            lambda image: Pamr()(image)(torch.zeros(2, 3, 3)),
            r"logits \[2, 3, 3\]: expected \[q H W\] at the image's size",
        ),
    ],
)
def test_what_cannot_be_refined_is_one_line(make, message, image):
    with pytest.raises(ValueError, match=message) as error:
        make(image)
    assert "\n" not in str(error.value)
