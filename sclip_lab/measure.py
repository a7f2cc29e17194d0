"""What a sweep does with pictures: it reads them, runs the tower once over all their windows, labels and counts.

A `Measurement` is the unit of work. It says all that it needs, so that another process can do it on some of the
pictures, and what it makes are counts, which add up.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sclip_lab.clip import Clip, loaded
from sclip_lab.datasets import BrokenImage, Dataset
from sclip_lab.images import pixels
from sclip_lab.metrics import IGNORE, tally
from sclip_lab.parallel import in_batches, side_by_side
from sclip_lab.protocol import Protocol, Stitched, windows
from sclip_lab.readout import Readout
from sclip_lab.refine import Refiner
from sclip_lab.registry import Attention, canonical
from sclip_lab.segment import cosines
from sclip_lab.store import Record
from sclip_lab.text import Queries
from sclip_lab.trunk import Trunk, encode, readings

Layers = tuple[int, ...]
Variant = tuple[Attention, Readout, Layers, Refiner | None]
Asked = tuple[Dataset, Queries]
Cell = tuple[str, ...]  # the values of store.CELL


class Picture(NamedTuple):
    """One picture uint8 [H W 3], its windows uint8 [n h w 3], and its labels uint8 [H W] by dataset."""

    key: str
    image: np.ndarray
    cuts: np.ndarray
    truths: dict[str, np.ndarray]


@dataclass(frozen=True)
class Measurement:
    """Cells of a sweep over the same pictures, under one protocol. A model by its name is loaded where it is needed.

    `strict`: a picture whose files cannot be used ends the measurement with `BrokenImage`, which is else its result.
    """

    model: str | Clip
    protocol: Protocol
    cells: dict[Cell, tuple[Variant, Asked]]
    strict: bool = False

    @classmethod
    def of(
        cls, model: str | Clip, name: str, protocol: Protocol, wanted: Iterable[tuple[Variant, Asked]], strict: bool
    ) -> "Measurement":
        """The measurement of variants on datasets, by a model that results call `name`."""
        return cls(model, protocol, {_cell(name, protocol, *one): one for one in wanted}, strict)

    def only(self, cells: Iterable[Cell]) -> "Measurement":
        """The same for some of its cells."""
        return replace(self, cells={cell: self.cells[cell] for cell in cells})

    @property
    def clip(self) -> Clip:
        return self.model if isinstance(self.model, Clip) else loaded(self.model)

    def run(self, keys: Sequence[str]) -> Generator[list[Record] | BrokenImage, None, None]:
        """One record per cell of each picture, in their order, or what is wrong with its files."""
        if self.clip.device.type == "cpu":
            return side_by_side(lambda key: self.count([self.read(key)])[0], keys)
        return in_batches(self.read, self.count, keys)

    def shard(self, keys: Sequence[str]) -> list[list[Record] | BrokenImage]:
        """`run`, all at once."""
        return list(self.run(keys))

    def read(self, key: str) -> Picture | BrokenImage:
        """A picture, cut into windows, and its labels."""
        datasets = {dataset.name: (dataset, len(words.names)) for _, (dataset, words) in self.cells.values()}
        truths = {}
        try:
            for name, (dataset, classes) in datasets.items():
                image, truths[name] = dataset.read(key)
                if (strange := truths[name][(truths[name] >= classes) & (truths[name] != IGNORE)]).size:
                    expected = f"expected below {classes}, or {IGNORE} for void: see that `classes` fit the masks"
                    raise ValueError(f"label {strange[0]} in picture {key!r} of {name!r}: {expected}")
                if truths[name].shape != image.shape[:2]:
                    sizes = f"{list(truths[name].shape)} for an image {list(image.shape)}"
                    raise ValueError(f"labels {sizes} of picture {key!r} of {name!r}: expected one per pixel")
            cuts = self._cut(key, image)
        except BrokenImage as error:
            if self.strict:
                raise
            return error
        return Picture(key, image, cuts, truths)

    def _cut(self, key: str, image: np.ndarray) -> np.ndarray:
        try:
            cuts = windows(image, self.protocol)
        except ValueError as error:
            raise BrokenImage(f"picture {key!r}: {error}") from None
        if min(cuts.shape[1:3]) < self.clip.patch:
            sizes = f"{image.shape[0]} x {image.shape[1]} pixels"
            raise BrokenImage(f"picture {key!r} of {sizes}: under {self.protocol} it is narrower than a patch")
        return cuts

    @torch.no_grad()
    def count(self, pictures: Sequence[Picture | BrokenImage]) -> list[list[Record] | BrokenImage]:
        """The records of each picture. Pictures whose windows have one shape go through the tower together."""
        alike: dict[tuple[int, ...], list[Picture]] = {}
        for picture in pictures:
            if isinstance(picture, Picture):
                alike.setdefault(picture.cuts.shape[1:], []).append(picture)
        heads, tallies = [], []
        for key, cell, counts in chain.from_iterable(map(self._tallies, alike.values())):
            heads.append((key, cell))
            tallies.append(counts)
        records: dict[str, list[Record]] = {key: [] for key, _ in heads}
        # A GPU is waited for here, and to see that features are finite: per batch, for no single picture.
        found = torch.cat(tallies).cpu().split(list(map(len, tallies))) if tallies else ()
        for (key, cell), counts in zip(heads, found, strict=True):
            records[key].append(((*cell, key), self.cells[cell][1][1].names, counts.numpy()))
        return [records[picture.key] if isinstance(picture, Picture) else picture for picture in pictures]

    def _tallies(self, pictures: list[Picture]) -> Iterator[tuple[str, Cell, Tensor]]:
        """Key, cell and counts [classes 3] of each picture and cell; the pictures' windows have one shape."""
        clip, sizes = self.clip, [len(picture.cuts) for picture in pictures]
        asked = {dataset.name: words.to(clip.device) for _, (dataset, words) in self.cells.values()}
        vectors = torch.cat([words.vectors for words in asked.values()])  # q e
        cuts = _on(clip.device, np.concatenate([picture.cuts for picture in pictures]))
        trunk = encode(clip.visual, pixels(cuts, clip.mean, clip.std))
        trunk = clip.step(trunk) if clip.step else trunk
        refiners = {refine for (*_, refine), _ in self.cells.values() if refine}
        refined = [{r: r(p.image, self.protocol, clip.mean, clip.std) for r in refiners} for p in pictures]
        truths = [{name: _on(clip.device, truth).long() for name, truth in p.truths.items()} for p in pictures]
        for cells, tokens in self._readings(trunk):
            scores = cosines(tokens, vectors, trunk.grid)  # n q i j
            each = scores.split(sizes)
            if not scores.isfinite().all():
                bad = next(p.key for p, own in zip(pictures, each, strict=True) if not own.isfinite().all())
                name = canonical(self.cells[cells[0]][0][0])
                raise ValueError(f"attention {name} makes NaN or infinite features of picture {bad!r}")
            for picture, own, refinement, truth in zip(pictures, each, refined, truths, strict=True):
                parts = own.split([len(words.vectors) for words in asked.values()], dim=1)
                of = dict(zip(asked, parts, strict=True))
                for cell in cells:
                    (*_, refine), (dataset, words) = self.cells[cell]
                    logits: Tensor | Stitched = Stitched(of[dataset.name], self.protocol, picture.image.shape[:2])
                    if refine:
                        logits = refinement[refine](torch.cat(list(logits), dim=1))
                    labels = dataset.labelling(logits, asked[dataset.name].query_class)
                    yield picture.key, cell, tally(labels, truth[dataset.name], len(words.names))

    def _readings(self, trunk: Trunk) -> Iterator[tuple[list[Cell], Tensor]]:
        """Tokens [n t e], each once, with the cells that are made of them."""
        gathered: dict[tuple[Attention, Layers], dict[Readout, list[Cell]]] = {}
        for cell, ((attend, readout, layers, _), _) in self.cells.items():
            gathered.setdefault((attend, layers), {}).setdefault(readout, []).append(cell)
        for (attend, layers), reads in gathered.items():
            yield from zip(reads.values(), readings(trunk, attend, reads, layers), strict=True)


def _cell(name: str, protocol: Protocol, variant: Variant, asked: Asked) -> Cell:
    (attend, readout, layers, refine), dataset = variant, asked[0]
    labelling = f"{dataset.labelling}+{refine}" if refine else dataset.labelling
    place = ",".join(map(str, layers))
    return tuple(map(str, (name, dataset.name, protocol, labelling, canonical(attend), readout, place)))


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    """An array on a device, on the way to which nothing waits."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
