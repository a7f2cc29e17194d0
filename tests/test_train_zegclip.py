"""ZegCLIP's recipes, from pictures to a model that was trained."""

from dataclasses import replace

import numpy as np
import torch

from sclip_lab import load, load_dataset
from sclip_lab.splits import SPLITS
from sclip_lab.train_zegclip import RECIPES, learn, self_train
from sclip_lab.training import Schedule
from sclip_lab.zegclip import published


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
