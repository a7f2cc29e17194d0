"""Sweeps on a cluster, where a worker may die."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic, sleep

import pandas as pd
import pytest
import torch
from joblib import parallel_config

from sclip_lab import Protocol, load_dataset, sweep
from sclip_lab.parallel import in_shards, side_by_side
from sclip_lab.store import COUNTS

distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

KEYS = [str(number) for number in range(30)]
PATIENCE = 200  # seconds, on a busy machine


@pytest.fixture(scope="module")
def cluster(_cache) -> Iterator:
    """Three workers that are told nothing of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS")
        alike = {"n_workers": 3, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.CRITICAL}
        with distributed.LocalCluster(**alike) as cluster, distributed.Client(cluster), parallel_config("dask"):
            yield cluster


def test_all_workers_take_part_with_one_thread_each(cluster, tmp_path) -> None:
    def work(keys: Sequence[str]) -> list[tuple[int, int, int]]:
        (tmp_path / str(os.getpid())).touch()
        deadline = monotonic() + PATIENCE
        while len(list(tmp_path.iterdir())) < 3 and monotonic() < deadline:
            sleep(0.05)
        pool = set(side_by_side(lambda key: threading.get_ident(), KEYS))
        return [(os.getpid(), torch.get_num_threads(), len(pool))]

    workers, threads, pools = zip(*in_shards(work, KEYS, -1), strict=True)
    assert set(workers) == {worker.pid for worker in cluster.workers.values()}
    assert set(threads) == set(pools) == {1}


def test_with_a_worker_killed_midway_the_table_is_the_one_made_here(cluster, tmp_path, monkeypatch) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    scenes, variants, protocol = load_dataset("scenes-full", limit=24), ["csa", "identity"], Protocol(96, 96, 48)

    def read(key: str):
        again = any(seen.glob(f"{key}-*"))
        (seen / f"{key}-{os.getpid()}").touch()
        if key == "9" and not again:
            sleep(PATIENCE)  # with its shard half done, until killed
        return scenes.read(key)

    def kill() -> None:
        while len(list(seen.iterdir())) < 16 or not (held := list(seen.glob("9-*"))):
            sleep(0.05)
        pid = int(held[0].name.removeprefix("9-"))
        if pid in {worker.pid for worker in cluster.workers.values()}:
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path / "here"))
    here = sweep("tiny", scenes, variants, protocol, store="counts")
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path / "there"))
    threading.Thread(target=kill, daemon=True).start()
    there = sweep("tiny", replace(scenes, read=read), variants, protocol, store="counts", n_jobs=-1)

    assert len(list(seen.glob("8-*"))) == len(list(seen.glob("9-*"))) == 2, "no worker was killed"
    assert {path.name.partition("-")[0] for path in seen.iterdir()} == set(scenes.keys)
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert there[COUNTS].to_numpy().sum() > 0
    one, other = (tmp_path / place / "counts.parquet" for place in ("here", "there"))
    assert one.read_bytes() == other.read_bytes()
