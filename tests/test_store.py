"""Stored counts: an interrupted sweep goes on where it was, and ends in the same file."""

import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import count

import numpy as np
import pandas as pd
import pytest

from sclip_lab import Protocol, store, sweep
from sclip_lab.store import Store, read

APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload(["pytest", "sclip_lab.sweep"])
SWEEP = """
import sclip_lab, sclip_lab.store
sclip_lab.store.EVERY = 0
sclip_lab.sweep("tiny", ["scenes-full", "scenes-things"], ["csa", "identity"],
                 sclip_lab.Protocol(96, 96, 48), limit=6, store="ablation")
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def _sweep(attentions=("csa", "identity"), limit=2, **options):
    sets = ["scenes-full", "scenes-things"]
    return sweep("tiny", sets, list(attentions), Protocol(96, 96, 48), limit=limit, store="ablation", **options)


def test_a_killed_sweep_goes_on_and_ends_in_the_same_file(results, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    monkeypatch.setenv("SCLIP_RESULTS", str(whole))
    subprocess.run([sys.executable, "-c", SWEEP], check=True, capture_output=True)

    monkeypatch.setenv("SCLIP_RESULTS", str(results))
    running = subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.DEVNULL)
    while not (pieces := list(results.glob("ablation.pieces/[!.]*.parquet"))):
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not (results / "ablation.parquet").exists()

    # A count that no measurement could give shows that what was there is not measured again.
    part = pd.read_parquet(pieces[0])
    marked = part["image"] == part["image"].iloc[0]
    part.loc[marked, "predicted"] += 1_000_000
    part.to_parquet(pieces[0])
    subprocess.run([sys.executable, "-c", SWEEP], check=True, capture_output=True)
    assert not list(results.glob("ablation.pieces/*.parquet"))
    resumed, expected = (pd.read_parquet(folder / "ablation.parquet") for folder in (results, whole))
    assert (resumed["predicted"] >= 1_000_000).sum() == marked.sum()
    resumed.loc[resumed["predicted"] >= 1_000_000, "predicted"] -= 1_000_000
    pd.testing.assert_frame_equal(resumed, expected)


def test_what_is_stored_is_what_is_returned_and_nothing_else_is_measured(results, capsys):
    first = _sweep()
    assert re.search("image/s|s/image", capsys.readouterr().out)
    again = _sweep()
    assert capsys.readouterr().out == ""
    pd.testing.assert_frame_equal(again, first)
    more = _sweep(["kk", "csa"], limit=3)
    assert list(more["attention"].unique()) == ["kk", "csa"]
    assert set(more["image"]) == {"0", "1", "2"}
    pd.testing.assert_frame_equal(_sweep(), first)
    fresh = sweep("tiny", ["scenes-full", "scenes-things"], ["kk", "csa"], Protocol(96, 96, 48), limit=3)
    pd.testing.assert_frame_equal(more, fresh)
    stored = pd.read_parquet(results / "ablation.parquet")
    assert set(zip(stored["attention"], stored["image"], strict=True)) == {
        *[(name, image) for name in ("csa", "identity") for image in "01"],
        *[(name, image) for name in ("csa", "kk") for image in "012"],
    }


def test_an_error_midway_keeps_what_was_measured(results):
    def late(site):
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        _sweep(["csa", late])
    assert not (results / "ablation.parquet").exists()  # no image was whole
    _sweep(limit=1)
    before = (results / "ablation.parquet").read_bytes()
    with pytest.raises(RuntimeError, match="late"):
        _sweep(["kk", late], limit=1)
    assert (results / "ablation.parquet").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off"])
def test_a_file_that_is_no_table_is_named_in_one_line(results, content):
    results.mkdir()
    (results / "ablation.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"ablation\.parquet cannot be read .*move it away") as error:
        _sweep()
    assert "\n" not in str(error.value)
    assert (results / "ablation.parquet").read_bytes() == content


def test_another_table_is_refused(results):
    results.mkdir()
    pd.DataFrame({"miou": [1.0]}).to_parquet(results / "ablation.parquet")
    with pytest.raises(ValueError, match=r"ablation\.parquet cannot be read .*expected the counts of a sweep"):
        _sweep()


def records(start, stop):
    """What a sweep finds in the pictures of these numbers: the same whenever it looks."""
    for number in range(start, stop):
        counts = np.random.default_rng(number).integers(0, 9000, (2, 5, 3))
        heads = [("tiny", "scenes", "96", "argmax", name, "full", "-1", str(number)) for name in ("csa", "vanilla")]
        yield [(head, list("abcde"), table) for head, table in zip(heads, counts, strict=True)]


def write(path, start, stop):
    """A sweep as its store sees it: of each picture that is not known comes a piece, and at last they are merged."""
    with Store(path) as table:
        for group in records(start, stop):
            if group[0][0] not in table.heads:
                table.add(group)


def piecewise(work, *arguments):
    store.EVERY = -1.0  # each picture is a piece
    work(*arguments)


def started(work, *arguments):
    """A process of its own that does this and no more.

    It is forked from a small one without threads: from this one, which grows with the tests before, it would take long.
    """
    process = APART.Process(target=piecewise, args=(work, *arguments))
    process.start()
    return process


def ended(process):
    """Whether a process did its work, or was killed before."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """The file of twelve pictures that nothing disturbed, where each picture is a piece, and the seconds it took."""
    monkeypatch.setattr(store, "EVERY", -1.0)
    path = tmp_path / "whole" / "ablation.parquet"
    write(path, 0, 1)
    begun = time.monotonic()
    write(path, 0, 12)
    assert list(path.parent.iterdir()) == [path]
    return path.read_bytes(), time.monotonic() - begun


def killed_within(seconds, rng, processes):
    """Kills each at a random moment, unless it has ended before; the number of those that it met."""
    for process in processes:
        time.sleep(rng.uniform(0, seconds))
        process.kill()
    return sum(not ended(process) for process in processes)


@pytest.mark.parametrize("parts", [[(0, 12)], [(0, 8), (4, 12)]], ids=["one", "two at once"])
def test_killed_at_random_moments_it_ends_in_the_same_file(tmp_path, whole, parts):
    (expected, seconds), rng, kills = whole, random.Random(0), 0
    while kills < 25:
        path, patience = tmp_path / str(kills) / "ablation.parquet", seconds
        while met := killed_within(patience, rng, [started(write, path, *part) for part in parts]):
            kills += met
            patience *= 1.2  # however slow the machine is, they end at last
        assert path.read_bytes() == expected
        assert not list(path.parent.glob("*/*"))


def step_by_step(path, step):
    """Writes two pictures, and is killed before this step on the disk."""

    def hook(event, _):
        nonlocal step
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"):
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write(path, 0, 2)


def test_killed_at_each_step_it_ends_in_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "EVERY", -1.0)
    write(tmp_path / "whole.parquet", 0, 2)
    expected = (tmp_path / "whole.parquet").read_bytes()
    for step in count():
        path = tmp_path / str(step) / "ablation.parquet"
        if ended(started(step_by_step, path, step)):
            break
        write(path, 0, 2)
        assert path.read_bytes() == expected
        assert not list(path.parent.glob("*/*"))
    assert step > 20


def with_little_room(path, room):
    """Writes twelve pictures where no file may be larger than this, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises(OSError, match=r"ablation\.parquet \(.*too large.*\): make room") as error:
        write(path, 0, 12)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pieces", [0, 9])  # that there is room for
