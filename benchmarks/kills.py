"""Sweeps that are killed (SIGKILL) at random moments, again and again, until they end by themselves: one table, always.

Each image is a piece on disk, so that some kills come while a file is being written. Prints Markdown and writes
data/results/kills.csv. Takes about a minute of processor time, and some minutes of waiting.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from sclip_lab import Clip, Protocol, load, store, sweep
from sclip_lab.files import home, replacing, results

SETS = ["scenes-full", "scenes-things"]
FIRST, SECOND = {"attentions": ["vanilla", "csa"]}, {"attentions": ["csa", "kk"]}
WAYS: dict[str, tuple[int, list[dict]]] = {  # least number of kills, sweeps at once
    "one sweep": (30, [FIRST]),
    "two sweeps, which overlap": (20, [FIRST, SECOND]),
    "one sweep on two processes (`n_jobs=2`)": (5, [FIRST | {"n_jobs": 2}]),
}


def measured(clip: Clip, name: str, options: dict) -> None:
    """One sweep, undisturbed."""
    sweep(
        "tiny" if "n_jobs" in options else clip, SETS, protocols=Protocol(96, 96, 48), limit=16, store=name, **options
    )


def started(clip: Clip, name: str, options: dict) -> int:
    """A process, leader of a group, for one sweep."""
    if not (process := os.fork()):
        try:
            with open(os.devnull, "w") as sys.stdout:
                measured(clip, name, options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.setpgid(process, process)
    return process


def ended(process: int) -> bool:
    """Whether a process did its work, or was killed before. Raises RuntimeError where it failed."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # workers wait for more work
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a sweep ended with {status}: expected its table, or a kill")
    return status == 0


def killed(clip: Clip, way: str, rng: Random) -> dict[str, str | int]:
    """One row: the same sweeps, killed until they end, until there were enough kills."""
    least, sweeps = WAYS[way]
    whole, begun = _file("whole", way), time.monotonic()
    for options in sweeps:
        ended(started(clip, whole.stem, options))
    seconds, heads = (time.monotonic() - begun) / len(sweeps), len(store.Store(whole).heads)
    row = dict.fromkeys(("runs", "identical", "kills", "in a file", "merging"), 0)
    while row["kills"] < least:
        path, left = _file(f"run {row['runs']}", way), sweeps
        while left:
            hidden = _hidden(path)
            running = [(started(clip, path.stem, options), options) for options in left]
            for process, _ in running:
                time.sleep(rng.uniform(0, seconds))
                os.killpg(process, signal.SIGKILL)
            left = [options for process, options in running if not ended(process)]
            row["kills"] += len(left)
            row["in a file"] += len(_hidden(path) - hidden)
            row["merging"] += len(left) * (len(store.Store(path).heads) == heads)
        row["runs"] += 1
        row["identical"] += path.read_bytes() == whole.read_bytes()
    return {"sweeps": way, **row}


def _file(name: str, way: str) -> Path:
    return results() / f"{list(WAYS).index(way)} {name}.parquet"


def _hidden(path: Path) -> set[Path]:
    return set(path.with_suffix(".pieces").glob(".*.parquet"))


def main() -> None:
    torch.set_num_threads(1)  # no thread of this process may be amid something when it forks
    store.EVERY = -1.0
    clip, rng = load("tiny", "cpu"), Random(0)
    table = home() / "data" / "results" / "kills.csv"
    with TemporaryDirectory() as folder:
        os.environ["SCLIP_RESULTS"] = folder
        frame = pd.DataFrame([killed(clip, way, rng) for way in WAYS])
    with replacing(table) as temporary:
        frame.to_csv(temporary, index=False)
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if not (frame["identical"] == frame["runs"]).all():
        raise SystemExit("a table differs from the one that nothing disturbed")


if __name__ == "__main__":
    main()
