"""The benchmarks: the plain loop answers as the authors' code and as the lab, memory is what is claimed of it."""

from functools import partial
from types import SimpleNamespace

import growth
import memory
import pandas as pd
import pytest
import torch
from plain_loop import plain_loop, postprocess
from safetensors.torch import load_file
from setting import OBJECT, STUFF, VARIANTS, VOC, words
from test_label import authors_postprocess, cosines
from test_parity import CASES, REFERENCE, authors

from sclip_lab import Labelling, Protocol, load, logits, scenes
from sclip_lab.cost import peak
from sclip_lab.images import read
from sclip_lab.text import Queries

FULL = [name for name, case in CASES["cases"].items() if case["residual_and_mlp"] and case["crop"]]


@pytest.fixture(scope="module")
def clip():
    return load("tiny")


@pytest.mark.parametrize("photograph", CASES["images"])
@pytest.mark.parametrize("name", [name for name in FULL if not CASES["cases"][name]["pamr_steps"]])
def test_plain_loop_answers_as_the_authors_code(visual, name, photograph):
    case, found = CASES["cases"][name], load_file(REFERENCE / "queries.safetensors")
    mean, std = ([value / 255 for value in CASES[key]] for key in ("mean", "std"))
    clip = SimpleNamespace(visual=visual, mean=mean, std=std, device=torch.device("cpu"))
    asked = Queries(found["queries"], found["query_class"], [])
    protocol = Protocol(case["short_side"], case["crop"], case["stride"])
    labelling = Labelling(case["logit_scale"], case["prob_thd"], case["area_thd"])
    labels = plain_loop(clip, read(REFERENCE / photograph), asked, case["attention"], protocol, labelling)
    assert (labels.numpy() == authors(name, photograph)[2]).mean() >= 0.9999


@pytest.mark.parametrize("attention", ["csa", "vanilla", "identity", "blend", "window(size=7)", "naclip"])
@pytest.mark.parametrize("labelling", [Labelling(), Labelling(65, 0.5, 0.3)], ids=str)
def test_plain_loop_answers_as_the_lab(clip, attention, labelling):
    protocol, asked, same = Protocol(144, 96, 48), words(clip, VOC), []
    for picture in scenes.draw(3, 1, (160, 213))[0]:
        plain = plain_loop(clip, picture, asked, attention, protocol, labelling)
        found = logits(clip.visual, picture, asked.vectors, attention, protocol, mean=clip.mean, std=clip.std)
        same.append(plain == labelling(found, asked.query_class))
    assert torch.stack(same).float().mean() >= 0.9999


def test_the_thresholds_above_decide_something(clip):
    asked, picture = words(clip, VOC), scenes.draw(1, 1, (160, 213))[0][0]
    found = logits(clip.visual, picture, asked.vectors, "csa", Protocol(144, 96, 48), mean=clip.mean, std=clip.std)
    every = [Labelling(65), Labelling(65, 0.5), Labelling(65, 0.5, 0.3)]
    first, second, third = (labelling(found, asked.query_class) for labelling in every)
    assert (first != second).any()
    assert (second != third).any()


@pytest.mark.parametrize("labelling", [Labelling(), Labelling(65, 0.15), Labelling(65, 0.15, 0.1)], ids=str)
@pytest.mark.parametrize("query_class", [[0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5], range(11)], ids=["synonyms", "words"])
def test_postprocess_is_the_released_codes(query_class, labelling):
    found, query_class = cosines(11), torch.tensor(query_class)
    options = labelling.logit_scale, labelling.prob_thd, labelling.area_thd
    expected = authors_postprocess(found, query_class, *options)
    torch.testing.assert_close(postprocess(found, query_class, labelling), expected)


def test_vocabularies_are_of_the_benchmarks_sizes(clip):
    for synonyms, size in ((VOC, (21, 56)), (OBJECT, (81, 113)), (STUFF, (171, 171))):
        found = words(clip, synonyms)
        assert (len(found.names), len(found.vectors), len(found.query_class)) == (size[0], size[1], size[1])
    assert len(set(VARIANTS)) == 20


@pytest.mark.parametrize("labelling", [*memory.LABELLINGS, Labelling(65, 0.1, 0.1)], ids=str)
def test_labelling_needs_little_where_the_one_hot_maximum_needs_11_gb(labelling):
    assert peak(partial(memory.lab, labelling)) < 5e8
    assert memory.one_hot(labelling) > 11e9


def test_two_small_pictures_tell_what_a_third_one_holds():
    found, labelling = torch.rand(len(memory.QUERY_CLASS), 60, 80), Labelling(65, 0.1, 0.1)
    held = peak(partial(postprocess, found, memory.QUERY_CLASS, labelling))
    assert memory.one_hot(labelling, (60, 80)) == held


def test_memory_does_not_grow_with_images(clip):
    one, three = (growth.sweep(clip, images=number, short_side=96) for number in (1, 3))
    one()  # what is kept for later calls is made by now
    assert peak(three) == peak(one)


def test_exponent_of_a_power_and_of_noise_around_it():
    sizes = pd.Series([1, 2, 4, 8, 16])
    exact = growth.exponent(sizes, 3 * sizes**1.5)
    assert list(exact.values()) == pytest.approx([1.5] * 3)
    noisy = growth.exponent(sizes, 3 * sizes**1.5 * [1.0, 1.2, 0.9, 1.1, 1.0])
    assert noisy["low"] < 1.5 < noisy["high"]


def test_growth_measures_and_draws(clip, monkeypatch):
    monkeypatch.setattr(growth, "SIZES", {"short_side": (96, 144, 192), "side": (48, 96, 144)})
    table = growth.measured(clip, rounds=1)
    fits = growth.exponents(table)
    assert set(fits["quantity"]) == set(growth.SIZES)
    assert len(fits) == 2 * 2 * 2
    assert fits["exponent"].notna().all()
    assert len(growth.drawn(table, fits).axes) == 4
