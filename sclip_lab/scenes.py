"""The bundled world: pictures of things on stuff, with exact label maps and captions.

Picture i of a seed depends on (seed, i) alone. Randomness is NumPy's `RandomState`, whose stream is frozen by NumPy's
compatibility policy, and pixels are sampled in float32, so another machine gives the same picture to one grey level and
the same labels but for pixels on a border. Textures and sprites live in `surfaces.py`; this module composes them.

Letters: n pictures, H W height and width in pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sclip_lab import surfaces

STUFF = tuple(surfaces.STUFF)
THINGS = tuple(surfaces.THINGS)
NAMES = STUFF + THINGS

VOCABULARIES = {
    "full": NAMES,
    "things": THINGS,
    "background": ("background: " + "|".join(STUFF), *THINGS),
}

Pair = tuple[float, float] | np.ndarray

SIDE = 96  # pixels, of the pictures that training sees


@dataclass(frozen=True)
class Framing:
    """How much of the world a picture holds; a larger picture shows no more of it, but finer.

    zoom: range of scales, at 1 things are 0.27 to 0.52 of the short side wide; things: range of their number in a
    square at zoom 1 (there is always one); stuff: odds of one, two, ... regions.
    """

    zoom: tuple[float, float]
    things: tuple[float, float]
    stuff: tuple[float, ...]


CLOSE = Framing(zoom=(1.0, 1.8), things=(0.2, 1.0), stuff=(0.5, 0.5))
WIDE = Framing(zoom=(0.75, 1.35), things=(0.6, 3.6), stuff=(0.25, 0.5, 0.25))

_VISIBLE = 30  # pixels: what shows less is not worth a word


def draw(
    n: int, seed: int, size: tuple[int, int] = (96, 96), start: int = 0, framing: Framing = CLOSE
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures start .. start + n of a seed: images uint8 [n H W 3], labels uint8 [n H W] (index into NAMES), captions.

    A caption names everything that shows, things first, each group in random order: "bee and leaf on sky and brick".
    Raises ValueError where there is nothing to draw.
    """
    if n < 1 or min(size) < 16:
        raise ValueError(f"draw(n={n}, size={size}): at least one picture of at least 16x16 pixels was expected")
    pictures = [_picture(np.random.RandomState([seed, start + i]), size, framing) for i in range(n)]
    images, labels, captions = zip(*pictures, strict=True)
    return np.stack(images), np.stack(labels), list(captions)


def vocabulary_labels(labels: np.ndarray, vocabulary: str) -> np.ndarray:
    """Scene labels [.. H W] as indices into one of VOCABULARIES; 255, stuff where only things are asked, is ignored."""
    tables = {
        "full": np.arange(len(NAMES)),
        "things": np.r_[np.full(len(STUFF), 255), np.arange(len(THINGS))],
        "background": np.r_[np.zeros(len(STUFF), int), 1 + np.arange(len(THINGS))],
    }
    return tables[vocabulary].astype(np.uint8)[labels]


def _picture(rng: np.random.RandomState, size: tuple[int, int], framing: Framing) -> tuple[np.ndarray, np.ndarray, str]:
    zoom = rng.uniform(*framing.zoom) * min(size) / SIDE
    image, labels = _stuff(rng, size, zoom, framing.stuff)
    area = size[0] * size[1] / SIDE**2 / zoom**2
    for _ in range(max(1, round(area * rng.uniform(*framing.things)))):
        _add_thing(rng, image, labels, zoom)
    caption = _caption(rng, labels)
    return _light(rng, image), labels, caption


def _stuff(
    rng: np.random.RandomState, size: tuple[int, int], zoom: float, odds: tuple[float, ...]
) -> tuple[torch.Tensor, np.ndarray]:
    """One to three textured regions with wavy borders: image float [3 H W] in 0..1, labels uint8 [H W]."""
    chosen = rng.permutation(len(STUFF))[: 1 + rng.choice(len(odds), p=odds)]
    image, labels = torch.zeros(3, *size), np.zeros(size, np.uint8)
    for rank, stuff in enumerate(chosen):
        region = torch.ones(size, dtype=torch.bool) if rank == 0 else _beyond_wavy_line(rng, size, zoom)
        image = torch.where(region, _texture(rng, STUFF[stuff], size, zoom), image)
        labels[region.numpy()] = stuff
    return image, labels


def _beyond_wavy_line(rng: np.random.RandomState, size: tuple[int, int], zoom: float) -> torch.Tensor:
    """The part of the picture on one side of a wavy line, bool [H W]."""
    turn = rng.uniform(0, 2 * math.pi)
    grid = _turned_grid(size, turn, 1.0, (0, 0))[0]
    along, across = grid[..., 0], grid[..., 1]
    for k in (1, 2, 3):
        across = across + zoom * rng.uniform(1, 9 / k) * torch.sin(
            along * (k / (14 * zoom)) + rng.uniform(0, 2 * math.pi)
        )
    return across > rng.uniform(-0.25, 0.3) * min(size)


