"""Training a system from pictures to scores: by the command, and a ViT-B/16 on photographs."""

import os
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open

from sclip_lab import Clip, Protocol, load, load_dataset, train_mvpseg, train_zegclip
from sclip_lab.__main__ import main
from sclip_lab.crops import photometric
from sclip_lab.images import MEAN, STD
from sclip_lab.splits import SPLITS
from sclip_lab.training import Schedule
from sclip_lab.zegclip import published


@pytest.mark.parametrize("system", ["zegclip", "mvpseg"])
def test_the_command_trains_scores_and_says_where_the_checkpoint_is(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.safetensors"
    asked = ["--model", "tiny", "--limit", "2", "--steps", "2", "--batch", "2", "--output", str(path), "--self-train"]
    assert main(["train", system, *asked]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in said[-5:-1]] == ["pixels", "seen", "unseen", "harmonic"]
    assert said[-1] == str(tmp_path / "run-self.safetensors")
    assert (tmp_path / "run-self.safetensors").is_file()
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("losses")) == 2


def test_a_checkpoint_of_another_recipe_or_teacher_is_refused(tmp_path: Path) -> None:
    clip, split, path = load("tiny", "cpu"), SPLITS["scenes"], tmp_path / "run.safetensors"
    dataset, once = load_dataset(split.dataset, split="train", limit=2), Schedule(1, batch=1)
    recipe = replace(train_zegclip.RECIPES[split.dataset], schedule=once)
    train_zegclip.learn(clip, dataset, split, recipe, checkpoint=path)
    for other in ({"templates": ("{}",)}, {"begin": published}, {"colours": photometric}, {"scales": (1.0, 1.0)}):
        with pytest.raises(ValueError, match=rf"^{path} is of ({next(iter(other))}|first weights) .*: delete it"):
            train_zegclip.learn(clip, dataset, split, replace(recipe, **other), checkpoint=path)

    own = train_mvpseg.RECIPES[split.dataset]
    own, student = replace(own, schedule=once, student=(once, once)), tmp_path / "student.safetensors"
    teachers = [train_mvpseg.learn(clip, dataset, split, own, seed)[0] for seed in (0, 1)]
    train_mvpseg.transfer(teachers[0], dataset, split, own, checkpoint=student)
    with pytest.raises(ValueError, match=r"is of teacher .*: delete it"):
        train_mvpseg.transfer(teachers[1], dataset, split, own, checkpoint=student)


def test_a_short_training_warms_up_for_a_tenth_at_most() -> None:
    recipe = train_mvpseg.RECIPES["voc20"].scheduled(steps=100)
    assert [schedule.warm_up for schedule in (recipe.schedule, *recipe.student)] == [10, 10, 10]
    assert train_zegclip.RECIPES["voc20"].scheduled(batch=4).schedule == Schedule(20_000, batch=4)


@pytest.mark.parametrize("source", [train_zegclip, train_mvpseg], ids=["zegclip", "mvpseg"])
def test_a_vit_b_16_learns_from_photographs_as_voc_15_5(source) -> None:
    root = os.environ.get("SCLIP_PHOTOS")
    if not root:
        pytest.skip("SCLIP_PHOTOS is not set: it names a folder with VOCdevkit/VOC2012")
    vision = open_clip.get_model_config("ViT-B-16-quickgelu")["vision_cfg"]
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    clip = Clip("random B/16", model.eval().requires_grad_(False), open_clip.SimpleTokenizer(), MEAN, STD)
    split = SPLITS["voc20"]
    dataset = replace(load_dataset(split.dataset, root, limit=2), split="train")  # all it has is "val"
    short = Schedule(8, batch=2, rate=5e-3, warm_up=1)
    recipe = replace(source.RECIPES["voc20"], schedule=short, protocol=Protocol(112, 112, 112), scales=(1, 1))
    trained, losses = source.learn(clip, dataset, split, recipe)
    assert losses[-2:].mean() < 0.9 * losses[:2].mean()
    image, truth = dataset.read(dataset.keys[0])
    assert source.labeller(trained, dataset, split, recipe)(image).shape == truth.shape
