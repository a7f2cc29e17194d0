"""The whole way from an image and class names to a label map.

The steps are separate so that a comparison can share them: `trunk_of` costs nearly all the time and serves every
attention, read-out and vocabulary; `scores` and `stitch` are cheap.

Letters: H W image, n windows, q queries, i j patch grid of a window, e embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sclip_lab.clip import Clip, loaded
from sclip_lab.files import replacing
from sclip_lab.images import MEAN, STD, Source, pixels, read
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol, Stitched, stitch, windows
from sclip_lab.readout import Readout
from sclip_lab.refine import Refiner
from sclip_lab.registry import Attention
from sclip_lab.text import queries as embed
from sclip_lab.trunk import Trunk, dense, encode


def trunk_of(
    visual: nn.Module,
    image: np.ndarray,
    protocol: Protocol = Protocol(),
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    step: Callable[[Trunk], Trunk] | None = None,
) -> Trunk:
    """Run the tower once over all windows of an image (uint8 RGB [H W 3]), and then the `step`, such as `later.repair`.

    `mean` and `std` are of RGB in 0 to 1 units.
    """
    device = next(visual.parameters()).device
    trunk = encode(visual, pixels(torch.from_numpy(windows(image, protocol)).to(device), mean, std))
    return step(trunk) if step else trunk


def scores(
    trunk: Trunk,
    queries: Tensor,
    attention: str | Attention = "csa",
    readout: str | Readout = "full",
    layers: tuple[int, ...] = (-1,),
) -> Tensor:
    """Cosines [n q i j], float32, of the windows' patches with unit text vectors `queries` [q e]."""
    return cosines(dense(trunk, attention, readout, layers), queries, trunk.grid)


def cosines(tokens: Tensor, queries: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines [n q i j], float32, of tokens [n t e], the patches last among them, with unit vectors [q e]."""
    patches = nn.functional.normalize(tokens[:, -grid[0] * grid[1] :].float(), dim=-1)
    return (patches @ queries.float().T).mT.unflatten(-1, grid)


@torch.no_grad()
def logits(
    visual: nn.Module,
    image: np.ndarray,
    queries: Tensor,
    attention: str | Attention = "csa",
    protocol: Protocol = Protocol(),
    readout: str | Readout = "full",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    layers: tuple[int, ...] = (-1,),
    step: Callable[[Trunk], Trunk] | None = None,
) -> Tensor:
    """Cosines [q H W] at the image's own size, averaged over windows, before any scale or softmax.

    `image` is uint8 RGB [H W 3], `queries` unit text vectors [q e]; `mean`, `std` and `step`: see `trunk_of`.
    """
    trunk = trunk_of(visual, image, protocol, mean, std, step)
    return stitch(scores(trunk, queries, attention, readout, layers), protocol, image.shape[:2])


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label map `labels` [H W] int64, the class `names` it indexes, and the `image` [H W 3] it belongs to."""

    labels: np.ndarray
    names: list[str]
    image: np.ndarray

    def plot(self, ax: Any = None) -> Any:
        """Draw the labels over the image, with a legend, on matplotlib axes; returns them."""
        from sclip_lab.plots import overlay

        return overlay(self.image, self.labels, self.names, ax=ax)

    def save(self, path: str | PathLike[str]) -> None:
        """Write what `plot` draws to a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure()
        self.plot(figure.subplots())
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


@torch.no_grad()
def segment(
    image: Source,
    classes: Sequence[str] | str | PathLike[str],
    model: str | Clip = "tiny",
    attention: str | Attention = "csa",
    readout: str | Readout = "full",
    protocol: Protocol | None = None,
    labelling: Labelling | None = None,
    device: str | torch.device | None = None,
    layers: tuple[int, ...] = (-1,),
    templates: Sequence[str] | None = None,
    refine: Refiner | None = None,
) -> Segmentation:
    """Name every pixel of an image with one of `classes`.

    `image` is whatever `images.read` takes, `classes` and `templates` what `text.queries` takes, `model` a loaded
    `Clip` or a name for `clip.load`, which is then loaded on `device` and kept for the next call. `protocol` None:
    windows of the size the model was trained on. `refine`: what refines the logits, such as `refine.Pamr()`. Raises
    what these raise: one line, the offending value and what was expected.
    """
    picture = read(image)
    clip = model if isinstance(model, Clip) else loaded(model, device)
    protocol, labelling = protocol or Protocol.for_image_size(clip.image_size), labelling or Labelling()
    words = embed(clip, classes, templates)
    trunk = trunk_of(clip.visual, picture, protocol, clip.mean, clip.std, clip.step)
    own = scores(trunk, words.vectors, attention, readout, layers)
    found: Tensor | Stitched = Stitched(own, protocol, picture.shape[:2])
    if refine:
        found = refine(picture, protocol, clip.mean, clip.std)(stitch(own, protocol, picture.shape[:2]))
    return Segmentation(labelling(found, words.query_class).cpu().numpy(), words.names, picture)
