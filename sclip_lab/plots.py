"""Pictures of label maps, attention and features. What was measured on them is drawn in `charts`.

Axes-level functions: arrays in, `ax` where there is one (else the current axes), the Axes out.
None changes what it is given or matplotlib's settings. Colours are chosen to be told apart by deuteranopes too.

Letters: H W image, p patches, d width of a feature.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.decomposition import PCA

from sclip_lab.charts import BESIDE
from sclip_lab.files import figures, replacing
from sclip_lab.metrics import IGNORE

Pair = tuple[int, int]  # rows and columns of a grid of patches, or row and column of a patch

GREY = (0.8, 0.8, 0.8)
FIRST = [2, 9, 0, 8, 3, 5, 6, 1, 4]  # green, light blue, blue, yellow ...: grass, sky, water, sand ... of the scenes
SOURCE_COLOURS = ("#ff5c2b", "#2ba8ff", "#ffc400", "#ff6fd0", "#34d39b")


def save(figure: Figure, name: str) -> None:
    """Write NAME.png into the folder of figures, whole or not at all; the same figure gives the same bytes."""
    with replacing(figures() / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", metadata={"Software": None})


@lru_cache
def palette(classes: int) -> np.ndarray:
    """Colours [classes 3], 0 to 1, of classes 0, 1, ...: a class keeps its colour, however many follow.

    First seaborn's colour-blind palette, but its grey. From then on the colour farthest from all before (Glasbey et al.
    2007), by the product of its distances in CIELAB to normal eyes and to deuteranopes (Machado et al. 2009).
    """
    first = np.array(sns.color_palette("colorblind"))[FIRST]
    grid = np.stack(np.meshgrid(*3 * [np.linspace(0, 1, 13)]), axis=-1).reshape(-1, 3)
    lightness, a, b = _lab(grid).T
    neither_pale_nor_glaring = (lightness > 35) & (lightness < 85) & (np.hypot(a, b) > 20) & (np.hypot(a, b) < 80)
    colours = np.concatenate([first, grid[neither_pale_nor_glaring]])
    seen = np.stack([_lab(colours), _lab(_deuteranope(colours))])
    chosen, nearest = list(range(len(first))), np.full(len(colours), np.inf)
    for count in range(max(classes, len(first))):
        if count == len(chosen):
            chosen.append(int(nearest.argmax()))
        normal, deuteranope = np.linalg.norm(seen - seen[:, chosen[count], None], axis=-1)
        nearest = np.minimum(nearest, normal * deuteranope)
    return colours[chosen[:classes]]


def _lab(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]


def _deuteranope(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    linear = (linear @ np.transpose(matrix)).clip(0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def image(picture: np.ndarray, ax: Axes | None = None) -> Axes:
    """A picture [H W 3] and nothing else."""
    ax = ax or plt.gca()
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def labels(labels: np.ndarray, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """A label map [H W]: every class in its colour, named where there is room for it; 255 is grey."""
    labels = np.asarray(labels)
    ax = image(_colours(labels, names)[..., :3], ax)
    for label in _by_area(labels):
        x, y, room = _middle(labels == label)
        if room > 0.08 * min(labels.shape):
            outline = [effects.withStroke(linewidth=1.5, foreground="black")]
            ax.text(x, y, names[label], fontsize=7, color="white", ha="center", va="center", path_effects=outline)
    return ax


def overlay(picture: np.ndarray, labels: np.ndarray, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """A label map [H W] over its picture [H W 3], with a legend of the classes in it, largest first; 255 is clear."""
    labels = np.asarray(labels)
    ax = image(picture, ax)
    ax.imshow(_colours(labels, names) * (1, 1, 1, 0.6), interpolation="nearest")
    colours = palette(len(names))
    handles = [Patch(color=colours[label], label=names[label]) for label in _by_area(labels)]
    ax.legend(handles=handles, ncols=1 + len(handles) // 20, **BESIDE)
    return ax


def sources(picture: np.ndarray, grid: Pair, points: Sequence[Pair], ax: Axes | None = None) -> Axes:
    """A picture [H W 3] with patches (row, col) of a grid marked, in the order of `SOURCE_COLOURS`."""
    ax = image(picture, ax)
    for point, colour in zip(points, sns.color_palette(SOURCE_COLOURS, len(points)), strict=True):
        _mark(ax, picture, grid, point, colour)
    return ax


def glow(picture: np.ndarray, weights: np.ndarray, colour: str = "C1") -> np.ndarray:
    """Weights [rows cols] as a glow in `colour` over their picture [H W 3], greyed and dimmed: [H W 3], 0 to 1.

    The glow is full at the 99th percentile, so that one patch that swallows the attention does not hide where the rest
    goes.
    """
    weights = np.asarray(weights, dtype=np.float32)
    light = cv2.resize(weights, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)  # H W
    light = (light / (np.quantile(weights, 0.99) or weights.max() or 1)).clip(0, 1)
    dim = 0.35 / 255 * cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) * (1 - light)
    ramp = sns.blend_palette(["black", colour, "white"], as_cmap=True)
    return (dim[..., None] + ramp(0.9 * light)[..., :3]).clip(0, 1)


def attention_map(
    picture: np.ndarray, weights: np.ndarray, source: Pair | None = None, ax: Axes | None = None, colour: str = "C1"
) -> Axes:
    """Where one patch looks: the `glow` of its weights [rows cols] over its picture [H W 3].

    `source`: row and column of that patch, marked.
    """
    ax = image(glow(picture, weights, colour), ax)
    if source is not None:
        _mark(ax, picture, np.shape(weights), source, colour)
    return ax


def features_as_colours(features: Sequence[np.ndarray], grid: Pair) -> list[np.ndarray]:
    """Patch features, several [p d], as colours [rows cols 3]: like colours, like features, in all of them.

    The first three principal components of all unit features together are red, green and blue, each from its 1st to its
    99th percentile.
    """
    units = np.concatenate([f / np.linalg.norm(f, axis=-1, keepdims=True) for f in map(np.asarray, features)])
    components = PCA(3, svd_solver="full").fit_transform(units)
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = ((components - low) / (high - low)).clip(0, 1)
    return [part.reshape(*grid, 3) for part in np.split(colours, len(features))]


def _colours(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Label map [H W] -> RGBA [H W 4]; 255 is grey and clear."""
    known = labels != IGNORE
    if (wrong := labels[known & ((labels < 0) | (labels >= len(names)))]).size:
        raise ValueError(f"label {wrong[0]} in a map of {len(names)} names: expected 0 to {len(names) - 1} or {IGNORE}")
    colours = np.vstack([palette(len(names)), GREY])[np.where(known, labels, len(names))]
    return np.dstack([colours, known])


def _by_area(labels: np.ndarray) -> np.ndarray:
    """The classes in a label map, largest first."""
    classes, area = np.unique(labels[labels != IGNORE], return_counts=True)
    return classes[np.argsort(-area, kind="stable")]


def _middle(region: np.ndarray) -> tuple[int, int, float]:
    """Column and row of the point deepest inside a region [H W], a sixth or more from either side, and its depth."""
    sixth = region.shape[1] // 6  # for the width of a name
    depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1 + sixth : -1 - sixth]
    row, col = divmod(int(depth.argmax()), depth.shape[1])
    return col + sixth, row, float(depth[row, col])


def _mark(ax: Axes, picture: np.ndarray, grid: tuple[int, ...], patch: Pair, colour: str) -> None:
    y, x = ((patch[axis] + 0.5) * picture.shape[axis] / grid[axis] - 0.5 for axis in (0, 1))
    ax.plot(x, y, "o", color=colour, markersize=7, markeredgecolor="white", markeredgewidth=1.5)
