"""The registry of datasets, its benchmarks beside the paper's configuration, and folders of one's own."""

import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from sclip_lab import datasets, load_dataset, scenes, train_tiny
from sclip_lab.datasets import BENCHMARKS, KINDS, BrokenImage, benchmarks, studied
from sclip_lab.metrics import counts
from sclip_lab.remap import CITYSCAPES, COCO, COCO_THINGS, CONTEXT, TABLES
from sclip_lab.text import parse

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = [name for name in datasets().index if name.startswith("scenes-")]

# Wang et al. 2024, the authors' configuration files: classes, words, short side, logit scale, prob_thd, area_thd.
PAPER = {
    "voc21": (21, 56, 336, 65, 0.1, 0.1),
    "voc20": (20, 30, 336, 40, 0, None),
    "context60": (60, 60, 336, 50, 0.1, None),
    "context59": (59, 59, 336, 40, 0, None),
    "coco-object": (81, 113, 336, 50, 0.1, None),
    "coco-stuff": (171, 171, 448, 40, 0, None),
    "coco-stuff-10k": (171, 171, 336, 40, 0, None),
    "ade20k": (150, 150, 336, 40, 0, None),
    "cityscapes": (19, 19, 560, 40, 0, None),
}


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("name", BUNDLED)
def test_truth_indexes_the_classes_and_fits_the_image(name: str, split: str) -> None:
    dataset = load_dataset(name, limit=3, split=split)
    expected = name if split == "val" else f"{name}-train"
    assert (dataset.name, dataset.split, len(dataset.keys)) == (expected, split, 3)
    for key in dataset.keys:
        image, truth = dataset.read(key)
        assert (image.dtype, image.shape) == (np.uint8, (*truth.shape, 3))
        assert set(np.unique(truth)) - {255} <= set(range(len(parse(dataset.classes))))


def test_datasets_over_the_same_pictures_read_the_same_pictures() -> None:
    full, things = load_dataset("scenes-full", limit=2), load_dataset("scenes-things", limit=2)
    assert (full.pictures, full.keys) == (things.pictures, things.keys)
    assert np.array_equal(full.read("1")[0], things.read("1")[0])


def test_the_training_split_has_the_seed_of_the_models_training_and_never_that_of_the_evaluation() -> None:
    val, train = (load_dataset("scenes-full", split=split) for split in ("val", "train"))
    assert len({val.pictures, train.pictures, "scenes-train"}) == 2
    for key in ("0", "63"):
        images, truths, _ = scenes.draw(1, train_tiny.SEED, (160, 213), start=int(key))
        image, truth = train.read(key)
        assert np.array_equal(image, images[0])
        assert np.array_equal(truth, truths[0])
        assert not np.array_equal(image, val.read(key)[0])


def test_a_picture_is_the_same_under_every_limit() -> None:
    few, many = (load_dataset("scenes-things", limit=limit, split="train") for limit in (2, 64))
    assert many.keys[:2] == few.keys
    assert np.array_equal(many.read(many.keys[1])[0], few.read(few.keys[1])[0])


@pytest.mark.parametrize("name", PAPER)
def test_benchmarks_are_evaluated_as_the_authors_configuration_says(name: str) -> None:
    classes, words, short_side, *labelling = PAPER[name]
    row = BENCHMARKS[name]
    protocol = (row.protocol.short_side, row.protocol.crop, row.protocol.stride)
    assert protocol == (short_side, 224, 112)
    assert [row.labelling.logit_scale, row.labelling.prob_thd, row.labelling.area_thd] == labelling
    vocabulary = parse(ROOT / f"data/vocabularies/{row.vocabulary or name}.txt")
    assert (len(vocabulary), sum(map(len, vocabulary.values()))) == (classes, words)
    listed = datasets().loc[name]
    assert (listed["classes"], listed["protocol"]) == (classes, f"{short_side}/224/112")


def test_every_benchmark_of_the_paper_is_there_under_the_name_of_its_published_numbers() -> None:
    published = pd.read_csv(ROOT / "data" / "paper.csv")
    published = published[published["dataset"] != "average"]
    assert set(published["dataset"]) <= set(BENCHMARKS)
    of_sclip = published.query("method == 'SCLIP'").drop_duplicates("dataset").set_index("dataset")
    assert of_sclip["protocol"].to_dict() == {name: datasets()["protocol"][name] for name in of_sclip.index}


