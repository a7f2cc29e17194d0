"""The owners' files: which of them are there, what is missing, getting it, and whether it is what they published."""

import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

import pooch
import requests
from tqdm import tqdm

from sclip_lab import readers
from sclip_lab.datasets import BENCHMARKS
from sclip_lab.readers import LAYOUTS

PATIENCE = 5  # attempts in a row that bring nothing, before giving up


@dataclass(frozen=True)
class Archive:
    """An owner's file, to be unpacked into a folder as seen from the root, and what it `holds` of a readers.Layout.

    `checksum` is "md5:..." or the like; None: none is known, and what was downloaded is taken as it is. `page`: where
    its owner asks for a registration first; then there is no `url`.
    """

    name: str
    size: str
    into: str
    holds: tuple[str, ...]
    url: str = ""
    checksum: str | None = None
    page: str = ""


OXFORD, CALVIN = "https://thor.robots.ox.ac.uk/pascal/VOC", "http://calvin.inf.ed.ac.uk/wp-content/uploads/data"
CITYSCAPES = "https://www.cityscapes-dataset.com/downloads/"
ALL, PICTURES, MASKS = ("keys", "image", "mask"), ("keys", "image"), ("mask",)

# The checksums of VOC are torchvision's; those of COCO's pictures and ADE20K's stand in many public download scripts.
ARCHIVES = {
    "voc2012": (
        Archive(
            "VOCtrainval_11-May-2012.tar", "2.0 GB", ".", ALL,
            f"{OXFORD}/voc2012/VOCtrainval_11-May-2012.tar", "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
    ),
    "pascal-context": (
        Archive(
            "VOCtrainval_03-May-2010.tar", "1.3 GB", ".", PICTURES,
            f"{OXFORD}/voc2010/VOCtrainval_03-May-2010.tar", "md5:da459979d0c395079b5c75ee67908abb",
        ),
        Archive(
            "trainval.tar.gz", "31 MB", "pascal-context", MASKS,
            "https://www.cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
        ),
    ),
    "coco2017": (
        Archive(
            "val2017.zip", "0.8 GB", "coco_stuff164k/images", PICTURES,
            "http://images.cocodataset.org/zips/val2017.zip", "md5:442b8da7639aecaf257c1dceb8ba8c80",
        ),
        Archive(
            "stuffthingmaps_trainval2017.zip", "0.7 GB", "coco_stuff164k/annotations", MASKS,
            f"{CALVIN}/cocostuffdataset/stuffthingmaps_trainval2017.zip",
        ),
    ),
    "coco-stuff-10k": (
        Archive(
            "cocostuff-10k-v1.1.zip", "2.0 GB", "coco_stuff10k", ALL,
            f"{CALVIN}/cocostuffdataset/cocostuff-10k-v1.1.zip",
        ),
    ),
    "ade20k": (
        Archive(
            "ADEChallengeData2016.zip", "0.9 GB", "ade", ALL,
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),
    ),
    "cityscapes": (
        Archive("leftImg8bit_trainvaltest.zip", "11 GB", "cityscapes", PICTURES, page=CITYSCAPES),
        Archive("gtFine_trainvaltest.zip", "0.2 GB", "cityscapes", MASKS, page=CITYSCAPES),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What there is of a set of pictures: how many, of how many in the paper, and the first missing file per part."""

    name: str
    root: Path
    pictures: int
    expected: int
    missing: dict[str, str]

    @property
    def incomplete(self) -> bool:
        """Whether files are missing, or pictures: more than the few by which counts from memory may be wrong."""
        return bool(self.missing) or self.pictures < 0.99 * self.expected

    def __str__(self) -> str:
        users = ", ".join(name for name, row in BENCHMARKS.items() if row.pictures == self.name)
        whole = "complete, " if self.pictures == self.expected and not self.missing else ""
        lines = [f"{self.name} ({users}): {whole}{self.pictures} of {self.expected} pictures"]
        lines += [f"    missing {part}: {path}" for part, path in self.missing.items()]
        lines += ["    pictures are missing"] if self.incomplete and not self.missing else []
        parts = set(self.missing) or set(ALL if self.incomplete else ())
        wanted = [one for one in ARCHIVES[self.name] if set(one.holds) & parts]
        lines += [f"    get {_origin(one)}, unpack it into {self.root / one.into}" for one in wanted]
        if wanted and all(one.url for one in wanted):
            lines += [f"    or let `python -m sclip_lab data get {self.name} --root {self.root}` do it"]
        return "\n".join(lines)


def check(root: Path, names: Iterable[str] = ()) -> list[Found]:
    """What `root` holds of the named sets of pictures or datasets, or of all: of their "val" split."""
    return [_found(name, root) for name in dict.fromkeys(map(pictures_of, names)) or LAYOUTS]


def get(name: str, root: Path) -> None:
    """Download and unpack what a dataset needs: verified, with a progress bar, going on where an earlier try ended.

    Archives stay in `root`/downloads. Raises ValueError for a wrong checksum, a broken archive, or where the owner asks
    for a registration; ConnectionError where the connection was lost too often; requests' errors else.
    """
    pooch.get_logger().setLevel("WARNING")
    for archive in ARCHIVES[pictures_of(name)]:
        if not archive.url:
            raise ValueError(
                f"{name!r} has to be asked for: get {_origin(archive)}, unpack it into {root / archive.into}"
            )
        path = Path(pooch.retrieve(archive.url, archive.checksum, archive.name, root / "downloads", downloader=resume))
        if archive.checksum is None:
            print(f"{archive.name}: no checksum is known to compare with, this one has sha256:{pooch.file_hash(path)}")
        _unpack(path, root / archive.into)


def resume(url: str, output_file: Any, pooch: Any = None) -> None:
    """A downloader for pooch that keeps what it has got in a .part file, and asks for the rest after a cut connection.

    Raises ConnectionError after PATIENCE attempts in a row that brought nothing; the .part file stays for another run.
    """
    part = Path(output_file).parent / f"{url.rpartition('/')[2]}.part"
    tries = 0
    while tries < PATIENCE:
        before = _size(part)
        try:
            _append(url, part)
            part.replace(output_file)
            return
        except requests.HTTPError:
            raise
        except requests.RequestException as error:
            reason = str(error).partition("\n")[0]
            tries = 0 if _size(part) > before else tries + 1
            time.sleep(max(tries - 1, 0))
    raise ConnectionError(f"{url} broke off at {_size(part)} bytes ({reason}): run this again to go on from there")


def verified(path: Path) -> Path:
    """A file in Hugging Face's cache, if its SHA-256 is the one that its owner states, by which the cache names it.

    The hub's own client compares only sizes. Raises ValueError for another file. One that the cache could not name so,
    on a system without links, is taken as it is.
    """
    stated = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", stated) and (found := pooch.file_hash(path)) != stated:
        raise ValueError(
            f"{path} is not what its owner published: sha256:{found}, expected sha256:{stated}; "
            f"remove {path.resolve()} to download it anew"
        )
    return path


def pictures_of(name: str) -> str:
    """The set of pictures of a dataset's name, or of its own. Raises ValueError."""
    pictures = BENCHMARKS[name].pictures if name in BENCHMARKS else name
    if pictures not in LAYOUTS:
        raise ValueError(f"unknown data {name!r}: expected one of {', '.join(dict.fromkeys([*LAYOUTS, *BENCHMARKS]))}")
    return pictures


def _append(url: str, part: Path) -> None:
    have = _size(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable and have:
            if response.headers.get("Content-Range") != f"bytes */{have}":  # it is another file by now
                part.unlink()
                raise requests.ConnectionError("the file has changed")
            return
        response.raise_for_status()
        goes_on = response.status_code == requests.codes.partial_content
        have = have if goes_on else 0
        total = have + int(response.headers.get("Content-Length", 0)) or None
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, file=sys.stdout) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))


def _unpack(path: Path, folder: Path) -> None:
    print(f"unpacking {path} into {folder}")
    safe = {"filter": "data"} if ".tar" in path.name else {}
    try:
        shutil.unpack_archive(path, folder, **safe)  # type: ignore[arg-type]
    except (shutil.ReadError, BadZipFile, TarError, EOFError, zlib.error) as error:
        path.unlink()  # or it would be taken for the owner's next time
        raise ValueError(
            f"{path.name} is no whole archive ({error}), and was removed: try again, or get it by hand"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _origin(archive: Archive) -> str:
    where = archive.url or f"{archive.name} from {archive.page} (after a registration)"
    return f"{where} ({archive.size})"


def _found(name: str, root: Path) -> Found:
    layout = LAYOUTS[name]
    keys = readers.keys(layout, root, "val")
    expected = next(row.images for row in BENCHMARKS.values() if row.pictures == name)
    missing = {}
    for part in ("keys", "image", "mask"):
        paths = [layout.path(part, "val", key) for key in keys or ("*",)]
        absent = [path for path in dict.fromkeys(paths) if not (root / path).is_file()]
        if absent and getattr(layout, part):
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            missing[part] = f"{root / absent[0]}{more}"
    return Found(name, root, len(keys), expected, missing)
