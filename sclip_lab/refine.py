"""What happens to logits before they become labels: refinement by the picture itself.

A refiner is a frozen recipe whose `str` is the key in result tables. Called with a picture, it returns a function of
logits [q H W] that serves every variant and vocabulary: what depends on the picture alone is computed once. Its place
is where SCLIP's authors have it: after the logits have the picture's own size, before scale, softmax and thresholds.

Letters: H W image, q queries (or classes), p neighbours of a pixel.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sclip_lab.images import MEAN, STD, pixels
from sclip_lab.protocol import Protocol, resize

CHUNK = 1 << 20  # numbers of logits refined at a time: 4 MB of float32, which a processor's cache may hold
TINY = torch.finfo(torch.float32).tiny

Refined = Callable[[Tensor], Tensor]
Refiner = Callable[[np.ndarray, Protocol, Sequence[float], Sequence[float]], Refined]  # image, protocol, mean, std


@dataclass(frozen=True)
class Pamr:
    """mask ← Σₚ wₚ maskₚ, `steps` times, w = softmaxₚ(-mean_c |x - xₚ| / (1e-8 + 0.1 σ_c))

    Pixel-Adaptive Mask Refinement (Araslanov and Roth, CVPR 2020, arXiv:2005.08104), as the code of SCLIP and NACLIP
    has it. p: the 8 neighbours at each of `dilations` pixels, the pixel itself left out, borders repeated. σ_c:
    unbiased deviation of a channel over these and the pixel (once per dilation). x: the tower's normalised input,
    resized, and brought back to the picture's own size bilinearly. SCLIP ships with it off, its author uses the
    defaults given here (issue 4 of its repository); NACLIP has it on.
    """

    steps: int = 10
    dilations: tuple[int, ...] = (8, 16)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"Pamr steps={self.steps!r}: expected a whole number, such as 10")
        if not self.dilations or not all(isinstance(d, int) and d > 0 for d in self.dilations):
            raise ValueError(f"Pamr dilations={self.dilations!r}: expected distances in whole pixels, such as (8, 16)")

    def __str__(self) -> str:
        return f"pamr({self.steps}/{','.join(map(str, self.dilations))})"

    def __call__(
        self,
        image: np.ndarray,
        protocol: Protocol = Protocol(),
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> Refined:
        """The refinement of logits [q H W] by an image, uint8 RGB [H W 3], that `protocol` resized for the tower.

        It leaves its argument as it is. Beside argument and result it needs 4 p bytes per pixel for the weights, and
        some `CHUNK`s.
        """
        on_cpu = self._weights(_guide(image, protocol, mean, std))  # p H W

        def refined(logits: Tensor) -> Tensor:
            _check(logits, image)
            weights = on_cpu.to(logits.device)
            result = torch.empty_like(logits, dtype=torch.float32)
            size = max(CHUNK // weights[0].numel(), 1)
            for chunk, place in zip(logits.split(size), result.split(size), strict=True):
                masks = chunk.float()
                for _ in range(self.steps):
                    masks = _sum(weights, self._neighbours(masks))
                place.copy_(masks)
            return result

        return refined

    def _weights(self, guide: Tensor) -> Tensor:
        """Affinity [p H W] of every pixel of the guide [3 H W] to its neighbours."""
        apart = torch.zeros(8 * len(self.dilations), *guide.shape[1:])
        for channel in guide.split(1):
            near = self._neighbours(channel)
            samples = [*near, *[channel] * len(self.dilations)]
            mean = _total(samples) / len(samples)
            variance = _total((sample - mean).square() for sample in samples) / (len(samples) - 1)
            for total, other in zip(apart, near, strict=True):  # one by one, for memory
                total += ((other - channel).abs() / (1e-8 + 0.1 * variance.sqrt()))[0]
        return (apart / -len(guide)).softmax(0)

    def _neighbours(self, maps: Tensor) -> list[Tensor]:
        """What every pixel of [m H W] has around it: p views [m H W] of one padded copy."""
        reach, (height, width) = max(self.dilations), maps.shape[-2:]
        padded = F.pad(maps, [reach] * 4, mode="replicate")
        shifts = [(y * d, x * d) for d in self.dilations for y, x in product((-1, 0, 1), repeat=2) if y or x]
        return [padded[:, reach + y :, reach + x :][:, :height, :width] for y, x in shifts]


@dataclass(frozen=True)
class DenseCrf:
    """Mean field of E = Σᵢ -log softmax(scale logitᵢ) + Σ over pixels i, j of other labels: w exp(-Δ²ᵢⱼ / 2)

    Fully connected CRF (Krähenbühl and Koltun, NeurIPS 2011, arXiv:1210.5644), computed by pydensecrf2, the optional
    extra "crf". Two terms tie pixels: w = `near_weight` with distances in units of `near_xy` pixels, and `alike_weight`
    with those of `alike_xy` pixels and `alike_rgb` grey levels together. Defaults are CLIP-ES's (Lin et al., CVPR 2023,
    arXiv:2212.09506). Every word is a label of its own. What comes back is log marginal / scale: with the same `scale`
    as logit_scale of `Labelling`, its softmax gives the marginals.
    """

    scale: float = 40.0
    steps: int = 10
    near_weight: float = 3.0
    near_xy: float = 1.0
    alike_weight: float = 4.0
    alike_xy: float = 67.0
    alike_rgb: float = 3.0

    def __str__(self) -> str:
        near, alike = (
            f"{self.near_weight:g},{self.near_xy:g}",
            f"{self.alike_weight:g},{self.alike_xy:g},{self.alike_rgb:g}",
        )
        return f"crf({self.scale:g}/{self.steps}/{near}/{alike})"

    def __call__(self, image: np.ndarray, *_: object) -> Refined:
        """The refinement of logits [q H W] by an image, uint8 RGB [H W 3]. Raises ImportError without the extra."""
        densecrf = _pydensecrf()

        def refined(logits: Tensor) -> Tensor:
            _check(logits, image)
            queries, height, width = logits.shape
            energy = -(self.scale * logits.float()).log_softmax(0).flatten(1).cpu().numpy()
            crf = densecrf.DenseCRF2D(width, height, queries)
            crf.setUnaryEnergy(np.ascontiguousarray(energy))
            crf.addPairwiseGaussian(self.near_xy, self.near_weight)
            writeable = image.copy()  # which the library asks for, and leaves as it is
            crf.addPairwiseBilateral(self.alike_xy, self.alike_rgb, writeable, self.alike_weight)
            marginals = torch.from_numpy(np.array(crf.inference(self.steps), dtype=np.float32))
            return (marginals.clamp_min(TINY).log() / self.scale).unflatten(1, (height, width)).to(logits.device)

        return refined


def _pydensecrf() -> Any:
    try:
        import pydensecrf.densecrf
    except ImportError:
        raise ImportError("DenseCrf needs pydensecrf2: install sclip-lab[crf], which compiles it (C++)") from None
    return pydensecrf.densecrf


def _sum(weights: Tensor, near: list[Tensor]) -> Tensor:
    """Σₚ wₚ maskₚ of weights [p H W] and p neighbours [m H W]."""
    total = weights[0] * near[0]
    for weight, values in zip(weights[1:], near[1:], strict=True):
        total.addcmul_(weight, values)
    return total


def _total(maps: Iterable[Tensor]) -> Tensor:
    return sum(maps, start=torch.zeros(()))


def _guide(image: np.ndarray, protocol: Protocol, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The tower's input, resized and normalised, back at the image's own size [3 H W]."""
    resized = torch.from_numpy(resize(image, protocol.resized(*image.shape[:2])))[None]
    return F.interpolate(pixels(resized, mean, std), image.shape[:2], mode="bilinear", align_corners=False)[0]


def _check(logits: Tensor, image: np.ndarray) -> None:
    if logits.ndim != 3 or logits.shape[1:] != image.shape[:2]:
        raise ValueError(f"logits {list(logits.shape)}: expected [q H W] at the image's size {list(image.shape[:2])}")
