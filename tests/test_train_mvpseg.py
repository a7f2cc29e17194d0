"""MVP-SEG's recipes, from pictures to a model that was trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sclip_lab import load, load_dataset
from sclip_lab.splits import SPLITS
from sclip_lab.train_mvpseg import RECIPES, labeller, learn, student_labeller, transfer
from sclip_lab.training import Schedule, restore

SPLIT = SPLITS["scenes"]
TWO = Schedule(2, batch=2, rate=1e-3, warm_up=0)


def test_every_split_has_a_recipe_with_all_designs() -> None:
    assert {split.dataset for split in SPLITS.values()} == set(RECIPES)
    assert all(recipe.views == 3 and recipe.gamma and recipe.overlap_weight for recipe in RECIPES.values())


def test_a_student_s_steps_are_those_of_maskclip_plus() -> None:
    steps = {name: [schedule.steps for schedule in recipe.student] for name, recipe in RECIPES.items()}
    assert (steps["voc20"], steps["context60"], steps["coco-stuff"]) == ([2000, 18000], [4000, 36000], [8000, 72000])


def test_a_seed_gives_one_teacher_whose_student_learns_and_names_pictures(tmp_path: Path) -> None:
    clip, recipe = load("tiny", device="cpu"), replace(RECIPES["scenes-full"], schedule=TWO, student=(TWO, TWO))
    dataset = load_dataset("scenes-full", split="train", limit=3)
    teacher, losses = learn(clip, dataset, SPLIT, recipe, seed=3)
    again, same = learn(clip, dataset, SPLIT, recipe, seed=3)
    before = teacher.views.tokens.detach().clone()
    assert np.array_equal(losses, same)
    assert torch.equal(before, again.views.tokens)
    student, losses = transfer(teacher, dataset, SPLIT, recipe, checkpoint=tmp_path / "s.safetensors")
    assert losses.shape == (4,)
    assert torch.equal(before, teacher.views.tokens)
    first = student.prompts.tokens.detach().clone()
    restore(student, tmp_path / "s-taught.safetensors")
    assert not torch.equal(first, student.prompts.tokens)
    image, truth = dataset.read("0")
    for label in (
        labeller(teacher, dataset, SPLIT, recipe),
        student_labeller(student, teacher, dataset, SPLIT, recipe),
    ):
        assert label(image).shape == truth.shape


def test_designs_are_left_out_by_values() -> None:
    clip, dataset = load("tiny", device="cpu"), load_dataset("scenes-full", split="train", limit=2)
    plain = replace(RECIPES["scenes-full"], schedule=TWO, views=1, gamma=None, overlap_weight=0.0)
    model, losses = learn(clip, dataset, SPLIT, plain)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "views.tokens": (1, 8, 128),
        "log_tau": (),
    }
    assert np.isfinite(losses).all()
