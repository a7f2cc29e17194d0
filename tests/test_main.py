"""The commands, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sclip_lab.__main__ import main

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    "quick_gelu": True,
}
NORMALISED = {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture
def model(tmp_path: Path) -> str:
    import open_clip

    torch.manual_seed(0)
    save_file(open_clip.CLIP(**SMALL).state_dict(), tmp_path / "small.safetensors")
    (tmp_path / "small.json").write_text(json.dumps(SMALL | NORMALISED))
    return f"tiny:{tmp_path / 'small.safetensors'}"


def test_segment_writes_an_overlay_and_says_what_is_in_it(photo: Path, model: str, capsys) -> None:
    assert main(["segment", "photo.jpg", "--classes", "sheep, grass, sky|clouds", "--model", model]) == 0
    said = capsys.readouterr().out
    assert said.startswith("photo_overlay.png: ")
    assert f"(model {model}, attention csa)" in said
    overlay = cv2.imread("photo_overlay.png")
    assert overlay.shape[0] > 40
    assert overlay.std() > 10


def test_segment_takes_a_file_of_classes_another_attention_and_another_output(photo: Path, model: str, capsys) -> None:
    Path("words.txt").write_text("background: sky|grass\nsheep\n")
    options = ["--attention", "identity", "--readout", "bare", "-o", "deeper/there.png"]
    assert main(["segment", "photo.jpg", "--classes", "words.txt", "--model", model, *options]) == 0
    assert capsys.readouterr().out.startswith("deeper/there.png: ")
    assert cv2.imread("deeper/there.png").std() > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["segment", "no.jpg", "--classes", "cat", "--model", "tiny"], "image 'no.jpg': no such file"),
        (["segment", "photo.jpg", "--classes", "cat,,dog", "--model", "tiny"], "class 1 is ''"),
        (["segment", "photo.jpg", "--classes", "grass", "--model", "tiny", "--attention", "csb"], "csb"),
        (["data", "check"], "no folder of data: expected one on the command line, or in SCLIP_DATA"),
        (["data", "get", "coco", "--root", "data"], "unknown data 'coco'"),
        (["data", "get", "cityscapes", "--root", "data"], "after a registration"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, words, photo: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SCLIP_DATA", raising=False)
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sclip_lab: ")
    assert err.count("\n") == 1
    assert words in err


def test_data_list_and_check_print_what_there_is(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SCLIP_DATA", str(tmp_path))
    assert main(["data", "list"]) == 0
    assert "448/224/112" in capsys.readouterr().out
    assert main(["data", "check", "--only", "ade20k"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("ade20k (ade20k): 0 of 2000 pictures")
    assert "ADEChallengeData2016.zip" in said
    assert main(["data", "check", "--only", "nothing"]) == 1


def test_the_module_is_a_program() -> None:
    command = [sys.executable, "-m", "sclip_lab", "segment"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "usage: python -m sclip_lab segment" in failed.stderr
