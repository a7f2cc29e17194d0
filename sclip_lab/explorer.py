"""For those who would rather click than read: where does this patch look, and which segmentation comes of it?

`explore` makes the widget. All that it shows is made by functions that know nothing of widgets. The tower sees a
picture once and whole; weights and label maps are kept, so that a click only mixes colours.

Letters: H W picture as shown, h heads, n tokens (CLS first), p patches.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from io import BytesIO
from textwrap import fill
from time import perf_counter
from typing import Any

import anywidget
import cv2
import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from sclip_lab import plots, scenes
from sclip_lab.clip import Clip
from sclip_lab.images import Source, read
from sclip_lab.label import Labelling
from sclip_lab.plots import Pair
from sclip_lab.protocol import Protocol, Stitched, resize
from sclip_lab.registry import Attention, canonical
from sclip_lab.registry import attention as resolve
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import Queries, queries
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
    trunk = trunk_of(clip.visual, picture, protocol, clip.mean, clip.std)
    return Subject(resize(picture, protocol.resized(*picture.shape[:2])), trunk, protocol, words)


@lru_cache(maxsize=128)
@torch.no_grad()
def weights(subject: Subject, attention: Spec, layer: int) -> np.ndarray:
    """Where every patch looks in a layer, heads averaged and CLS left out: [p p]."""
    site = subject.trunk.site(layer)
    every = resolve(attention)(site).expand(*site.v.shape[:3], -1)  # [1 h n n]
    return every.mean(1)[0, 1:, 1:].float().cpu().numpy()


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
        return _line(error)


def _line(error: Exception) -> str:
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
    return f'<td><img alt="{escape(alt)}" src="{_uri(panel)}"></td>'


def _uri(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


class Picker(anywidget.AnyWidget):
    """A picture in which a patch is picked, by a click or with the arrow keys. Everything it needs is in this file."""

    picture = traitlets.Unicode().tag(sync=True)  # a data: URI
    grid = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(1, 1)).tag(sync=True)
    patch = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)

    # JupyterLab takes arrows and Enter for its own shortcuts, before the control that has the focus gets them, unless
    # that very element forbids it. ipywidgets' do not, so this forbids it for every control of the explorer.
    _esm = """
    function render({ model, el }) {
      const box = document.createElement("div"), img = document.createElement("img");
      const mark = document.createElement("div");
      img.alt = "";
      img.draggable = false;
      mark.className = "mark";
      box.append(img, mark);
      box.tabIndex = 0;
      box.setAttribute("role", "application");
      el.classList.add("sclip-picker");
      el.append(box);

      const draw = () => {
        const [rows, cols] = model.get("grid"), [row, col] = model.get("patch");
        const percent = { left: col / cols, top: row / rows, width: 1 / cols, height: 1 / rows };
        for (const side in percent) mark.style[side] = `${100 * percent[side]}%`;
        img.src = model.get("picture");
        box.setAttribute("aria-label", `Picture; arrow keys move from row ${row}, column ${col} of ${rows} x ${cols}`);
      };
      const go = (row, col) => {
        const [rows, cols] = model.get("grid");
        const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
        model.set("patch", [within(row, rows), within(col, cols)]);
        model.save_changes();
      };
      box.addEventListener("click", (event) => {
        const area = img.getBoundingClientRect(), [rows, cols] = model.get("grid");
        const y = (event.clientY - area.top) / area.height, x = (event.clientX - area.left) / area.width;
        go(Math.floor(y * rows), Math.floor(x * cols));
      });
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      box.addEventListener("keydown", (event) => {
        const step = steps[event.key];
        if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        event.stopPropagation();
        const [row, col] = model.get("patch");
        go(row + step[0], col + step[1]);
      });
      const forbid = ({ target }) => {
        if (target.closest(".sclip-explorer")) target.setAttribute("data-lm-suppress-shortcuts", "true");
      };
      document.addEventListener("focusin", forbid);
      model.on("change", draw);
      draw();
      return () => {
        document.removeEventListener("focusin", forbid);
        model.off("change", draw);
      };
    }
    export default { render };
    """
    _css = """
    .sclip-picker > div { position: relative; width: 240px; line-height: 0; cursor: crosshair; }
    .sclip-picker > div:focus-visible { outline: 3px solid #2ba8ff; outline-offset: -3px; }
    .sclip-picker img { width: 100%; }
    .sclip-picker .mark {
      position: absolute; box-sizing: border-box; border: 2px solid white; outline: 1px solid black;
      pointer-events: none;
    }
    .sclip-explorer table { border-collapse: collapse; }
    .sclip-explorer th { padding: 2px 6px; font-weight: normal; text-align: center; }
    .sclip-explorer td { padding: 2px; max-width: 132px; font-size: small; line-height: 1.2; }
    .sclip-explorer td img { width: 132px; display: block; }
    .sclip-explorer span { white-space: nowrap; margin-right: 1em; }
    .sclip-explorer i { display: inline-block; width: 1em; height: 1em; vertical-align: text-bottom; }
    """


class Explorer(widgets.VBox):
    """What `explore` makes: `picker.patch` is the patch shown, `table` what is seen from there, `status` a line."""

    def __init__(
        self,
        clip: Clip,
        pictures: Mapping[str, Source],
        words: Queries,
        attentions: Sequence[Spec],
        layers: Sequence[int],
    ) -> None:
        self.clip, self.words, self.pictures = clip, words, pictures
        self.seen: dict[str, Subject] = {}
        self.given = {canonical(spec): spec for spec in attentions}  # a callable could not be read from a text
        self.specs = list(self.given.values())
        depth = len(clip.visual.transformer.resblocks)
        chosen = sorted({range(depth)[layer] for layer in layers})
        self.choice = widgets.Dropdown(options=list(pictures), description="Picture")
        self.upload = widgets.FileUpload(accept="image/*", description="Your own picture", layout={"width": "auto"})
        self.attentions = widgets.Text("; ".join(self.given), description="Attentions", continuous_update=False)
        self.attentions.layout.width = "auto"
        self.layers = widgets.SelectMultiple(options=range(depth), value=chosen, description="Layers", rows=depth)
        self.picker, self.table, self.status = Picker(), widgets.HTML(), widgets.HTML()
        self._show(self._subject(self.choice.value))
        self.choice.observe(self._choose, "value")
        self.upload.observe(self._receive, "value")
        self.attentions.observe(self._read, "value")
        self.layers.observe(self._draw, "value")
        self.picker.observe(self._draw, "patch")
        wrapped = {"flex_flow": "row wrap"}
        files = widgets.HBox([self.choice, self.upload], layout=wrapped)
        rows = [
            widgets.HBox([widgets.VBox([files, self.attentions]), self.layers], layout=wrapped),
            self.status,
            widgets.HBox([self.picker, self.table], layout=wrapped),
        ]
        super().__init__(rows)
        self.add_class("sclip-explorer")

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widget and, for where it cannot live (GitHub, an HTML export), the poster of what it shows."""
        file = BytesIO()
        poster(*self._view).savefig(file, format="jpeg", dpi=110)
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"text/plain": "<Explorer>", "image/jpeg": base64.b64encode(file.getvalue()).decode()}

    @property
    def _view(self) -> tuple[Subject, Sequence[Spec], Sequence[int], Pair]:
        return self.subject, self.specs, self.layers.value, self.picker.patch

    def _subject(self, name: str) -> Subject:
        if name not in self.seen:
            self.seen[name] = look(self.clip, self.pictures[name], self.words)
        return self.seen[name]

    def _show(self, subject: Subject) -> None:
        self.subject = subject
        rows, cols = subject.trunk.grid
        with self.picker.hold_sync():
            self.picker.picture, self.picker.grid = _uri(subject.picture), (rows, cols)
            self.picker.patch = (rows // 2, cols // 2)
        self._draw()

    def _draw(self, _: Any = None) -> None:
        begin = perf_counter()
        self.table.value = table(*self._view)
        (row, col), (rows, cols) = self.picker.patch, self.picker.grid
        self._say(f"Patch in row {row}, column {col} of {rows} x {cols}; {1000 * (perf_counter() - begin):.0f} ms")

    def _choose(self, _: Any) -> None:
        with self._telling():
            self._show(self._subject(self.choice.value))

    def _receive(self, change: Any) -> None:
        with self._telling():
            (file,) = change.new
            name = f"{len(self.choice.options)}: {file['name']}"  # unlike all others, were it sent twice
            self.seen[name] = look(self.clip, _decoded(file), self.words)
            self.choice.options = [name, *self.choice.options]  # a Dropdown given options selects the first

    def _read(self, _: Any) -> None:
        with self._telling():
            names = [name.strip() for name in self.attentions.value.split(";") if name.strip()]
            specs = [self.given.get(name) or canonical(resolve(name)) for name in names]
            if not specs:
                raise ValueError("no attention: expected at least one, such as 'vanilla; csa'")
            self.specs = list(dict.fromkeys(specs))
            self._draw()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: a widget has no place for a traceback
            self._say(_line(error), role="alert")

    def _say(self, line: str, role: str = "status") -> None:
        self.status.value = f'<p role="{role}">{escape(line)}</p>'


def _decoded(file: Mapping[str, Any]) -> np.ndarray:
    """The picture [H W 3] in a file that FileUpload received."""
    try:
        return read(Image.open(BytesIO(file["content"])))
    except (OSError, SyntaxError):  # of PIL, whose messages name addresses in memory
        raise ValueError(
            f"image {file['name']!r} cannot be decoded: expected a whole JPEG, PNG or other picture"
        ) from None


def explore(
    clip: Clip,
    pictures: Mapping[str, Source] | Sequence[Source],
    classes: Sequence[str] = scenes.NAMES,
    attentions: Sequence[Spec] = ("vanilla", "identity", "csa"),
    layers: Sequence[int] = (0, -2, -1),
) -> Explorer:
    """A widget for Jupyter: choose a picture, click a patch, see where it looks and what is made of the picture.

    `pictures`: by name, or in a row; what `images.read` takes. `classes`: what `text.queries` takes. `attentions` (the
    rows) and `layers` (the columns) are where it begins; both can be changed in the widget. Heads are averaged; the
    segmentation has the attention in the last layer alone, and the whole picture as one window.
    """
    if not isinstance(pictures, Mapping):
        pictures = {str(number): picture for number, picture in enumerate(pictures)}
    return Explorer(clip, pictures, queries(clip, classes), attentions, layers)
