"""Recipes for ZegCLIP and the command that follows them: `python -m sclip_lab train zegclip --split voc20`."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from sclip_lab.clip import Clip, load
from sclip_lab.crops import Crops, photometric
from sclip_lab.datasets import Dataset, load_dataset
from sclip_lab.files import chosen, home
from sclip_lab.losses import Loss, non_exclusive
from sclip_lab.protocol import Protocol
from sclip_lab.splits import SPLITS, Split, measure, zero_shot
from sclip_lab.training import Schedule, own_device, train
from sclip_lab.zegclip import (
    TEMPLATES,
    Descriptor,
    ZegClip,
    aligned,
    inductive,
    label,
    names,
    published,
    transductive,
    zegclip,
)


@dataclass(frozen=True)
class Recipe:
    """How to train on pictures of one kind. colours: what is done to them; templates: None for CLIP's 80."""

    schedule: Schedule
    protocol: Protocol
    scales: tuple[float, float] = (0.5, 2.0)
    colours: Callable[[np.random.RandomState, np.ndarray], np.ndarray] | None = photometric
    prompts: int = 10
    begin: Callable[[ZegClip], None] = published
    templates: tuple[str, ...] | None = TEMPLATES


PHOTOGRAPHS = Protocol(512, 512, 426)

# The authors' for VOC and COCO-Stuff (of templates they average 15 for it); what they did for Context is not known.
# The scenes' was chosen on pictures of the training split alone, of which it did not learn.
RECIPES = {
    "voc20": Recipe(Schedule(20_000), PHOTOGRAPHS),
    "context60": Recipe(Schedule(40_000), PHOTOGRAPHS),
    "coco-stuff": Recipe(Schedule(80_000), PHOTOGRAPHS, prompts=100, templates=None),
    "scenes-full": Recipe(
        Schedule(500, batch=4, rate=1e-3, warm_up=10), Protocol(144, 96, 48), (0.75, 1.5), None, begin=aligned
    ),
}


def learn(
    clip: Clip,
    dataset: Dataset,
    split: Split,
    recipe: Recipe,
    seed: int = 0,
    describe: type[nn.Module] = Descriptor,
    loss: Loss = non_exclusive,
    checkpoint: Path | None = None,
    watch: Callable[[list[float]], None] | None = None,
    workers: int = 0,
) -> tuple[ZegClip, np.ndarray]:
    """A ZegCLIP that was trained inductively on a training split, and the loss of every step. See `training.train`."""
    model = zegclip(clip, recipe.prompts, describe, seed, recipe.begin)
    texts = names(clip, dataset.classes, recipe.templates)
    pictures = _crops(dataset, split.inductive, recipe, seed)
    run = _made_with(model, dataset, split, recipe, loss)
    objective, schedule = inductive(clip, texts, split, loss), recipe.schedule
    return model, train(
        model, objective, pictures, schedule, seed, checkpoint, watch=watch, workers=workers, made_with=run
    )


def self_train(
    model: ZegClip,
    dataset: Dataset,
    split: Split,
    recipe: Recipe,
    seed: int = 0,
    loss: Loss = non_exclusive,
    checkpoint: Path | None = None,
    watch: Callable[[list[float]], None] | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Go on transductively with a model from `learn`, in place, for half as many steps; their losses."""
    texts = names(model.clip, dataset.classes, recipe.templates)
    pictures = _crops(dataset, split.transductive, recipe, seed)
    schedule = replace(recipe.schedule, steps=max(recipe.schedule.steps // 2, 1))
    run = _made_with(model, dataset, split, recipe, loss)
    objective = transductive(model.clip, texts, split, loss)
    return train(model, objective, pictures, schedule, seed, checkpoint, watch=watch, workers=workers, made_with=run)


def _made_with(model: ZegClip, dataset: Dataset, split: Split, recipe: Recipe, loss: Loss) -> dict[str, str]:
    parts = {"describe": type(model.describe).__name__, "loss": getattr(loss, "__name__", type(loss).__name__)}
    pictures = f"{len(dataset.keys)} of {dataset.name} at {recipe.scales} {recipe.protocol}"
    return {
        **parts,
        "model": model.clip.name,
        "prompts": str(recipe.prompts),
        "pictures": pictures,
        "split": str(split),
    }


def _crops(dataset: Dataset, hide: Callable[[np.ndarray], np.ndarray], recipe: Recipe, seed: int) -> Crops:
    protocol = recipe.protocol
    return Crops(dataset, hide, protocol.short_side, protocol.crop, recipe.scales, recipe.colours, seed)


def command(parser: argparse.ArgumentParser) -> None:
    """What the command takes; it is run by `options.run(options)`."""
    parser.add_argument("--split", choices=list(SPLITS), default="scenes", help="%(default)s")
    parser.add_argument("--model", default=chosen(), help="%(default)s")
    parser.add_argument("--root", type=Path, help="the folder of all data; SCLIP_DATA unless given")
    parser.add_argument("--limit", type=int, help="so many pictures, of those to learn from and of those to name")
    parser.add_argument(
        "--output", type=Path, help="the checkpoint; below data/cache, named after all this, unless given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, help="pictures of each process, instead of the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make a step")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead")
    parser.add_argument("--self-train", action="store_true", help="then go on transductively")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    split = SPLITS[options.split]
    recipe = RECIPES[split.dataset]
    asked = {"steps": options.steps, "batch": options.batch}
    asked = {key: value for key, value in asked.items() if value is not None}
    schedule = replace(recipe.schedule, **asked, accumulate=options.accumulate, precision=options.precision)
    recipe = replace(recipe, schedule=schedule)
    clip = load(options.model, own_device())
    learned = load_dataset(split.dataset, options.root, options.limit, "train")
    path = options.output or home() / "data" / "cache" / f"zegclip-{options.split}-{options.seed}.safetensors"
    model, _ = learn(clip, learned, split, recipe, options.seed, checkpoint=path, workers=options.workers)
    if options.self_train:
        path = path.with_stem(f"{path.stem}-self")
        self_train(model, learned, split, recipe, options.seed, checkpoint=path, workers=options.workers)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first
        shown = load_dataset(split.dataset, options.root, options.limit)
        texts = names(clip, shown.classes, recipe.templates)
        offset = 0.0 if options.self_train else 0.1
        named = partial(label, model, texts=texts, split=split, protocol=recipe.protocol, offset=offset)
        print(zero_shot(measure(named, shown, split.classes), split).round(1).to_string())
        print(path)
    return 0
