"""Any picture a user has -> uint8 RGB [H W 3] -> the normalised pixels that a tower reads."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Source = str | PathLike[str] | np.ndarray | Image.Image


# RGB, 0 to 1: what OpenAI's CLIP was trained with, and open_clip's default.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def read(source: Source) -> np.ndarray:
    """A file, a PIL image or an array -> uint8 RGB [H W 3].

    Files are decoded by OpenCV, as in the SCLIP authors' evaluation: JPEG, PNG, TIFF, WebP and more. Orientation stored
    in EXIF is applied, grey becomes three equal channels, transparency is dropped (hidden colours become visible, as
    with PIL's `convert("RGB")`), 16 bits are scaled to 8.
    Arrays are RGB [H W 3], RGBA [H W 4] or grey [H W], [H W 1]; uint8, uint16 or floats between 0 and 1.
    Raises ValueError, FileNotFoundError in one line where that is not what it gets.
    """
    if isinstance(source, str | PathLike):
        return _uint8_rgb(_decode(Path(source)))
    if isinstance(source, Image.Image):
        upright = ImageOps.exif_transpose(source)
        deep = upright.mode in ("I;16", "I;16B", "I", "F")  # PIL would clip these to 255, not scale them
        return _uint8_rgb(np.asarray(upright if deep else upright.convert("RGB")))
    return _uint8_rgb(np.asarray(source))


def pixels(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 RGB [b H W 3] -> normalised floats [b 3 H W] on the same device. `mean`, `std`: of RGB in 0 to 1 units."""
    shift, scale = (torch.tensor(value, device=images.device)[:, None, None] for value in (mean, std))
    return (images.permute(0, 3, 1, 2) / 255 - shift) / scale


def _decode(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"image {str(path)!r}: no such file, expected a JPEG, PNG or other picture")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    # ANYDEPTH keeps 16 bits and floats, which OpenCV would otherwise cut off at 255.
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH) if data.size else None
    if image is None:
        raise ValueError(f"image {str(path)!r} cannot be decoded: expected a whole JPEG, PNG or other picture")
    return image


def _uint8_rgb(image: Any) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        hint = "; move the channels last" if image.ndim == 3 and image.shape[0] in (1, 3, 4) else ""
        raise ValueError(f"image of shape {list(image.shape)}: expected [H W 3], [H W 4] or [H W]{hint}")
    image = _uint8(image)
    return np.ascontiguousarray(np.broadcast_to(image[:, :, :3], (*image.shape[:2], 3)))


def _uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return np.rint(image / 257).astype(np.uint8)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image of type {image.dtype}: expected uint8, uint16 or floats between 0 and 1")
    if not np.isfinite(image).all():
        raise ValueError(f"image has {int((~np.isfinite(image)).sum())} NaN or infinite values: expected finite floats")
    low, high = float(image.min()), float(image.max())
    if low < -1e-3 or high > 1 + 1e-3:  # a little slack for the rounding of a resize
        raise ValueError(f"float image with values from {low:g} to {high:g}: expected 0 to 1, or convert it to uint8")
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)
