"""Agreement with what the released code of SCLIP and NACLIP answers for a small random tower on two photographs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sclip_lab.images import read
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol
from sclip_lab.refine import Pamr
from sclip_lab.segment import logits

REFERENCE = Path(__file__).parent / "reference"
CASES = json.loads((REFERENCE / "cases.json").read_text())
EVERY = [
    pytest.param(name, photograph, id=f"{name}-{photograph}")
    for name in CASES["cases"]
    for photograph in CASES["images"]
]


def answer(visual, name, photograph):
    """Logits [q H W], labels [H W] of a case, by the package."""
    case, words = CASES["cases"][name], load_file(REFERENCE / "queries.safetensors")
    image = read(REFERENCE / photograph)
    protocol = Protocol(case["short_side"], case["crop"], case["stride"])
    mean, std = ([value / 255 for value in CASES[key]] for key in ("mean", "std"))
    readout = "full" if case["residual_and_mlp"] else "bare"
    found = logits(visual, image, words["queries"], case["attention"], protocol, readout, mean, std)
    if case["pamr_steps"]:
        found = Pamr(case["pamr_steps"], (8, 16))(image, protocol, mean, std)(found)
    return found, Labelling(case["logit_scale"], case["prob_thd"], case["area_thd"])(found, words["query_class"])


def authors(name, photograph):
    """The authors' logits [pixels q], their pixels' places y, x, and the labels [H W]."""
    file, stem = np.load(REFERENCE / f"{name}.npz"), Path(photograph).stem
    return file[f"{stem}.logits"], file[f"{stem}.yx"].T, file[f"{stem}.labels"]


@pytest.mark.parametrize(("name", "photograph"), EVERY)
def test_logits_and_labels_are_the_authors(visual, name, photograph):
    found, labels = answer(visual, name, photograph)
    expected, (y, x), truth = authors(name, photograph)
    far, share = (1e-3, 0.999) if CASES["cases"][name]["pamr_steps"] else (1e-4, 0.9999)
    np.testing.assert_allclose(found[:, y, x].T, expected, atol=far, rtol=0)
    assert labels.shape == truth.shape
    assert (labels.numpy() == truth).mean() >= share


@pytest.mark.parametrize(("name", "photograph"), EVERY)
def test_half_precision_keeps_the_labels(visual, name, photograph):
    half = copy.deepcopy(visual).to(torch.bfloat16)
    _, labels = answer(half, name, photograph)
    assert (labels.numpy() == authors(name, photograph)[2]).mean() >= 0.99