@pytest.mark.parametrize("name", TABLES)
def test_tables_reach_every_class_and_no_other(name: str) -> None:
    assert set(TABLES[name].values()) - {255} == set(range(len(parse(ROOT / _vocabulary(name)))))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("context59", CONTEXT.values()),
        ("coco-object", ["background", *COCO_THINGS.values()]),
        ("coco-stuff", COCO.values()),
        ("cityscapes", CITYSCAPES.values()),
    ],
)
def test_labels_are_in_the_order_of_the_words(name: str, names: list[str]) -> None:
    words = [word.replace(" ", "") for word in parse(ROOT / _vocabulary(name))]
    assert [word.replace(" ", "") for word in names] == words


def _vocabulary(name: str) -> str:
    return f"data/vocabularies/{BENCHMARKS[name].vocabulary or name}.txt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of 6 x 8 pixels: a JPEG, a grey PNG and a TIFF, with masks of two classes and 255."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    pixels = np.arange(144, dtype=np.uint8).reshape(6, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "images/a.jpg")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "images/b.PNG")
    Image.fromarray(pixels).save(tmp_path / "images/c.tif")
    mask = np.repeat(np.array([0, 1, 255], np.uint8), 16).reshape(6, 8)
    for key in "abc":
        Image.fromarray(mask).save(tmp_path / f"masks/{key}.png")
    (tmp_path / "images/.DS_Store").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("background: sky|grass\nsheep\n")
    return tmp_path


@pytest.mark.parametrize("by_path", [True, False])
def test_a_folder_of_images_and_masks_is_a_dataset(folder: Path, by_path: bool) -> None:
    dataset = load_dataset(folder) if by_path else load_dataset("folder", root=folder)
    assert (dataset.keys, dataset.classes) == (("a", "b", "c"), ("background: sky|grass", "sheep"))
    for key in dataset.keys:
        image, truth = dataset.read(key)
        assert image.shape == (6, 8, 3)
        assert truth.tolist() == [[0] * 8] * 2 + [[1] * 8] * 2 + [[255] * 8] * 2
    assert np.ptp(dataset.read("b")[0], axis=2).max() == 0  # grey: three equal channels
    assert load_dataset(folder, limit=2).keys == ("a", "b")


def test_a_folders_name_changes_with_its_files_and_not_with_the_limit(folder: Path) -> None:
    before, limited = load_dataset(folder), load_dataset(folder, limit=1)
    (folder / "classes.txt").write_text("background: sky\nsheep\n")
    assert before.name == limited.name
    assert before.name != load_dataset(folder).name
    assert before.name.startswith(f"{folder.name}-")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "classes.txt").unlink(), "no classes.txt: expected images/, masks/ and classes.txt"),
        (lambda folder: [path.unlink() for path in (folder / "images").glob("*")], "no pictures in images/"),
        (lambda folder: (folder / "images/a.png").write_bytes(b""), "a.jpg.*a.png.*one stem"),
    ],
)
def test_a_folder_that_is_not_one_is_refused_in_one_line(folder: Path, spoil, words: str) -> None:
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_dataset(folder)
    assert "\n" not in str(error.value)


