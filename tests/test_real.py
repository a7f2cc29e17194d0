"""The whole way with photographs and a ViT-B/16 of random weights in the place of OpenAI's, as a user goes it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from sclip_lab import Clip, load, load_dataset, summarise, sweep
from sclip_lab.__main__ import main
from sclip_lab.datasets import studied
from sclip_lab.files import chosen, results
from sclip_lab.protocol import Protocol
from sclip_lab.store import COUNTS
from sclip_lab.text import parse

MODEL = "ViT-B-16-brief-quickgelu"  # its text tower has one layer: the words of VOC take seconds instead of minutes
WHOLE = Protocol(224, crop=0)  # a quarter of the work of the paper's; `segment` has windows


@pytest.fixture(scope="module")
def photographs() -> Path:
    root = os.environ.get("SCLIP_PHOTOS")
    if not root:
        pytest.skip("SCLIP_PHOTOS is not set: it names a folder with VOCdevkit/VOC2012")
    return Path(root)


@pytest.fixture(scope="module")
def weights(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A name for `load`, of a file as large as a ViT-B/16 is, which is removed in the end."""
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    brief = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        config = open_clip.get_model_config("ViT-B-16-quickgelu") | {"text_cfg": brief}
        patch.setitem(open_clip.factory._MODEL_CONFIGS, MODEL, config)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), path)
        yield f"{MODEL}:{path}"
    path.unlink()


@pytest.fixture(scope="module")
def clip(weights: str) -> Clip:
    return load(weights)


@pytest.fixture(autouse=True)
def environment(weights: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"MODEL": weights, "DATA": photographs, "LIMIT": 2, "RESULTS": tmp_path / "results"}
    for name, value in names.items():
        monkeypatch.setenv(f"SCLIP_{name}", str(value))


def numbers(root: Path, key: str) -> np.ndarray:
    with Image.open(root / f"VOCdevkit/VOC2012/SegmentationClass/{key}.png") as mask:
        return np.asarray(mask)


def test_voc21_voc20_and_a_folder_of_the_same_photographs(clip: Clip, photographs: Path, tmp_path: Path) -> None:
    voc21, voc20 = (studied()[kind] for kind in ("background", "things"))
    for sub, owners in (("images", "JPEGImages/{}.jpg"), ("masks", "SegmentationClass/{}.png")):
        (tmp_path / "own" / sub).mkdir(parents=True)
        for key in voc21.keys:
            file = photographs / "VOCdevkit/VOC2012" / owners.format(key)
            (tmp_path / "own" / sub / file.name).symlink_to(file)
    (tmp_path / "own" / "classes.txt").write_text("\n".join(voc21.classes))
    own = replace(load_dataset(tmp_path / "own"), labelling=voc21.labelling)

    asked = {"attentions": ["vanilla", "csa"], "protocols": WHOLE, "store": "real"}
    frame = sweep(clip, [voc21, voc20, own], **asked)
    names = list(parse(voc21.classes))
    csa = frame[frame["attention"] == "csa"].astype({"dataset": str})
    true = csa.pivot(index=["dataset", "image"], columns="class", values="true")
    for key in voc21.keys:
        there = np.bincount(numbers(photographs, key).ravel(), minlength=256)
        for dataset, first in ((voc21, 0), (voc20, 1), (own, 0)):
            assert true.loc[(dataset.name, key), names[first:]].tolist() == there[first:21].tolist()
    as_voc, as_own = (frame.loc[frame["dataset"] == one.name, COUNTS].to_numpy() for one in (voc21, own))
    np.testing.assert_array_equal(as_own, as_voc)

    table = summarise(frame)
    assert table["miou"].between(0, 100).all()
    assert set(zip(table["model"], table["dataset"], table["images"], strict=True)) == {
        (chosen(), one.name, 2) for one in (voc21, voc20, own)
    }
    assert chosen() in table.to_string()  # whoever prints it sees which weights were used

    assert results().parent.parent == tmp_path / "results"
    assert (results() / "real.parquet").is_file()
    again = sweep(clip, [replace(one, read=None) for one in (voc21, voc20, own)], **asked)  # nothing is read
    pd.testing.assert_frame_equal(again, frame)


def test_segment_writes_an_overlay_with_a_legend(
    photographs: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    photograph = min((photographs / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"))
    assert main(["segment", str(photograph), "--classes", "sheep, grass, sky|clouds"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{photograph.stem}_overlay.png: ")
    assert f"(model {weights}, attention csa)" in said
    with Image.open(photograph) as picture, Image.open(f"{photograph.stem}_overlay.png") as overlay:
        assert overlay.width > picture.width  # the legend stands beside it
