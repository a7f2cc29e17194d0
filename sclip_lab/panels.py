"""What the explorer shows, made without widgets: where a patch looks, and which segmentation comes of it.

The tower sees a picture once and whole; weights and label maps are kept, so that another patch only mixes colours.

Letters: H W picture as shown, h heads, n tokens, p patches.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from textwrap import fill
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sclip_lab import plots
from sclip_lab.clip import Clip
from sclip_lab.images import Source, read
from sclip_lab.label import Labelling
from sclip_lab.plots import Pair
from sclip_lab.protocol import Protocol, Stitched, resize
from sclip_lab.registry import Attention, canonical
from sclip_lab.registry import attention as resolve
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import Queries
from sclip_lab.trunk import Trunk

Spec = str | Attention
Panel = np.ndarray | str  # uint8 RGB [H W 3], or in one line why there is none


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture (uint8 RGB [H W 3], of the size that the tower saw), its trunk, and the words that may name it."""

    picture: np.ndarray
    trunk: Trunk
    protocol: Protocol
    words: Queries


@torch.no_grad()
def look(clip: Clip, picture: Source, words: Queries) -> Subject:
    """Run the tower once on a whole picture. Raises what `images.read` and `encode` raise for one that is unfit."""
    side = clip.image_size * 3 // 2
    protocol = Protocol(short_side=side, crop=0, long_side=4 * side)  # a longer panorama's weights would fill memory
    picture = read(picture)
    trunk = trunk_of(clip.visual, picture, protocol, clip.mean, clip.std, clip.step)
    return Subject(resize(picture, protocol.resized(*picture.shape[:2])), trunk, protocol, words)


@lru_cache(maxsize=128)
@torch.no_grad()
def weights(subject: Subject, attention: Spec, layer: int) -> np.ndarray:
    """Where every patch looks in a layer, heads averaged and what precedes the patches left out: [p p]."""
    site = subject.trunk.site(layer)
    every = resolve(attention)(site).expand(*site.v.shape[:3], -1)  # [1 h n n]
    return every.mean(1)[0, site.prefix :, site.prefix :].float().cpu().numpy()


@lru_cache(maxsize=128)
@torch.no_grad()
def labels(subject: Subject, attention: Spec) -> np.ndarray:
    """The label map [H W] that an attention gives in the place of the last layer's."""
    words, size = subject.words, subject.picture.shape[:2]
    stitched = Stitched(scores(subject.trunk, words.vectors, attention), subject.protocol, size)
    return Labelling()(stitched, words.query_class).cpu().numpy()


def panels(subject: Subject, attentions: Sequence[Spec], layers: Sequence[int], patch: Pair) -> list[list[Panel]]:
    """A row per attention: where `patch` (row, column) looks in each layer, and last the segmentation."""
    return [
        [_attempt(_glow, subject, spec, layer, patch) for layer in layers] + [_attempt(_segmentation, subject, spec)]
        for spec in attentions
    ]


def legend(subject: Subject, attentions: Sequence[Spec]) -> dict[str, str]:
    """Colours, "#rrggbb", of the classes that any of the segmentations shows, largest first."""
    maps = [found for spec in attentions if not isinstance(found := _attempt(labels, subject, spec), str)]
    area = np.bincount(np.ravel(maps).astype(int), minlength=len(subject.words.names))
    colours = plots.palette(len(area))
    return {subject.words.names[label]: to_hex(colours[label]) for label in np.argsort(-area)[: np.count_nonzero(area)]}


def table(subject: Subject, attentions: Sequence[Spec], layers: Sequence[int], patch: Pair) -> str:
    """The panels in an HTML table, and the legend below."""
    rows = []
    for spec, row in zip(attentions, panels(subject, attentions, layers, patch), strict=True):
        alts = [f"Layer {layer} under {canonical(spec)}: where patch {patch} looks" for layer in layers]
        cells = map(_cell, row, [*alts, f"Segmentation under {canonical(spec)}"])
        rows.append(f'<tr><th scope="row">{escape(canonical(spec))}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{column}</th>' for column in _columns(subject, layers))
    swatches = "".join(
        f'<span><i style="background: {colour}"></i> {escape(name)}</span> '
        for name, colour in legend(subject, attentions).items()
    )
    return f"<table><thead><tr><td></td>{heads}</tr></thead>{''.join(rows)}</table><p>{swatches}</p>"


def poster(subject: Subject, attentions: Sequence[Spec], layers: Sequence[int], patch: Pair) -> Figure:
    """The same as a figure, with the picture: for places where nothing can be clicked."""
    columns = _columns(subject, layers)
    figure = Figure(figsize=(1.7 * len(columns) + 3, 1.3 * len(attentions) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(attentions), len(columns) + 1)
    picture = plots.image(_marked(subject, subject.picture, patch), figure.add_subplot(grid[0, 0]))
    picture.set_title("picture", fontsize=9)
    for i, row in enumerate(panels(subject, attentions, layers, patch)):
        for j, panel in enumerate(row, start=1):
            ax = plots.image(np.full_like(subject.picture, 255), figure.add_subplot(grid[i, j]))
            if isinstance(panel, str):
                ax.text(0.5, 0.5, fill(panel, 28), fontsize=5, ha="center", va="center", transform=ax.transAxes)
            else:
                plots.image(panel, ax)
            ax.set_title(columns[j - 1] if i == 0 else "", fontsize=9)
            ax.set_ylabel(canonical(attentions[i]) if j == 1 else "", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in legend(subject, attentions).items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _glow(subject: Subject, attention: Spec, layer: int, patch: Pair) -> np.ndarray:
    grid = subject.trunk.grid
    seen = weights(subject, attention, layer)[patch[0] * grid[1] + patch[1]].reshape(grid)
    glow = plots.glow(subject.picture, seen, plots.SOURCE_COLOURS[0])
    return _marked(subject, (255 * glow).astype(np.uint8), patch)


def _segmentation(subject: Subject, attention: Spec) -> np.ndarray:
    colours = plots.palette(len(subject.words.names))[labels(subject, attention)]
    return (255 * colours).astype(np.uint8)


def _attempt(draw: Callable[..., np.ndarray], *arguments: Any) -> Panel:
    try:
        return draw(*arguments)
    except Exception as error:  # a variant may be anybody's, and fail in its own way: the others are still worth seeing
        return in_a_line(error)


def in_a_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _marked(subject: Subject, picture: np.ndarray, patch: Pair) -> np.ndarray:
    """The outline of a patch on a picture [H W 3]."""
    high, wide = (side / patches for side, patches in zip(picture.shape, subject.trunk.grid, strict=False))
    left, top = int(wide * patch[1]), int(high * patch[0])
    marked = picture.copy()
    for border, grey in ((1, 0), (0, 255)):  # one of them shows, whatever lies below
        around = (left - border, top - border, round(wide) + 2 * border, round(high) + 2 * border)
        cv2.rectangle(marked, around, (grey, grey, grey))
    return marked


def _columns(subject: Subject, layers: Sequence[int]) -> list[str]:
    return [*(f"layer {subject.trunk.site(layer).layer}" for layer in layers), "segmentation"]


def _cell(panel: Panel, alt: str) -> str:
    if isinstance(panel, str):
        return f"<td>{escape(panel)}</td>"
    return f'<td><img alt="{escape(alt)}" src="{uri(panel)}"></td>'


def uri(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