def _texture(rng: np.random.RandomState, stuff: str, size: tuple[int, int], zoom: float) -> torch.Tensor:
    """A randomly placed, slightly turned piece of a stuff's texture, float [3 H W]."""
    turn, place = rng.normal(0, 0.2), rng.uniform(-0.5, 0.5, 2)
    atlas = surfaces.texture(stuff)
    step = 2 / atlas.shape[-1] / (zoom * rng.uniform(0.85, 1.2))
    piece = _sample(atlas, _turned_grid(size, turn, step, place), "reflection")
    return piece * _tint(rng, 0.06)


def _add_thing(rng: np.random.RandomState, image: torch.Tensor, labels: np.ndarray, zoom: float) -> None:
    """Draw one thing over image [3 H W] and labels [H W], in place; its centre is inside the picture."""
    height, width = labels.shape
    thing = rng.randint(len(THINGS))
    radius = zoom * rng.uniform(13, 25)
    row, col = rng.uniform(0, height), rng.uniform(0, width)
    top, left = max(0, math.floor(row - radius)), max(0, math.floor(col - radius))
    bottom, right = min(height, math.ceil(row + radius)), min(width, math.ceil(col + radius))
    turn, sprite = rng.normal(0, 0.5), surfaces.sprite(THINGS[thing], rng.randint(surfaces.SPRITES))
    tint = _tint(rng, 0.06)
    if bottom - top < 2 or right - left < 2:
        return
    middle = ((top + bottom - 1) / 2 - row, (left + right - 1) / 2 - col)
    grid = _turned_grid((bottom - top, right - left), turn, 1 / radius, (0, 0), middle)
    piece = _sample(sprite, grid, "zeros")  # [4 h w]: colour and coverage
    solid = piece[3] > 0.5
    image[:, top:bottom, left:right][:, solid] = ((piece[:3] / piece[3].clamp_min(1e-3)) * tint)[:, solid]
    labels[top:bottom, left:right][solid.numpy()] = len(STUFF) + thing


def _turned_grid(
    size: tuple[int, int], turn: float, step: float, place: Pair, middle: Pair = (0.0, 0.0)
) -> torch.Tensor:
    """Positions [1 H W 2] of pixels that are `step` apart, turned about their middle, which `place` and `middle` shift:
    `place` in units of the surface, `middle` in pixels.
    """
    rows = torch.arange(size[0], dtype=torch.float32) - (size[0] - 1) / 2 + middle[0]
    cols = torch.arange(size[1], dtype=torch.float32) - (size[1] - 1) / 2 + middle[1]
    rows, cols = rows[:, None] * step, cols[None] * step
    grid = torch.empty(1, *size, 2)
    torch.add(math.cos(turn) * cols + place[1], math.sin(turn) * rows, out=grid[0, ..., 0])
    torch.add(math.cos(turn) * rows + place[0], -math.sin(turn) * cols, out=grid[0, ..., 1])
    return grid


def _sample(surface: torch.Tensor, grid: torch.Tensor, padding: str) -> torch.Tensor:
    return F.grid_sample(surface[None], grid, mode="bilinear", padding_mode=padding, align_corners=False)[0]


def _tint(rng: np.random.RandomState, spread: float) -> torch.Tensor:
    return torch.from_numpy(1 + rng.uniform(-spread, spread, (3, 1, 1))).float()


def _light(rng: np.random.RandomState, image: torch.Tensor) -> np.ndarray:
    """Brightness that varies across the picture, and pixel noise: float [3 H W] to uint8 [H W 3]."""
    _, height, width = image.shape
    slope_y, slope_x = rng.uniform(-0.12, 0.12, 2)
    shade = torch.linspace(-slope_y, slope_y, height)[:, None] + torch.linspace(-slope_x, slope_x, width)[None]
    noise = torch.from_numpy(rng.uniform(-1, 1, (height, width)).astype(np.float32)) * rng.uniform(0.01, 0.06)
    lit = image * (rng.uniform(0.8, 1.15) + shade) + noise
    return (lit.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _caption(rng: np.random.RandomState, labels: np.ndarray) -> str:
    pixels = np.bincount(labels.ravel(), minlength=len(NAMES))
    shown = [name for name, count in zip(NAMES, pixels, strict=True) if count >= _VISIBLE]
    things = [str(name) for name in rng.permutation(shown) if name in THINGS]
    stuff = [str(name) for name in rng.permutation(shown) if name in STUFF]
    return " on ".join(" and ".join(words) for words in (things, stuff) if words)
