"""Pictures and masks as their owners lay them out, and folders of your own.

Paths are as seen from one root folder (SCLIP_DATA), in the tree that the SCLIP authors and MMSegmentation use: whoever
has that data need move nothing. Nor is anything to be converted: masks are remapped as they are read (`remap`).

PASCAL-Context is the exception. The authors read PNGs that MMSegmentation makes from trainval_merged.json with the
Detail API; here the owners' own 459-label .mat files are read, one per picture of VOC 2010's Main lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from sclip_lab import images
from sclip_lab.remap import remap

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class BrokenImage(ValueError):
    """A picture or mask that cannot be used. The message, one line, names the file: other pictures may be fine."""


@dataclass(frozen=True)
class Layout:
    """Where an owner keeps pictures and masks, with {split} and {key} in the paths.

    `keys`: a file that lists them, or where none is, None: the pictures that match `anywhere` in the place of the key.
    `variable`: the name of the mask in a .mat file. `splits`: the owner's words for "val" and "train".
    """

    image: str
    mask: str
    keys: str | None = None
    anywhere: str = "*"
    variable: str = ""
    splits: Mapping[str, str] = field(default_factory=lambda: {"val": "val", "train": "train"})

    def path(self, part: str, split: str, key: str = "") -> str:
        """The `part` ("image", "mask", "keys") of a picture, as seen from the root."""
        return str(getattr(self, part)).format(split=self.splits[split], key=key)


VOC2012, VOC2010, STUFF = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010", "coco_stuff164k"
STUFF10K, ADE, CITY = "coco_stuff10k", "ade/ADEChallengeData2016", "cityscapes"

LAYOUTS = {
    "voc2012": Layout(
        f"{VOC2012}/JPEGImages/{{key}}.jpg",
        f"{VOC2012}/SegmentationClass/{{key}}.png",
        f"{VOC2012}/ImageSets/Segmentation/{{split}}.txt",
    ),
    "pascal-context": Layout(
        f"{VOC2010}/JPEGImages/{{key}}.jpg",
        "pascal-context/trainval/{key}.mat",
        f"{VOC2010}/ImageSets/Main/{{split}}.txt",
        variable="LabelMap",
    ),
    "coco2017": Layout(
        f"{STUFF}/images/{{split}}2017/{{key}}.jpg",
        f"{STUFF}/annotations/{{split}}2017/{{key}}.png",
    ),
    "coco-stuff-10k": Layout(
        f"{STUFF10K}/images/{{key}}.jpg",
        f"{STUFF10K}/annotations/{{key}}.mat",
        f"{STUFF10K}/imageLists/{{split}}.txt",
        variable="S",
        splits={"val": "test", "train": "train"},
    ),
    "ade20k": Layout(
        f"{ADE}/images/{{split}}/{{key}}.jpg",
        f"{ADE}/annotations/{{split}}/{{key}}.png",
        splits={"val": "validation", "train": "training"},
    ),
    "cityscapes": Layout(
        f"{CITY}/leftImg8bit/{{split}}/{{key}}_leftImg8bit.png",
        f"{CITY}/gtFine/{{split}}/{{key}}_gtFine_labelIds.png",
        anywhere="*/*",
    ),
}


def keys(layout: Layout, root: Path, split: str) -> tuple[str, ...]:
    """The pictures of a split, in the owner's order or by name; none where nothing is there."""
    if layout.keys:
        listing = root / layout.path("keys", split)
        lines = listing.read_text().splitlines() if listing.is_file() else []
        return tuple(line.split()[0] for line in lines if line.strip())
    before, after = layout.path("image", split, "\0").split("\0")
    names = (path.relative_to(root).as_posix() for path in root.glob(before + layout.anywhere + after))
    return tuple(sorted(name.removeprefix(before).removesuffix(after) for name in names))


def read(layout: Layout, root: Path, split: str, table: Mapping[int, int], key: str) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H W 3] and its labels uint8 [H W]. Raises BrokenImage."""
    image, mask = (root / layout.path(part, split, key) for part in ("image", "mask"))
    return read_pair(image, mask, table, layout.variable)


def read_pair(image: Path, mask: Path, table: Mapping[int, int], variable: str = "") -> tuple[np.ndarray, np.ndarray]:
    """A picture and its labels, from two files. Raises BrokenImage if one is missing, broken or not the other's."""
    try:
        picture = images.read(image)
    except (OSError, ValueError) as error:
        raise BrokenImage(str(error)) from None
    numbers = _numbers(mask, variable)
    if numbers.shape != picture.shape[:2]:
        own, others = ("x".join(map(str, shape)) for shape in (numbers.shape, picture.shape[:2]))
        raise BrokenImage(f"mask {str(mask)!r} is {own} pixels, its image {others}: expected the same height and width")
    try:
        return picture, remap(numbers, table)
    except ValueError as error:
        raise BrokenImage(f"mask {str(mask)!r}: {error}") from None


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures in a folder, by stem. Raises ValueError for two of one stem, which would share a mask."""
    files = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURES]
    by_stem = {path.stem: path for path in files}
    if len(by_stem) < len(files):
        twice = next(path for path in files if by_stem[path.stem] != path)
        raise ValueError(f"{str(twice)!r} and {by_stem[twice.stem].name!r} have one stem: expected one picture a mask")
    return by_stem


def _numbers(path: Path, variable: str) -> np.ndarray:
    """An owner's mask as it is, [H W]."""
    if not path.is_file():
        raise BrokenImage(f"mask {str(path)!r}: no such file, expected the mask of the picture of that name")
    try:
        mask = loadmat(path)[variable] if variable else _indices(path)
    except Exception as error:  # decoders raise all sorts of things
        reason = str(error).partition("\n")[0].replace(str(path), "it")
        raise BrokenImage(f"mask {str(path)!r} cannot be decoded ({reason}): expected a whole file") from None
    if mask.ndim != 2:
        raise BrokenImage(f"mask {str(path)!r} is {list(mask.shape)}: expected numbers of classes [H W], not colours")
    return mask


def _indices(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        return np.asarray(mask)
