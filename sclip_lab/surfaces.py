"""What the bundled world is made of: textures of stuff and sprites of things, drawn once and sampled by `scenes.py`.

Each function is one material. A texture is a square [3 s s] of colours in 0..1, at one texture pixel to one picture
pixel; its pattern is coarser than a patch, so that a patch sees a fragment and only its surroundings tell which. A
sprite is a square [4 s s] over -1..1 in u (right) and v (down): colour, already multiplied by coverage, and coverage.
"""

import functools
import zlib

import numpy as np
import torch
import torch.nn.functional as F

Random = np.random.RandomState

SPRITES = 12  # individuals of each thing
_TEXTURE_SIDE, _SPRITE_SIDE = 512, 112


@functools.cache
def texture(stuff: str) -> torch.Tensor:
    """The texture of a stuff, float [3 512 512]."""
    rng = np.random.RandomState(zlib.crc32(stuff.encode()))
    y, x = np.mgrid[:_TEXTURE_SIDE, :_TEXTURE_SIDE].astype(np.float64)
    return _tensor(STUFF[stuff](rng, x, y))


@functools.cache
def sprite(thing: str, individual: int) -> torch.Tensor:
    """One individual of a thing, float [4 112 112]: colour times coverage, coverage."""
    rng = np.random.RandomState([zlib.crc32(thing.encode()), individual])
    v, u = (np.mgrid[:_SPRITE_SIDE, :_SPRITE_SIDE] + 0.5) / _SPRITE_SIDE * 2 - 1
    colour, inside = THINGS[thing](rng, u, v)
    coverage = inside.astype(np.float64)
    return _tensor(np.dstack([colour * coverage[..., None], coverage]))


def _tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.clip(0, 1)).float().permute(2, 0, 1).contiguous()


