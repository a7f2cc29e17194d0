"""Stored counts: an interrupted sweep goes on where it was, and ends in the same file."""

import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from sclip_lab import Protocol, sweep

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
