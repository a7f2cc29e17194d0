"""Checking and downloading the owners' files, from a server on localhost that cuts connections."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import requests
import torch
from safetensors.torch import save

from sclip_lab import fetch, load
from sclip_lab.datasets import BENCHMARKS
from sclip_lab.fetch import ARCHIVES, Archive, check, get, pictures_of, verified
from sclip_lab.readers import LAYOUTS

CUT = 300_000  # bytes after which the server hangs up
NOISE = np.random.default_rng(0).bytes(1_000_000)  # does not compress


class Owner(ThreadingHTTPServer):
    """Serves `files` with or without ranges, hanging up after CUT bytes, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[str | None] = []
        self.ranges, self.cut = True, CUT


class Answer(BaseHTTPRequestHandler):
    server: Owner

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Range"])
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.server.ranges else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Owner() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def packed(name: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(stream, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz" if name.endswith("gz") else "w") as archive:
            for path, data in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def offer(owner: Owner, monkeypatch: pytest.MonkeyPatch, name: str, checksum: str | None = "") -> str:
    """Put an archive of VOC on the server, and its address into the table of archives; its address."""
    owner.files[f"/{name}"] = data = packed(name, {"VOCdevkit/VOC2012/JPEGImages/1.jpg": NOISE})
    url = f"http://127.0.0.1:{owner.server_port}/{name}"
    checksum = f"md5:{hashlib.md5(data).hexdigest()}" if checksum == "" else checksum
    monkeypatch.setitem(ARCHIVES, "voc2012", (Archive(name, "1 MB", "deep/er", ("image",), url, checksum),))
    return url


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_a_download_goes_on_after_cuts_and_is_verified_and_unpacked(owner, monkeypatch, tmp_path, name, capsys) -> None:
    offer(owner, monkeypatch, name)
    get("voc21", tmp_path)
    assert (tmp_path / "deep/er/VOCdevkit/VOC2012/JPEGImages/1.jpg").read_bytes() == NOISE
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in owner.asked]
    assert len(starts) >= 4
    assert starts[0] == 0
    assert all(0 < after - before <= CUT for before, after in pairwise(starts))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [name]
    assert "100%" in capsys.readouterr().out


def test_another_run_goes_on_where_one_gave_up(owner, monkeypatch, tmp_path) -> None:
    url = offer(owner, monkeypatch, "a.tar")
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr(fetch, "PATIENCE", 1)
    owner.cut = 0
    (tmp_path / "downloads/a.tar.part").write_bytes(owner.files["/a.tar"][:CUT])
    with pytest.raises(ConnectionError, match=rf"{url} broke off at {CUT} bytes .*: run this again") as error:
        get("voc2012", tmp_path)
    assert "\n" not in str(error.value)
    owner.cut = 10**9
    get("voc2012", tmp_path)
    assert owner.asked == [f"bytes={CUT}-"] * 2
    assert (tmp_path / "deep/er/VOCdevkit/VOC2012/JPEGImages/1.jpg").read_bytes() == NOISE


def test_what_is_whole_is_not_downloaded_again(owner, monkeypatch, tmp_path) -> None:
    offer(owner, monkeypatch, "a.tar")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/a.tar.part").write_bytes(owner.files["/a.tar"])  # killed just before it was renamed
    get("voc2012", tmp_path)
    get("voc2012", tmp_path)
    assert owner.asked == [f"bytes={len(owner.files['/a.tar'])}-"]


def test_a_longer_part_of_another_file_is_thrown_away(owner, monkeypatch, tmp_path) -> None:
    offer(owner, monkeypatch, "a.tar")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/a.tar.part").write_bytes(bytes(2 * len(owner.files["/a.tar"])))
    get("voc2012", tmp_path)
    assert (tmp_path / "deep/er/VOCdevkit/VOC2012/JPEGImages/1.jpg").read_bytes() == NOISE


def test_a_server_without_ranges_starts_over(owner, monkeypatch, tmp_path) -> None:
    offer(owner, monkeypatch, "a.tar")
    owner.ranges, owner.cut = False, 10**9
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/a.tar.part").write_bytes(b"of another sitting")
    get("voc2012", tmp_path)
    assert (tmp_path / "downloads/a.tar").read_bytes() == owner.files["/a.tar"]


def test_a_wrong_checksum_leaves_nothing_behind(owner, monkeypatch, tmp_path) -> None:
    offer(owner, monkeypatch, "a.tar", "md5:" + "0" * 32)
    with pytest.raises(ValueError, match=r"hash of downloaded file .* does not match"):
        get("voc2012", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    assert not list((tmp_path / "downloads").iterdir())


def test_an_unknown_checksum_is_said_to_be_and_computed(owner, monkeypatch, tmp_path, capsys) -> None:
    offer(owner, monkeypatch, "a.tar", None)
    get("voc2012", tmp_path)
    found = hashlib.sha256(owner.files["/a.tar"]).hexdigest()
    assert f"a.tar: no checksum is known to compare with, this one has sha256:{found}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("spoil", [lambda data: b"<html>Moved</html>", lambda data: data[:-100_000]])
def test_what_is_no_whole_archive_is_not_kept(owner, monkeypatch, tmp_path, name, spoil) -> None:
    offer(owner, monkeypatch, name, None)
    owner.files[f"/{name}"] = spoil(owner.files[f"/{name}"])
    with pytest.raises(ValueError, match=rf"{name} is no whole archive .* was removed") as error:
        get("voc2012", tmp_path)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_file_that_is_not_there_is_an_error_at_once(owner, monkeypatch, tmp_path) -> None:
    offer(owner, monkeypatch, "a.tar")
    owner.files.clear()
    with pytest.raises(requests.HTTPError, match="404"):
        get("voc2012", tmp_path)
    assert len(owner.asked) == 1


def test_what_needs_a_registration_is_not_tried() -> None:
    with pytest.raises(ValueError, match=r"cityscapes-dataset.com/downloads/ \(after a registration\)"):
        get("cityscapes", Path("data"))


def test_every_benchmark_has_archives_that_hold_all_its_parts() -> None:
    assert set(ARCHIVES) == set(LAYOUTS) == {row.pictures for row in BENCHMARKS.values()}
    for name, archives in ARCHIVES.items():
        assert {part for one in archives for part in one.holds} >= {"keys", "image", "mask"}, name
        assert all(bool(one.url) != bool(one.page) for one in archives)
        assert all(not one.url or one.url.endswith(f"/{one.name}") for one in archives)


def test_check_says_what_is_there_what_is_missing_and_where_to_get_it(tmp_path: Path) -> None:
    for path in ("JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/b.png"):
        (tmp_path / "VOCdevkit/VOC2012" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "VOCdevkit/VOC2012" / path).touch()
    listing = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("a\nb\n")
    found = {one.name: one for one in check(tmp_path)}
    assert list(found) == list(LAYOUTS)

    voc = found["voc2012"]
    mask = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a.png"
    assert (voc.pictures, voc.missing) == (2, {"mask": str(mask)})
    said = str(voc)
    assert said.startswith("voc2012 (voc21, voc20): 2 of 1449 pictures")
    assert ARCHIVES["voc2012"][0].url in said
    assert f"data get voc2012 --root {tmp_path}" in said

    city = str(found["cityscapes"])
    assert "missing image" in city
    assert "gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads/" in city
    assert "data get" not in city

    mask.touch()
    only, *others = check(tmp_path, ["voc21", "voc20"])
    assert (only.missing, others) == ({}, [])
    assert only.incomplete  # two pictures of 1449, whatever the owner's list says
    assert "pictures are missing" in str(only)
    assert ARCHIVES["voc2012"][0].url in str(only)


def test_check_calls_complete_what_has_all_pictures_and_masks(tmp_path: Path) -> None:
    masks = []
    for number in range(500):
        key = f"lindau/lindau_{number:06}"
        for path in (f"leftImg8bit/val/{key}_leftImg8bit.png", f"gtFine/val/{key}_gtFine_labelIds.png"):
            (tmp_path / "cityscapes" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cityscapes" / path).touch()
        masks.append(tmp_path / "cityscapes" / path)
    assert str(check(tmp_path, ["cityscapes"])[0]) == "cityscapes (cityscapes): complete, 500 of 500 pictures"
    assert not check(tmp_path, ["cityscapes"])[0].incomplete
    for mask in masks[7:9]:
        mask.unlink()
    said = str(check(tmp_path, ["cityscapes"])[0])
    assert said.startswith("cityscapes (cityscapes): 500 of 500 pictures\n")
    assert f"missing mask: {masks[7]} and 1 more" in said


def test_check_asks_only_for_the_archive_that_is_missing(tmp_path: Path) -> None:
    photograph = tmp_path / "coco_stuff164k/images/val2017/1.jpg"
    photograph.parent.mkdir(parents=True)
    photograph.touch()
    said = str(check(tmp_path, ["coco-stuff"])[0])
    assert "stuffthingmaps_trainval2017.zip" in said
    assert "zips/val2017.zip" not in said


def test_unknown_data_is_one_line() -> None:
    assert pictures_of("context59") == pictures_of("pascal-context") == "pascal-context"
    with pytest.raises(ValueError, match=r"unknown data 'coco': expected one of voc2012, .*coco-object"):
        pictures_of("coco")


# Published weights


def test_published_weights_are_what_their_owner_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The cache as Hugging Face's client makes it: a link, by a commit and a name, to a file named by its SHA-256.
    torch.manual_seed(0)
    nano: dict = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    }
    weights = save(open_clip.CLIP(**nano).state_dict())
    stated = hashlib.sha256(weights).hexdigest()
    repository = tmp_path / "models--someone--nano"
    blob, link = repository / "blobs" / stated, repository / "snapshots" / (40 * "c") / "open_clip_model.safetensors"
    for folder in (blob.parent, link.parent, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(40 * "c")
    blob.write_bytes(weights)
    link.symlink_to(f"../../blobs/{stated}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-nano", nano)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-nano", {"published": {"hf_hub": "someone/nano/"}})

    assert load("ViT-nano:published").image_size == 32
    broken = weights[:-1] + b"?"
    blob.write_bytes(broken)
    found = hashlib.sha256(broken).hexdigest()
    with pytest.raises(ValueError, match=rf"sha256:{found}, expected sha256:{stated}; remove {blob} to") as error:
        load("ViT-nano:published")
    assert "\n" not in str(error.value)
    assert verified(blob) == blob  # a name that nobody stated
