"""What happens to an image before the tower and to its patch scores after it: resize, windows, stitching.

The protocol is the one of the SCLIP authors' evaluation (Wang et al. 2024, arXiv 2312.01597): bilinear resize to a
short side, square windows that are shifted back at the border, scores upsampled to their window, averaged where
windows overlap, then resized to the image's own size. All that follows the scores is linear and separable in rows and
columns, so that here it is two matrix products.

Letters: H W image, h w window (pixels), n windows = r x c, q queries, i j patch grid of a window.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sclip_lab.metrics import patch_labels

CHUNK, LARGE_CHUNK = 1 << 19, 1 << 26  # numbers in one chunk of rows: what a core's cache holds; what busies a GPU


@dataclass(frozen=True)
class Protocol:
    """Sizes in pixels: the image is resized to `short_side` (its long side at most `long_side`), then cut into windows
    of `crop` every `stride`. `crop=0` shows the tower the whole image at once. Its `str` is the key in result tables.
    """

    short_side: int = 336
    crop: int = 224
    stride: int = 112
    long_side: int = 2048

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "crop" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Protocol {field.name}={value!r}: expected whole pixels, at least {least}")
        if self.crop and self.stride > self.crop:
            raise ValueError(f"Protocol stride={self.stride} leaves gaps: expected at most crop={self.crop}")
        if self.long_side < self.short_side:
            raise ValueError(f"Protocol long_side={self.long_side}: expected at least short_side={self.short_side}")

    @classmethod
    def for_image_size(cls, image_size: int) -> "Protocol":
        """The authors' 336/224/112 scaled to a tower that was trained on `image_size`."""
        return cls(short_side=image_size * 3 // 2, crop=image_size, stride=max(image_size // 2, 1))

    def __str__(self) -> str:
        windows = f"{self.crop}/{self.stride}" if self.crop else "whole"
        return f"{self.short_side}/{windows}" + (f"/{self.long_side}" if self.long_side != 2048 else "")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize: the sides keep their ratio and are rounded half up."""
        factor = min(self.short_side / min(height, width), self.long_side / max(height, width))
        return int(height * factor + 0.5), int(width * factor + 0.5)

    def starts(self, length: int) -> list[int]:
        """First pixel of every window along a resized side. A side shorter than the crop is one window, taken as is."""
        last = max(length - self.crop, 0) if self.crop else 0
        return [min(index * self.stride, last) for index in range(math.ceil(last / self.stride) + 1)]

    def window(self, length: int) -> int:
        """Length of the windows along a resized side."""
        return min(length, self.crop) if self.crop else length


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of a uint8 image [H W 3] to `size` (height, width) by OpenCV, as the authors did it."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def windows(image: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Resize an image [H W 3] and cut it into windows [n h w 3], row of windows by row of windows."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image of {image.dtype} {list(image.shape)}: expected uint8 [H W 3], see images.read")
    height, width = size = protocol.resized(*image.shape[:2])
    if min(size) == 0:
        raise ValueError(
            f"image of {image.shape[0]} x {image.shape[1]} pixels vanishes under {protocol}: expected less elongated"
        )
    image, h, w = resize(image, size), protocol.window(height), protocol.window(width)
    cuts = [image[y : y + h, x : x + w] for y in protocol.starts(height) for x in protocol.starts(width)]
    return np.stack(cuts)


def window_labels(truth: np.ndarray, protocol: Protocol, grid: tuple[int, int]) -> Tensor:
    """Labels [n i j] of the patches of what `protocol.windows` cuts, from a label map [H W]."""
    height, width = size = protocol.resized(*truth.shape)
    resized = F.interpolate(torch.from_numpy(truth)[None, None], size, mode="nearest-exact")[0, 0]
    h, w = protocol.window(height), protocol.window(width)
    cuts = [resized[y : y + h, x : x + w] for y in protocol.starts(height) for x in protocol.starts(width)]
    return torch.stack([patch_labels(cut, grid).unflatten(0, grid) for cut in cuts])


class Stitched:
    """Logits of one image at its own size, made a few rows at a time so that [q H W] never has to exist.

    Takes the windows' patch scores [n q i j] in the order of `windows`, the protocol and the image's own size (H, W).
    Iterating yields chunks [q rows W] from top to bottom, as often as wanted.
    """

    def __init__(self, scores: Tensor, protocol: Protocol, size: tuple[int, int]) -> None:
        resized = protocol.resized(*size)
        r, c = (len(protocol.starts(side)) for side in resized)
        if len(scores) != r * c:
            raise ValueError(f"scores of {len(scores)} windows: expected {r} x {c} for image {size} under {protocol}")
        cols = _columns(protocol, size[1], resized[1], scores.shape[3], scores.device)
        chunk = CHUNK if scores.device.type == "cpu" else LARGE_CHUNK
        rows = max(chunk // (scores.shape[1] * size[1]), 1)
        order, self.bands = _bands(protocol, size[0], resized[0], scores.shape[2], rows, scores.device)
        grid = scores.float().unflatten(0, (r, c)).permute(2, 0, 3, 1, 4)  # q r i c j
        self.columns_done = grid.flatten(3, 4).flatten(1, 2)[:, order] @ cols.T  # q r*i W

    def masked_fill(self, mask: Tensor, value: float) -> "Stitched":
        """The same, with a finite value for some of the queries, [q 1 1], as of a tensor [q H W]."""
        filled = copy(self)
        filled.columns_done = self.columns_done.masked_fill(mask, value)
        return filled

    def __iter__(self) -> Iterator[Tensor]:
        for read, weights in self.bands:
            yield weights @ self.columns_done[:, read]  # q rows W


def stitch(scores: Tensor, protocol: Protocol, size: tuple[int, int]) -> Tensor:
    """Patch scores [n q i j] of an image's windows -> logits [q H W] at the image's own `size`, float32.

    Equals the authors' loop (upsample each window, add, divide by the overlap count, resize) up to rounding.
    """
    return torch.cat(list(Stitched(scores, protocol, size)), dim=1)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # or what is made there could never be used where gradients are wanted
def _axis(protocol: Protocol, own: int, resized: int, patches: int) -> Tensor:
    """[own, r*i]: what each of an image's `own` rows (or columns) reads from the patches of all windows.

    An identity is pushed through the same interpolation, placement and average that scores would go through.
    """
    identity = torch.eye(patches)
    if not protocol.crop:
        return _linear(identity, own).T.contiguous()
    starts, side = protocol.starts(resized), protocol.window(resized)
    placed = torch.zeros(len(starts), patches, resized)
    overlap = torch.zeros(resized)
    for window, start in zip(placed, starts, strict=True):
        window[:, start : start + side] = _linear(identity, side)
        overlap[start : start + side] += 1
    return _linear((placed / overlap).flatten(0, 1), own).T.contiguous()


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _columns(protocol: Protocol, own: int, resized: int, patches: int, device: torch.device) -> Tensor:
    """`_axis` on a device, which would have to wait for it every time."""
    return _axis(protocol, own, resized, patches).to(device)


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _bands(
    protocol: Protocol, own: int, resized: int, patches: int, rows: int, device: torch.device
) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """An order of the r*i rows of patches, [r*i], and by it `_axis`, some rows at a time: which part of r*i they read
    at all, and with which weights, [rows, part].

    From top to bottom, whatever their window, so that what a band reads lies together and need not be copied.
    """
    axis = _axis(protocol, own, resized, patches)
    order = axis.bool().byte().argmax(dim=0).argsort()
    bands = axis[:, order].split(rows)
    read = [band.any(dim=0).nonzero()[:, 0].tolist() for band in bands]
    parts = [slice(which[0], which[-1] + 1) for which in read]
    return order.to(device), [(part, band[:, part].to(device)) for part, band in zip(parts, bands, strict=True)]


def _linear(lines: Tensor, size: int) -> Tensor:
    return F.interpolate(lines[None], size=size, mode="linear", align_corners=False)[0]