def test_a_full_disk_loses_nothing_that_was_there(tmp_path, whole, pieces):
    room = len(whole[0]) - 1 if pieces else 100
    path = tmp_path / "full" / "ablation.parquet"
    write(path, 0, 3)
    before = path.read_bytes()
    assert ended(started(with_little_room, path, room))
    assert path.read_bytes() == before
    assert len(list(path.parent.glob("*.pieces/[!.]*.parquet"))) == pieces
    write(path, 0, 12)
    assert path.read_bytes() == whole[0]


def test_a_damaged_piece_is_named_and_nothing_removed(tmp_path, whole):
    path = tmp_path / "ablation.parquet"
    write(path, 0, 3)
    table = Store(path)
    for group in records(3, 6):
        table.add(group)
    piece = sorted(path.with_suffix(".pieces").glob("*.parquet"))[1]
    piece.write_bytes(piece.read_bytes()[:-100])
    before = content(tmp_path)
    for attempt in (table.merge, lambda: Store(path)):
        with pytest.raises(ValueError, match=rf"{piece} cannot be read .*move it away") as error:
            attempt()
        assert "\n" not in str(error.value)
        assert {name: data for name, data in content(tmp_path).items() if name in before} == before
    piece.unlink()
    write(path, 0, 12)
    assert path.read_bytes() == whole[0]


def test_no_flipped_bit_is_another_count(tmp_path, whole):
    path, rng = tmp_path / "ablation.parquet", random.Random(0)
    path.write_bytes(whole[0])
    expected, refused = read(path), 0
    for place in rng.sample(range(len(whole[0])), 200):
        flipped = bytearray(whole[0])
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read(path)
        except ValueError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(found.astype(str), expected.astype(str))
    assert refused > 100
