"""What the recipes of all systems share, and the command that follows them: `python -m sclip_lab train SYSTEM`."""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from torch import nn

from sclip_lab.clip import Clip, load
from sclip_lab.crops import Crops, photometric
from sclip_lab.datasets import Dataset, load_dataset
from sclip_lab.files import cache, chosen, plain
from sclip_lab.protocol import Protocol
from sclip_lab.splits import SPLITS, Split, measure, zero_shot
from sclip_lab.training import Schedule, own_device
from sclip_lab.trials import Labeller


@dataclass(frozen=True)
class Recipe:
    """How to train on pictures of one kind. colours: what is done to them."""

    SCHEDULES: ClassVar[tuple[str, ...]] = ("schedule",)  # fields that a run may be told by its own schedule instead

    schedule: Schedule
    protocol: Protocol
    scales: tuple[float, float] = (0.5, 2.0)
    colours: Callable[[np.random.RandomState, np.ndarray], np.ndarray] | None = photometric

    def crops(self, dataset: Dataset, hide: Callable[[np.ndarray], np.ndarray], seed: int) -> Crops:
        """Pictures to learn from, their labels hidden."""
        return Crops(dataset, hide, self.protocol.short_side, self.protocol.crop, self.scales, self.colours, seed)

    def scheduled(self, **asked: Any) -> Self:
        """The same with some of each `Schedule` as asked for, of which a tenth at most warms up."""
        return replace(self, schedule=scheduled(self.schedule, **asked))

    def made_with(self, clip: Clip, dataset: Dataset, split: Split) -> dict[str, str]:
        """What tells a run of this recipe from others, beside the system and its schedules."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        named = {key: getattr(value, "__name__", str(value)) for key, value in own.items() if key not in self.SCHEDULES}
        return {"model": clip.name, "pictures": f"{len(dataset.keys)} of {dataset.name}", "split": str(split), **named}


def scheduled(schedule: Schedule, **asked: Any) -> Schedule:
    """A schedule with some of it as asked for, of which a tenth at most warms up."""
    changed = replace(schedule, **asked)
    return replace(changed, warm_up=min(changed.warm_up, changed.steps // 10))


class Trainable(NamedTuple):
    """A system that `command` can train: its name, a recipe for each dataset, and two stages.

    learned (clip, dataset, split, recipe, seed, checkpoint, workers) -> a model, and what labels pictures with it;
    gone_on (model, dataset, split, recipe, seed, checkpoint, workers) -> the same, after transductive training.
    """

    name: str
    recipes: Mapping[str, Any]
    learned: Callable[..., tuple[nn.Module, Labeller]]
    gone_on: Callable[..., tuple[nn.Module, Labeller]]


def command(parser: argparse.ArgumentParser, system: Trainable) -> None:
    """What the command takes; it is run by `options.run(options)`."""
    parser.add_argument("--split", choices=list(SPLITS), default="scenes", help="%(default)s")
    parser.add_argument("--model", default=chosen(), help="%(default)s")
    parser.add_argument("--root", type=Path, help="the folder of all data; SCLIP_DATA unless given")
    parser.add_argument("--limit", type=int, help="so many pictures, of those to learn from and of those to name")
    parser.add_argument(
        "--output", type=Path, help="the checkpoint; in data/cache, named by model, split and seed, unless given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, help="pictures of each process, instead of the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make a step")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures ahead")
    parser.add_argument("--self-train", action="store_true", help="then go on transductively")
    parser.set_defaults(run=lambda options: _run(system, options))


def _run(system: Trainable, options: argparse.Namespace) -> int:
    split = SPLITS[options.split]
    recipe = system.recipes[split.dataset]
    asked = {"steps": options.steps, "batch": options.batch}
    asked = {key: value for key, value in asked.items() if value is not None}
    recipe = recipe.scheduled(**asked, accumulate=options.accumulate, precision=options.precision)
    learned, shown = (load_dataset(split.dataset, options.root, options.limit, part) for part in ("train", "val"))
    clip = load(options.model, own_device())
    name = f"{system.name}-{plain(options.model)}-{options.split}-{options.seed}.safetensors"
    path = options.output or cache() / name
    model, label = system.learned(clip, learned, split, recipe, options.seed, path, options.workers)
    if options.self_train:
        path = path.with_stem(f"{path.stem}-self")
        model, label = system.gone_on(model, learned, split, recipe, options.seed, path, options.workers)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first
        print(zero_shot(measure(label, shown, split.classes), split).round(1).to_string())
        print(path)
    return 0