def _rgb(*values: int) -> np.ndarray:
    return np.array(values) / 255


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours a where share is 0 and b where it is 1, [.. 3]."""
    return a + (b - a) * share.clip(0, 1)[..., None]


def _noise(rng: Random, cell_rows: float, cell_cols: float, side: int = _TEXTURE_SIDE) -> np.ndarray:
    """Smooth noise of unit variance, roughly, with cells of the given size in pixels [s s]."""
    coarse = rng.normal(size=(int(side / cell_rows) + 3, int(side / cell_cols) + 3))
    fine = F.interpolate(torch.from_numpy(coarse)[None, None], size=(side, side), mode="bicubic", align_corners=True)
    return fine[0, 0].numpy() * 1.4


# Stuff: (rng, x, y) -> [s s 3], x and y in pixels


def grass(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    blades = _noise(rng, 7, 2.5) + 0.7 * _noise(rng, 14, 5)
    clumps = _noise(rng, 26, 26)
    return _mix(_rgb(28, 84, 22), _rgb(110, 178, 60), 0.45 + 0.16 * blades + 0.2 * clumps)


def sky(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    clouds = _noise(rng, 30, 44) + 0.5 * _noise(rng, 12, 18)
    return _mix(_rgb(74, 142, 232), _rgb(250, 252, 255), (clouds - 0.35) * 0.8)


def water(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    crest = np.sin(y / 2.6 + 2.2 * _noise(rng, 22, 34)) + 0.35 * _noise(rng, 3, 9)
    return _mix(_rgb(14, 52, 112), _rgb(74, 148, 190), 0.4 + 0.38 * crest)


def sand(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    ripple = np.sin(y / 4.2 + x / 11 + 2.4 * _noise(rng, 36, 36))
    return _mix(_rgb(188, 152, 98), _rgb(240, 214, 160), 0.5 + 0.22 * ripple + 0.16 * _noise(rng, 1.5, 1.5))


def brick(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = (y // 11).astype(int)
    col = ((x + 13 * (row % 2)) // 26).astype(int)
    shade = rng.normal(0, 0.22, (row.max() + 1, col.max() + 1))[row, col]
    bricks = _mix(_rgb(128, 42, 30), _rgb(196, 92, 68), 0.45 + shade + 0.12 * _noise(rng, 2, 2))
    mortar = (y % 11 < 1.8) | ((x + 13 * (row % 2)) % 26 < 1.8)
    return np.where(mortar[..., None], _rgb(206, 196, 184), bricks)


def wood(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    plank = (x // 30).astype(int)
    shade = rng.normal(0, 0.2, plank.max() + 1)[plank]
    grain = np.sin(x / 1.9 + 3.2 * _noise(rng, 60, 12)) + 0.4 * _noise(rng, 16, 1.5)
    planks = _mix(_rgb(96, 56, 26), _rgb(178, 118, 66), 0.5 + shade + 0.24 * grain)
    return np.where((x % 30 < 1.6)[..., None], _rgb(50, 28, 14), planks)


def snow(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    drift = _noise(rng, 20, 46) + 0.35 * _noise(rng, 8, 14)
    return _mix(_rgb(252, 253, 255), _rgb(176, 196, 226), drift * 0.34 + 0.1) + 0.02 * _noise(rng, 1.5, 1.5)[..., None]


def lava(rng: Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    crust = np.abs(_noise(rng, 22, 22)) + 0.3 * np.abs(_noise(rng, 7, 7))
    glow = _mix(_rgb(255, 196, 40), _rgb(214, 54, 8), crust * 2.2)
    return _mix(glow, _rgb(36, 12, 10) + 0.04 * _noise(rng, 4, 4)[..., None], (crust - 0.42) * 5)


# Things: (rng, u, v) -> colours [s s 3], inside [s s]; u and v in -1..1


def ladybug(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.hypot(u, v) < 0.96
    colour = _paint(u, _rgb(214, 28, 24))
    for cu, cv in [(-0.45, -0.15), (0.45, -0.15), (-0.42, 0.45), (0.42, 0.45), (-0.72, 0.15), (0.72, 0.15)]:
        spot = np.hypot(u - cu - rng.normal(0, 0.05), v - cv - rng.normal(0, 0.05)) < rng.uniform(0.15, 0.22)
        colour[spot] = _rgb(16, 12, 12)
    colour[(np.abs(u) < 0.06) | (v < -0.58)] = _rgb(16, 12, 12)
    return colour, inside


def bee(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = (u / 0.96) ** 2 + (v / 0.66) ** 2 < 1
    stripe = np.sin(u * rng.uniform(8.5, 10.5) + rng.uniform(0, 6.3)) > 0.1
    colour = np.where(stripe[..., None], _rgb(18, 16, 10), _rgb(250, 204, 22))
    wings = (np.hypot((u - 0.05) / 0.42, (v + 0.66) / 0.34) < 1) & ~body
    colour[wings] = _rgb(226, 236, 240)
    return colour, body | wings


def zebra(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = (u / 0.8) ** 2 + ((v - 0.02) / 0.5) ** 2 < 1
    legs = (np.abs(np.abs(u) - 0.5) < 0.13) & (v > 0) & (v < 0.95)
    head = np.hypot((u + 0.72) / 0.28, (v + 0.5) / 0.4) < 1
    stripe = np.sin(u * rng.uniform(13, 16) + 1.5 * np.sin(2 * v + rng.uniform(0, 6.3))) > 0
    return np.where(stripe[..., None], _rgb(14, 14, 16), _rgb(244, 242, 240)), body | legs | head


def watermelon(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(u, v + 0.5) / 1.42
    inside = (radius < 1) & (v > -0.5) & (np.abs(u) < 1)
    colour = _paint(u, _rgb(226, 52, 70))
    for cu in np.linspace(-0.7, 0.7, 6):
        for cv in (-0.25, 0.1):
            seed = np.hypot((u - cu - rng.normal(0, 0.05)) / 0.05, (v - cv - rng.normal(0, 0.05)) / 0.09) < 1
            colour[seed] = _rgb(24, 14, 14)
    colour[radius > 0.74] = _rgb(226, 240, 200)
    colour[radius > 0.8] = _rgb(24, 120, 44)
    return colour, inside


def basketball(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.hypot(u, v) < 0.96
    lines = (np.abs(u) < 0.055) | (np.abs(v) < 0.055) | (np.abs(np.hypot(np.abs(u) - 1.15, v) - 0.75) < 0.05)
    colour = _paint(u, _rgb(232, 116, 24)) + rng.normal(0, 0.05, u.shape)[..., None]
    colour[lines] = _rgb(40, 20, 12)
    return colour, inside


def sun(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    rays = 0.74 + 0.22 * np.cos(angle * rng.randint(9, 13) + rng.uniform(0, 6.3))
    return _mix(_rgb(255, 246, 150), _rgb(255, 168, 0), radius * 1.1), radius < rays


def heart(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = u * 1.22, -v * 1.16 + 0.12
    body = (x**2 + y**2 - 1) ** 3 - x**2 * y**3
    colour = _paint(u, _rgb(236, 60, 140))
    colour[np.sin((u + v) * 11 + rng.uniform(0, 6.3)) > 0.55] = _rgb(255, 176, 214)
    return colour, body < 0


def moon(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = (np.hypot(u, v) < 0.96) & (np.hypot(u - 0.62, v + 0.1) > 0.74)
    colour = _paint(u, _rgb(226, 222, 196))
    for _ in range(9):
        crater = np.hypot(u - rng.uniform(-0.9, 0.3), v - rng.uniform(-0.85, 0.85)) < rng.uniform(0.07, 0.15)
        colour[crater] = _rgb(168, 164, 152)
    return colour, inside


def flower(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    petal = np.abs(np.cos(angle * 2.5 + rng.uniform(0, 6.3)))
    colour = _mix(_rgb(108, 36, 168), _rgb(198, 122, 236), radius * petal)
    colour[radius < 0.27] = _rgb(250, 210, 40)
    return colour, radius < 0.42 + 0.54 * petal


def fish(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = ((u + 0.18) / 0.78) ** 2 + (v / 0.56) ** 2 < 1
    tail = (u > 0.45) & (u < 0.97) & (np.abs(v) < (u - 0.35) * 0.95)
    scales = np.hypot((u * 5) % 1 - 0.5, (v * 6 + 0.5 * ((u * 5) // 1 % 2)) % 1 - 0.5)
    colour = _mix(_rgb(30, 200, 196), _rgb(12, 84, 128), scales * 1.9 - 0.1 + rng.uniform(-0.1, 0.1))
    colour[np.hypot(u + 0.65, v + 0.12) < 0.1] = _rgb(10, 10, 10)
    colour[tail & ~body] = _rgb(248, 150, 60)
    return colour, body | tail


def leaf(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.abs(v) < 0.62 * (1 - u**2) ** 0.8
    veins = (np.abs(v) < 0.05) | (np.sin((u - 0.9 * np.abs(v)) * rng.uniform(13, 16)) > 0.78)
    return np.where(veins[..., None], _rgb(222, 240, 130), _rgb(96, 196, 36)), inside


def cookie(rng: Random, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arctan2(v, u)
    inside = np.hypot(u, v) < 0.88 + 0.05 * np.sin(angle * 5 + rng.uniform(0, 6.3)) + 0.03 * np.sin(angle * 9)
    colour = _paint(u, _rgb(198, 142, 82)) + rng.normal(0, 0.03, u.shape)[..., None]
    for _ in range(11):
        chip = np.hypot(u - rng.uniform(-0.75, 0.75), v - rng.uniform(-0.75, 0.75)) < rng.uniform(0.08, 0.15)
        colour[chip] = _rgb(62, 32, 18)
    return colour, inside


def _paint(like: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colour, (*like.shape, 3)).copy()


STUFF = {f.__name__: f for f in (grass, sky, water, sand, brick, wood, snow, lava)}
THINGS = {
    f.__name__: f for f in (ladybug, bee, zebra, watermelon, basketball, sun, heart, moon, flower, fish, leaf, cookie)
}
