"""Batches, shards and threads, against doing one after the other."""

import os
import signal
from threading import Lock

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from setting import VARIANTS

from sclip_lab import Clip, Protocol, load, load_dataset, registry, scenes, sweep
from sclip_lab.datasets import Dataset
from sclip_lab.measure import Measurement
from sclip_lab.parallel import in_batches, in_shards
from sclip_lab.readout import Readout
from sclip_lab.registry import attention
from sclip_lab.store import COUNTS
from sclip_lab.text import queries

PROTOCOL = Protocol(96, 96, 48)
KEYS = [str(number) for number in range(150)]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost_or_done_twice() -> None:
    tried, done = [], []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)
        return [2 * number for number in batch]

    assert list(in_batches(int, work, KEYS)) == [2 * number for number in range(150)]
    assert done == list(range(150))
    assert tried == [64, 32, 16, *[8] * 18, 6]


def test_what_does_not_fit_by_itself_ends_it() -> None:
    def work(batch: list[str]) -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(str, work, KEYS[:3]))


def test_a_failure_while_reading_ahead_is_the_callers() -> None:
    def read(key: str) -> str:
        return key if int(key) < 70 else str(1 / 0)

    with pytest.raises(ZeroDivisionError):
        list(in_batches(read, list, KEYS))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny")


def _upright(key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, 1, (160, 213) if int(key) % 2 else (213, 160), start=int(key))
    return images[0], labels[0]


def test_pictures_of_several_shapes_in_a_batch_are_counted_as_one_by_one(clip: Clip) -> None:
    full = load_dataset("scenes-full")
    mixed = Dataset("mixed", "mixed", full.classes, tuple(KEYS[:4]), _upright)
    wanted = [
        ((attention(spec), Readout(), (-1,), None), (mixed, queries(clip, mixed.classes))) for spec in ("csa", "naclip")
    ]
    for protocol in (PROTOCOL, Protocol(96, 0)):  # windows of one shape, and of two
        work = Measurement.of(clip, clip.name, protocol, wanted, strict=False)
        pictures = [work.read(key) for key in mixed.keys]
        together, alone = work.count(pictures), [work.count([picture])[0] for picture in pictures]
        for one, other in zip(together, alone, strict=True):
            assert [head for head, *_ in one] == [head for head, *_ in other]
            # Products of other sizes round otherwise: a pixel between two classes may fall to the other side.
            assert all(np.abs(a - b).sum() <= 4 for (*_, a), (*_, b) in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])  # the second answers at the end only
def test_shards_are_of_all_keys_and_every_one_is_done_once(backend: str) -> None:
    with parallel_config(backend):
        assert sorted(in_shards(list, KEYS, 2)) == sorted(KEYS)


@pytest.mark.parametrize("spec", [*registry.variants(), *VARIANTS])
def test_every_variant_can_be_sent(spec: str) -> None:
    assert registry.canonical(cloudpickle.loads(cloudpickle.dumps(attention(spec)))) == registry.canonical(spec)


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_what_cannot_be_sent_is_refused(backend: str) -> None:
    lock = Lock()
    with parallel_config(backend), pytest.raises(TypeError, match=r"cannot be sent .*lock.*n_jobs=None measures in th"):
        list(in_shards(lambda keys: [lock], KEYS, 2))


def test_a_process_that_is_killed_ends_the_sweep_in_one_line() -> None:
    with parallel_config("loky"), pytest.raises(RuntimeError, match=r"one of n_jobs=2 processes was killed: .* kept"):
        list(in_shards(lambda keys: os.kill(os.getpid(), signal.SIGKILL), KEYS, 2))


def test_processes_measure_what_threads_do_with_attentions_of_ones_own() -> None:
    def mine(site):
        return (site.scale * site.q @ site.q.mT).softmax(-1)

    variants = ["csa", "window(size=3)", "random(n=2)", mine]
    here = sweep("tiny", ["scenes-full", "scenes-things"], variants, PROTOCOL, limit=5)
    there = sweep("tiny", ["scenes-full", "scenes-things"], variants, PROTOCOL, limit=5, n_jobs=2)
    pd.testing.assert_frame_equal(there, here)
    assert there[COUNTS].to_numpy().sum() > 0
