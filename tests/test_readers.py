"""Readers on miniatures of the owners' layouts, remapped by the owners' and the authors' published rules."""

import os
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Cityscapes

from sclip_lab import load_dataset
from sclip_lab.readers import BrokenImage
from sclip_lab.remap import remap

SIZE = (6, 8)  # height and width of every miniature
Numbers = list[int]


def photograph(path: Path, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)


def tiles(numbers: Numbers) -> np.ndarray:
    """A mask [H W] in which every number occurs, in reading order."""
    return np.resize(np.array(numbers), SIZE)


def png(path: Path, numbers: Numbers, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(tiles(numbers).astype(np.uint8))
    if palette:  # VOC's masks look coloured: the class is the index
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
    mask.save(path)


def mat(path: Path, variable: str, numbers: Numbers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {variable: tiles(numbers).astype(np.uint16), "names": np.array(["unlabeled"], object)})


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def voc(root: Path, numbers: Numbers) -> str:
    base = root / "VOCdevkit/VOC2012"
    photograph(base / "JPEGImages/2007_000033.jpg")
    png(base / "SegmentationClass/2007_000033.png", numbers, palette=True)
    text(base / "ImageSets/Segmentation/val.txt", "2007_000033", "")
    return "2007_000033"


def context(root: Path, numbers: Numbers) -> str:
    photograph(root / "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg")
    text(root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt", "2008_000002")
    mat(root / "pascal-context/trainval/2008_000002.mat", "LabelMap", numbers)
    return "2008_000002"


def coco(root: Path, numbers: Numbers) -> str:
    photograph(root / "coco_stuff164k/images/val2017/000000000139.jpg")
    png(root / "coco_stuff164k/annotations/val2017/000000000139.png", numbers)
    png(root / "coco_stuff164k/annotations/val2017/000000000139_labelTrainIds.png", [7])  # a conversion's, left alone
    return "000000000139"


def stuff10k(root: Path, numbers: Numbers) -> str:
    key = "COCO_train2014_000000000077"
    photograph(root / f"coco_stuff10k/images/{key}.jpg")
    mat(root / f"coco_stuff10k/annotations/{key}.mat", "S", numbers)
    text(root / "coco_stuff10k/imageLists/test.txt", key)
    return key


def ade(root: Path, numbers: Numbers) -> str:
    base = root / "ade/ADEChallengeData2016"
    photograph(base / "images/validation/ADE_val_00000001.jpg")
    png(base / "annotations/validation/ADE_val_00000001.png", numbers)
    return "ADE_val_00000001"


def cityscapes(root: Path, numbers: Numbers) -> str:
    key = "frankfurt/frankfurt_000000_000294"
    photograph(root / f"cityscapes/leftImg8bit/val/{key}_leftImg8bit.png")
    png(root / f"cityscapes/gtFine/val/{key}_gtFine_labelIds.png", numbers)
    png(root / f"cityscapes/gtFine/val/{key}_gtFine_instanceIds.png", [24])
    return key


# Owner's numbers and the labels that the authors' conversion (or mmsegmentation's, which they use) gives them.
CASES = {
    "voc21": (voc, [0, 1, 4, 15, 20, 255], [0, 1, 4, 15, 20, 255]),
    "voc20": (voc, [0, 1, 4, 15, 20, 255], [255, 0, 3, 14, 19, 255]),
    "context60": (context, [0, 2, 9, 1, 104, 458, 459], [0, 1, 2, 0, 21, 59, 0]),
    "context59": (context, [0, 2, 9, 1, 104, 458, 459], [255, 0, 1, 255, 20, 58, 255]),
    "coco-object": (coco, [0, 10, 12, 89, 91, 181, 255], [1, 11, 12, 80, 0, 0, 0]),
    "coco-stuff": (coco, [0, 10, 12, 89, 91, 181, 255], [0, 10, 11, 79, 80, 170, 255]),
    "coco-stuff-10k": (stuff10k, [0, 1, 11, 13, 90, 92, 182], [255, 0, 10, 11, 79, 80, 170]),
    "ade20k": (ade, [0, 1, 2, 150], [255, 0, 1, 149]),
    "cityscapes": (cityscapes, [0, 6, 7, 8, 11, 29, 31, 33], [255, 255, 0, 1, 2, 255, 16, 18]),
}


@pytest.mark.parametrize("name", CASES)
def test_owners_files_are_read_and_remapped(name: str, tmp_path: Path) -> None:
    layout, numbers, labels = CASES[name]
    key = layout(tmp_path, numbers)
    dataset = load_dataset(name, root=tmp_path)
    assert (dataset.name, dataset.keys) == (name, (key,))
    image, truth = dataset.read(key)
    assert (image.dtype, image.shape, truth.dtype) == (np.uint8, (*SIZE, 3), np.uint8)
    assert truth.tolist() == tiles(labels).tolist()


def test_cityscapes_numbers_are_the_owners(tmp_path: Path) -> None:
    owners = {one.id: one.train_id for one in Cityscapes.classes if one.id >= 0}
    cityscapes(tmp_path, list(owners))
    assert load_dataset("cityscapes", root=tmp_path).read("frankfurt/frankfurt_000000_000294")[1].ravel().tolist() == [
        *owners.values(),
        *list(owners.values())[: np.prod(SIZE) - len(owners)],
    ]


def test_datasets_over_the_same_pictures_say_so(tmp_path: Path) -> None:
    for layout, numbers, _ in CASES.values():
        layout(tmp_path, numbers)
    pictures = {name: load_dataset(name, root=tmp_path).pictures for name in CASES}
    for first, second in (("voc21", "voc20"), ("context60", "context59"), ("coco-object", "coco-stuff")):
        assert pictures[first] == pictures[second]
    assert len(set(pictures.values())) == 6


def test_training_splits_have_names_of_their_own(tmp_path: Path) -> None:
    ade(tmp_path, [1])
    base = tmp_path / "ade/ADEChallengeData2016"
    photograph(base / "images/training/ADE_train_00000001.jpg")
    png(base / "annotations/training/ADE_train_00000001.png", [2])
    train = load_dataset("ade20k", root=tmp_path, split="train")
    assert (train.name, train.pictures, train.keys) == ("ade20k-train", "ade20k-train", ("ADE_train_00000001",))
    assert set(train.read(train.keys[0])[1].ravel().tolist()) == {1}


def test_grey_photographs_become_three_channels(tmp_path: Path) -> None:
    key = coco(tmp_path, [0])
    photograph(tmp_path / f"coco_stuff164k/images/val2017/{key}.jpg", grey=True)
    image, _ = load_dataset("coco-stuff", root=tmp_path).read(key)
    assert image.shape == (*SIZE, 3)
    assert np.ptp(image, axis=2).max() == 0


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGE, MASK = "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg", "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"


@pytest.mark.parametrize(
    ("path", "spoil", "words"),
    [
        (IMAGE, Path.unlink, "no such file"),
        (IMAGE, halve, "cannot be decoded: expected a whole JPEG"),
        (MASK, Path.unlink, "no such file"),
        (MASK, halve, "cannot be decoded"),
        (MASK, lambda path: path.write_text("not a picture"), "cannot be decoded"),
        (MASK, lambda path: Image.new("L", (4, 6)).save(path), "is 6x4 pixels, its image 6x8: expected the same"),
        (MASK, lambda path: Image.new("RGB", (8, 6)).save(path), "expected numbers of classes .* not colours"),
        (MASK, lambda path: Image.new("L", (8, 6), 21).save(path), "unknown numbers 21: expected 0-20, 255"),
    ],
)
def test_a_broken_file_is_named_in_one_line(path: str, spoil: Callable, words: str, tmp_path: Path) -> None:
    key = voc(tmp_path, [0, 1])
    dataset = load_dataset("voc21", root=tmp_path)
    spoil(tmp_path / path)
    with pytest.raises(BrokenImage, match=words) as error:
        dataset.read(key)
    assert str(tmp_path / path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [halve, Path.unlink, lambda path: savemat(path, {"other": tiles([1])})])
def test_a_broken_mat_file_is_named_in_one_line(spoil: Callable, tmp_path: Path) -> None:
    key = context(tmp_path, [0, 2])
    spoil(tmp_path / f"pascal-context/trainval/{key}.mat")
    with pytest.raises(BrokenImage, match=f"{key}.mat") as error:
        load_dataset("context60", root=tmp_path).read(key)
    assert "\n" not in str(error.value)


def test_unknown_numbers_of_any_type_are_listed_but_not_all() -> None:
    for kind in (np.int16, np.uint16, np.float64):
        with pytest.raises(ValueError, match=r"unknown numbers 2, 7, 8, 9, 300, \.\.\.: expected 0-1, 5$"):
            remap(np.array([[0, 1, 5, 2, 7, 8], [9, 300, 301, 1, 1, 1]], kind), {0: 0, 1: 255, 5: 1})
    with pytest.raises(ValueError, match="unknown numbers -1: expected 0"):
        remap(np.array([[-1]]), {0: 0})


def drawn(progressive: bool) -> bytes:
    file, pixels = BytesIO(), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", progressive=progressive)
    return file.getvalue()


def photographed() -> bytes:
    root = os.environ.get("SCLIP_PHOTOS")
    if not root:
        pytest.skip("SCLIP_PHOTOS is not set: it names a folder with VOCdevkit/VOC2012")
    return min(Path(root, "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg")).read_bytes()


@pytest.mark.parametrize("jpeg", [partial(drawn, False), partial(drawn, True), photographed])
def test_jpegs_that_are_cut_short_are_noticed(jpeg: Callable[[], bytes], tmp_path: Path) -> None:
    key, whole = voc(tmp_path, [0]), jpeg()
    for length in (len(whole) // 2, len(whole) - 2):
        (tmp_path / IMAGE).write_bytes(whole[:length])
        with pytest.raises(BrokenImage, match=key):
            load_dataset("voc21", root=tmp_path).read(key)
