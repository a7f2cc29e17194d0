"""Costs: operations against a count by hand, memory against torch's profiler and against known sizes."""

from functools import partial
from itertools import accumulate

import numpy as np
import pytest
import torch

from sclip_lab import Protocol, logits
from sclip_lab.cost import fastest, flops, peak

IMAGE = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
WINDOWS, WHOLE = Protocol(160, 96, 48), Protocol(160, 0)
QUERIES = 5


def label(visual, attention, protocol):
    vectors = torch.nn.functional.normalize(torch.ones(QUERIES, visual.output_dim), dim=-1)
    return partial(logits, visual, IMAGE, vectors, attention, protocol)


def by_hand(visual, maps, shape, rows, cols):
    """Multiply-adds of labelling IMAGE: `shape` = windows down and across, each of rows x cols patches; `maps`: n x n
    products of the last attention, scores and values."""
    block = visual.transformer.resblocks[0]
    layers, d, hidden = len(visual.transformer.resblocks), block.attn.embed_dim, block.mlp.c_fc.out_features
    windows, p, e = shape[0] * shape[1], rows * cols, visual.output_dim
    n = p + 1
    linear = 3 * n * d * d + n * d * d + 2 * n * d * hidden  # q k v, out_proj, MLP
    tower = 3 * visual.patch_size[0] ** 2 * d * p + layers * linear + (2 * (layers - 1) + maps) * n * n * d + n * d * e
    height, width = IMAGE.shape[:2]
    stitching = shape[0] * rows * width * (shape[1] * cols + height)
    return windows * (tower + p * e * QUERIES) + QUERIES * stitching


@pytest.mark.parametrize(("attention", "maps"), [("vanilla", 2), ("csa", 3)])
@pytest.mark.parametrize(("protocol", "cut"), [(WINDOWS, ((3, 4), 6, 6)), (WHOLE, ((1, 1), 10, 14))], ids=str)
def test_operations_are_those_of_a_count_by_hand(visual, attention, maps, protocol, cut):
    assert flops(label(visual, attention, protocol)) == 2 * by_hand(visual, maps, *cut)


@pytest.mark.parametrize("protocol", [WINDOWS, WHOLE], ids=str)
def test_memory_is_what_the_profiler_sees_allocated(visual, protocol):
    work = label(visual, "csa", protocol)
    work()  # what is kept for later calls is made by now
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    assert peak(work) == pytest.approx(max(accumulate(size for _, size in events)), rel=0.02)


def test_memory_of_known_sizes():
    old = torch.zeros(1000)

    def work():
        first = old + 1  # 4000 bytes
        square = torch.outer(first, first)  # 4 000 000, beside the 4000
        del first
        small = square.view(-1)[:250].clone()  # 1000
        del square
        return small * 2

    assert peak(work) == 4_004_000
    assert peak(lambda: old.view(10, 100).T) == 0


def test_works_take_turns_on_one_thread_each(request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    turns = []
    seconds = fastest([lambda: turns.append("a"), lambda: turns.append(torch.get_num_threads())], rounds=3)
    assert len(seconds) == 2
    assert turns == ["a", 1] * 3
    assert torch.get_num_threads() == 2
