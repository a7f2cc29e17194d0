import json
import os
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sclip_lab.clip import load
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol, stitch
from sclip_lab.segment import Segmentation, logits, scores, segment, trunk_of
from sclip_lab.text import queries

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    "quick_gelu": True,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.3, 0.2, 0.1],
}
CLASSES = ["background: sky|grass", "person|person in shirt", "cat", "dog"]
TEMPLATES = ["a photo of a {}."]


@pytest.fixture
def checkpoint(tmp_path):
    """A small CLIP on disk whose patches and words are far from alike, for all that it was never trained."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**{key: CONFIG[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")})
    for weight in (model.visual.positional_embedding, model.positional_embedding, model.token_embedding.weight):
        torch.nn.init.normal_(weight)
    path = tmp_path / "small.safetensors"
    save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def clip(checkpoint):
    return load(f"tiny:{checkpoint}", device="cpu")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)


@torch.no_grad()
def plainly(clip, image, classes):
    """Labels by open_clip's own tower on the image squeezed into one window: tokens, cosines, upsampling, softmax."""
    pixels = torch.from_numpy(image / 255).float().permute(2, 0, 1)[None]
    pixels = (pixels - torch.tensor(CONFIG["mean"])[:, None, None]) / torch.tensor(CONFIG["std"])[:, None, None]
    clip.visual.output_tokens = True
    tokens = clip.visual(pixels)[1] @ clip.visual.proj
    words = [word for line in classes for word in line.rpartition(": ")[2].split("|")]
    vectors = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, words, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    cosines = (F.normalize(tokens, dim=-1) @ vectors).mT.unflatten(2, (4, 4))
    probability = (40 * F.interpolate(cosines, size=image.shape[:2], mode="bilinear")[0]).softmax(dim=0)
    best = [probability[0:2].amax(0), probability[2:4].amax(0), probability[4], probability[5]]
    return torch.stack(best).argmax(dim=0).numpy()


def test_segment_equals_the_plain_tower_on_one_window(clip, image):
    square = image[:32, :32]
    found = segment(square, CLASSES, model=clip, attention="vanilla", protocol=Protocol(32, crop=32, stride=16))
    expected = plainly(clip, square, CLASSES)
    assert len(np.unique(expected)) >= 3
    assert found.names == ["background", "person", "cat", "dog"]
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_array_equal(found.image, square)


def test_segment_names_every_pixel_as_the_steps_do(clip, image):
    words = queries(clip, CLASSES, TEMPLATES)
    protocol = Protocol.for_image_size(32)
    found = logits(clip.visual, image, words.vectors, "kk", protocol, "bare", mean=clip.mean, std=clip.std)
    labelling = Labelling(50, 0.2, 0.1)
    options = {"attention": "kk", "readout": "bare", "labelling": labelling, "templates": TEMPLATES}
    segmentation = segment(image, CLASSES, model=clip, **options)
    assert segmentation.labels.shape == image.shape[:2]
    np.testing.assert_array_equal(segmentation.labels, labelling(found, words.query_class))


def test_one_trunk_serves_every_attention_and_read_out(clip, image):
    vectors, protocol = queries(clip, CLASSES, TEMPLATES).vectors, Protocol.for_image_size(32)
    with torch.no_grad():
        trunk = trunk_of(clip.visual, image, protocol, clip.mean, clip.std)
        for attention in ("vanilla", "csa", "identity"):
            for readout in ("full", "no_mlp", "bare"):
                shared = stitch(scores(trunk, vectors, attention, readout), protocol, image.shape[:2])
                options = {"mean": clip.mean, "std": clip.std}
                alone = logits(clip.visual, image, vectors, attention, protocol, readout, **options)
                torch.testing.assert_close(shared, alone)


def test_every_argument_reaches_the_labels(clip, image):
    options = {
        "attention": "identity",
        "readout": "bare",
        "layers": (-2, -1),
        "protocol": Protocol(64, 32, 16),
        "labelling": Labelling(prob_thd=0.9),
        "templates": ["{}"],
    }
    plain = segment(image, CLASSES, model=clip, templates=TEMPLATES).labels
    for name, value in options.items():
        changed = segment(image, CLASSES, model=clip, **{"templates": TEMPLATES, name: value}).labels
        assert (changed != plain).any(), name


def test_a_model_given_by_name_is_kept(checkpoint, image):
    options = {"model": f"tiny:{checkpoint}", "templates": TEMPLATES}
    first = segment(image, CLASSES, **options)
    checkpoint.unlink()
    np.testing.assert_array_equal(segment(image, CLASSES, **options).labels, first.labels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 9000, 3), np.uint8), "1 x 9000"),
        (np.zeros((5, 5000, 3), np.uint8), "at least one patch"),
        (np.full((40, 40, 3), np.nan), "NaN"),
        (np.zeros((40, 40, 2), np.uint8), r"\[40, 40, 2\]"),
    ],
)
def test_bad_images_are_refused_in_one_line(clip, image, message):
    with pytest.raises(ValueError, match=message) as error:
        segment(image, CLASSES, model=clip, templates=TEMPLATES)
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path, image, monkeypatch):
    def disk_full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", disk_full)
    path = tmp_path / "overlay.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        Segmentation(np.zeros(image.shape[:2], np.int64), ["cat"], image).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["overlay.png"]
    assert path.read_bytes() == b"old"


@pytest.fixture(scope="module")
def photographs():
    root = os.environ.get("SCLIP_PHOTOS")
    if not root:
        pytest.skip("SCLIP_PHOTOS is not set: it names a folder with VOCdevkit/VOC2012/JPEGImages and coco/images")
    folders = Path(root, "VOCdevkit/VOC2012/JPEGImages"), Path(root, "coco/images")
    return [min(folder.glob("*.jpg")) for folder in folders]


def test_photographs_go_from_jpeg_to_overlay_at_vit_b_16(photographs, tmp_path):
    torch.manual_seed(0)
    made = open_clip.create_model("ViT-B-16-quickgelu", precision="fp32")
    save_file(made.half().state_dict(), tmp_path / "random.safetensors")
    clip = load(f"ViT-B-16-quickgelu:{tmp_path / 'random.safetensors'}", device="cpu")
    options = {
        "protocol": Protocol(short_side=224),
        "templates": TEMPLATES,
    }  # two windows: it is the way that is tested
    for photograph in photographs:
        found = segment(photograph, ["background: sky", "person"], model=clip, **options)
        height, width = cv2.imread(str(photograph)).shape[:2]
        assert found.labels.shape == (height, width)
        assert set(np.unique(found.labels)) <= {0, 1}
        found.save(tmp_path / f"{photograph.stem}.png")
        assert cv2.imread(str(tmp_path / f"{photograph.stem}.png")).std() > 10
