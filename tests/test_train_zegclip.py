"""ZegCLIP's recipes, from pictures to scores, and the command that follows them."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sclip_lab import load, load_dataset
from sclip_lab.splits import SPLITS
from sclip_lab.train_zegclip import RECIPES, command, learn, self_train
from sclip_lab.training import Schedule
from sclip_lab.zegclip import published


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command(parser)
    options = parser.parse_args(arguments)
    return options.run(options)


def test_every_split_has_a_recipe() -> None:
    assert {split.dataset for split in SPLITS.values()} == set(RECIPES)


def test_published_recipes_are_the_authors() -> None:
    voc, coco = RECIPES["voc20"], RECIPES["coco-stuff"]
    assert (voc.schedule.steps, coco.schedule.steps) == (20_000, 80_000)
    assert (voc.prompts, coco.prompts) == (10, 100)
    for recipe in (voc, coco):
        assert recipe.schedule == Schedule(recipe.schedule.steps, 16, 2e-4, 1e-6, 0.9, 1500, 0.01)
        assert (str(recipe.protocol), recipe.scales, recipe.begin) == ("512/512/426", (0.5, 2.0), published)


def test_what_was_learned_inductively_is_gone_on_with_transductively() -> None:
    clip, split = load("tiny", device="cpu"), SPLITS["scenes"]
    dataset = load_dataset(split.dataset, split="train", limit=3)
    recipe = replace(RECIPES[split.dataset], schedule=Schedule(2, batch=2, rate=1e-3, warm_up=0))
    model, losses = learn(clip, dataset, split, recipe, seed=3)
    again, same = learn(clip, dataset, split, recipe, seed=3)
    before = model.decoder.match.q.weight.detach().clone()
    assert np.array_equal(losses, same)
    assert torch.equal(before, again.decoder.match.q.weight)
    assert self_train(model, dataset, split, recipe).shape == (1,)
    assert not torch.equal(before, model.decoder.match.q.weight)


def test_the_command_trains_scores_and_says_where_the_checkpoint_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.safetensors"
    asked = ["--model", "tiny", "--limit", "2", "--steps", "2", "--batch", "2", "--output", str(path), "--self-train"]
    assert run(*asked) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in said[-5:-1]] == ["pixels", "seen", "unseen", "harmonic"]
    assert said[-1] == str(tmp_path / "run-self.safetensors")
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("losses")) == 2
