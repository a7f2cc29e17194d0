"""Agreement with what the released code of SCLIP and NACLIP answers for a small random tower on two photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from sclip_lab.images import read
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol
from sclip_lab.segment import logits

REFERENCE = Path(__file__).parent / "reference"
CASES = json.loads((REFERENCE / "cases.json").read_text())
NAMES = ["sclip_csa", "sclip_vanilla", "sclip_csa_voc21", "sclip_csa_short448", "sclip_csa_whole", "naclip_csa"]


@pytest.mark.parametrize("photograph", CASES["images"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_labels_are_the_authors(visual, name, photograph):
    case, words = CASES["cases"][name], load_file(REFERENCE / "queries.safetensors")
    image = read(REFERENCE / photograph)
    protocol = Protocol(case["short_side"], case["crop"], case["stride"])
    mean, std = ([value / 255 for value in CASES[key]] for key in ("mean", "std"))
    found = logits(visual, image, words["queries"], case["attention"], protocol, mean=mean, std=std)
    labels = Labelling(case["logit_scale"], case["prob_thd"], case["area_thd"])(found, words["query_class"])

    expected = np.load(REFERENCE / f"{name}.npz")
    stem = Path(photograph).stem
    y, x = expected[f"{stem}.yx"].T
    np.testing.assert_allclose(found[:, y, x].T, expected[f"{stem}.logits"], atol=1e-4, rtol=0)
    assert labels.shape == image.shape[:2]
    assert (labels.numpy() == expected[f"{stem}.labels"]).mean() >= 0.9999
