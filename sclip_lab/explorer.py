"""For those who would rather click than read: where does this patch look, and which segmentation comes of it?

`explore` makes the widget; all that it shows is made by `panels`.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from io import BytesIO
from time import perf_counter
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from PIL import Image

from sclip_lab import scenes
from sclip_lab.clip import Clip
from sclip_lab.images import Source, read
from sclip_lab.panels import Spec, Subject, in_a_line, look, poster, table, uri
from sclip_lab.plots import Pair
from sclip_lab.registry import attention as resolve
from sclip_lab.registry import canonical
from sclip_lab.text import Queries, queries


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
        depth = clip.layers
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
            self.picker.picture, self.picker.grid = uri(subject.picture), (rows, cols)
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
            self._say(in_a_line(error), role="alert")

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