def test_a_mask_with_a_number_that_has_no_class_is_named(folder: Path) -> None:
    (folder / "classes.txt").write_text("sheep\n")
    with pytest.raises(BrokenImage, match=r"masks/a.png'?: unknown numbers 1: expected 0, 255"):
        load_dataset(folder).read("a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("voc22",), "unknown dataset 'voc22': expected one of .*voc21.*, or a folder"),
        (("scenes-full", None, 0), "limit=0"),
        (("scenes-full", None, None, "test"), "split='test' of 'scenes-full': expected one of val, train"),
        (("voc21",), "'voc21' has no root: expected .* SCLIP_DATA"),
        (("folder",), "'folder' has no root"),
        (("ade20k", "nowhere"), r"no pictures of 'ade20k' \(val\) in 'nowhere': expected ade/.*data check nowhere"),
    ],
)
def test_bad_requests_are_one_line(arguments: tuple, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCLIP_DATA", raising=False)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_dataset(*arguments)
    assert "\n" not in str(error.value)


@pytest.fixture
def photographs() -> Path:
    root = os.environ.get("SCLIP_PHOTOS")
    if not root:
        pytest.skip("SCLIP_PHOTOS is not set: it names a folder with VOCdevkit/VOC2012 and coco")
    return Path(root)


def test_photographs_of_voc_are_read_as_both_of_its_datasets(photographs: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCLIP_DATA", str(photographs))
    with_background, without = load_dataset("voc21", limit=20), load_dataset("voc20", limit=20)
    assert (with_background.pictures, with_background.keys) == (without.pictures, without.keys)
    for key in with_background.keys:
        image, truth = with_background.read(key)
        on_disk = np.asarray(Image.open(photographs / f"VOCdevkit/VOC2012/SegmentationClass/{key}.png"))
        assert np.array_equal(truth, on_disk)
        assert image.shape == (*truth.shape, 3)
        assert np.array_equal(without.read(key)[1], np.where(on_disk % 255 == 0, 255, on_disk - 1))


def test_iou_of_real_masks_agrees_with_scikit_learn(photographs: Path) -> None:
    dataset = load_dataset("voc21", root=photographs, limit=8)
    ours, theirs = np.zeros((21, 3), int), np.zeros((21, 21), int)
    for key in dataset.keys:
        truth = dataset.read(key)[1]
        labels = np.roll(cv2.medianBlur(np.where(truth == 255, 0, truth).astype(np.uint8), 9), 5, axis=1)
        seen = truth != 255
        ours += counts(labels, truth, 21)
        theirs += confusion_matrix(truth[seen], labels[seen], labels=range(21))
    assert np.array_equal(ours, np.stack([np.diag(theirs), theirs.sum(axis=0), theirs.sum(axis=1)], axis=1))
    assert (ours[:, 2] > 0).sum() >= 5


def test_photographs_of_coco_are_a_folder_once_they_have_masks_of_that_name(photographs: Path, tmp_path: Path) -> None:
    lines = (photographs / "coco/classes.txt").read_text().splitlines()
    names = dict(line.split(": ", 1) for line in lines)
    (tmp_path / "classes.txt").write_text("\n".join(names.get(str(n), f"nothing {n}") for n in range(201)))
    (tmp_path / "images").symlink_to(photographs / "coco/images")
    (tmp_path / "masks").symlink_to(next((photographs / "coco").glob("panoptic*")))
    dataset = load_dataset(tmp_path)
    assert len(dataset.keys) == 60
    for key in dataset.keys[:10]:
        image, truth = dataset.read(key)
        assert image.shape == (*truth.shape, 3)
        assert len(np.unique(truth)) > 1


def _studied(monkeypatch: pytest.MonkeyPatch, **variables: object) -> dict[str, tuple[str, int]]:
    for name in ("SCLIP_MODEL", "SCLIP_DATA", "SCLIP_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return {kind: (dataset.name, len(dataset.keys)) for kind, dataset in studied(7).items()}


def test_notebooks_study_scenes_unless_a_model_and_data_are_named(tmp_path: Path, monkeypatch) -> None:
    bundled = {kind: (f"scenes-{name}", 7) for kind, name in zip(KINDS, ("background", "things", "full"), strict=True)}
    assert _studied(monkeypatch) == bundled
    assert _studied(monkeypatch, SCLIP_DATA=tmp_path) == bundled  # the bundled model knows nothing of photographs
    assert _studied(monkeypatch, SCLIP_MODEL="ViT-B-32:openai") == bundled
    assert {name: len(dataset.keys) for name, dataset in benchmarks(7).items()} == dict(bundled.values())


def test_notebooks_study_of_each_kind_the_first_benchmark_that_is_there(tmp_path: Path, monkeypatch) -> None:
    listing = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2007_000033\n2007_000042\n2007_000061\n")
    both = {"SCLIP_MODEL": "ViT-B-32:openai", "SCLIP_DATA": tmp_path}
    assert _studied(monkeypatch, **both) == {
        "background": ("voc21", 3), "things": ("voc20", 3), "everything": ("voc20", 3)
    }  # fmt: skip
    assert _studied(monkeypatch, SCLIP_LIMIT=2, **both)["background"] == ("voc21", 2)
    picture = tmp_path / "ade/ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    picture.parent.mkdir(parents=True)
    picture.touch()
    assert _studied(monkeypatch, **both)["everything"] == ("ade20k", 1)
    assert {name: len(dataset.keys) for name, dataset in benchmarks(7).items()} == {"voc21": 3, "voc20": 3, "ade20k": 1}
    for wrong in ("many", "0", "-3", "²"):
        with pytest.raises(ValueError, match=rf"^SCLIP_LIMIT='{wrong}': expected a number"):
            _studied(monkeypatch, SCLIP_LIMIT=wrong, **both)
    with pytest.raises(FileNotFoundError, match=r"^SCLIP_DATA=.*nowhere' holds none of voc21, "):
        _studied(monkeypatch, SCLIP_MODEL="ViT-B-32:openai", SCLIP_DATA=tmp_path / "nowhere")
