"""What the benchmarks run on: a ViT-B/16, pictures, and vocabularies of the benchmarks' sizes.

Time depends on none of their values, so that random weights and word vectors do where no others are.
"""

import os
from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from sclip_lab import Clip, Labelling, Protocol, Readout, attention, load, load_dataset, scenes
from sclip_lab.datasets import Dataset
from sclip_lab.images import MEAN, STD
from sclip_lab.measure import Measurement
from sclip_lab.text import Queries

VARIANTS = (
    "csa", "vanilla", "identity", "qq", "kk", "vv", "blend", "projection", "random", "random(n=1, seed=1)",
    "sharpen", "sharpen(tau=4.0)", "sharpen(of='csa')", "window", "window(size=7)", "window(size=7, of='csa')",
    "borrow", "borrow(layer=7)", "naclip", "gem",
)  # fmt: skip
# Words of each class, as in the authors' vocabularies: 26 of the background, 7 of a person, 5 of a television
VOC = [26, *[1] * 14, 7, *[1] * 4, 5]
OBJECT = [26, 8, *[1] * 79]
STUFF = [1] * 171


def vit_b16(dtype: torch.dtype = torch.float32) -> Clip:
    """The model of SCLIP_MODEL, or a ViT-B/16 of random weights."""
    if name := os.environ.get("SCLIP_MODEL"):
        return load(name, dtype=dtype)
    from open_clip import CLIP, SimpleTokenizer, get_model_config

    torch.manual_seed(0)
    config = get_model_config("ViT-B-16")
    model = CLIP(**{key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}, quick_gelu=True)
    model = model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    return Clip("ViT-B-16 of random weights", model, SimpleTokenizer(), MEAN, STD)


def words(clip: Clip, synonyms: list[int]) -> Queries:
    """Random unit vectors for classes of so many words each."""
    generator = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(sum(synonyms), clip.model.visual.output_dim, generator=generator), dim=-1)
    query_class = torch.arange(len(synonyms)).repeat_interleave(torch.tensor(synonyms))
    return Queries(vectors, query_class, [f"class {number}" for number in range(len(synonyms))]).to(clip.device)


def pictures(number: int, labelling: Labelling) -> Dataset:
    """Photographs of VOC 2012 in the folder SCLIP_PHOTOS, or scenes of the same size where there is none."""
    if root := os.environ.get("SCLIP_PHOTOS"):
        found = load_dataset("voc21", root, limit=number)
        return Dataset("photographs", "photographs", (), found.keys, found.read, labelling)
    keys = tuple(map(str, range(number)))
    return Dataset("scenes", "scenes", (), keys, partial(_scene, size=(375, 500)), labelling)


def _scene(key: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, 1, size, start=int(key))
    return images[0], labels[0]


def markdown(frame: pd.DataFrame) -> str:
    """A table for README."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measurement(
    clip: Clip,
    dataset: Dataset,
    vocabulary: Queries,
    specs: Sequence[str],
    protocol: Protocol,
    readouts: Sequence[str] = ("full",),
) -> Measurement:
    """What `sweep` does with the pictures, the words being known."""
    variants = ((attention(spec), Readout.parse(key), (-1,), None) for spec, key in product(specs, readouts))
    return Measurement.of(clip, clip.name, protocol, product(variants, [(dataset, vocabulary)]), strict=True)
