"""From logits to a label map, as the SCLIP authors' released code does it.

Letters: q queries (words), H W image.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sclip_lab.metrics import histogram
from sclip_lab.protocol import Stitched

ROWS = 64  # rows labelled at a time
NEVER = -1e4  # below any cosine, finite so that it can be stitched


@dataclass(frozen=True)
class Labelling:
    """The rule that turns the scores of all words into one class per pixel. Its `str` is the key in result tables.

    - Probabilities are the softmax over all words of `logit_scale` x cosine; a class has its best word's probability.
    - `area_thd`: a foreground class (any but 0) is dropped from an image where it wins at most this share of all
      foreground pixels. Areas are counted before `prob_thd` is applied.
    - `prob_thd`: a pixel whose winning probability is below it becomes class 0.

    Both thresholds take class 0 for the background. Without a background class leave them alone (`prob_thd=0`,
    `area_thd=None`), or class 0 swallows pixels that are none of its own.
    """

    logit_scale: float = 40.0
    prob_thd: float = 0.0
    area_thd: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"Labelling logit_scale={self.logit_scale!r}: expected a positive number, such as 40")
        for name, value in (("prob_thd", self.prob_thd), ("area_thd", self.area_thd or 0.0)):
            if not 0 <= value <= 1:
                raise ValueError(f"Labelling {name}={value!r}: expected a share between 0 and 1")

    def __str__(self) -> str:
        area = "" if self.area_thd is None else f"/{self.area_thd:g}"
        return f"{self.logit_scale:g}/{self.prob_thd:g}{area}"

    def __call__(self, logits: Tensor | Stitched, query_class: Tensor) -> Tensor:
        """Cosines `logits` [q H W], stitched or still to be, and the class of each query [q] -> labels [H W] int64."""
        labels, best, inverse = zip(*(self._labelled(chunk, query_class) for chunk in _chunks(logits)), strict=True)
        if self.area_thd is not None:
            dropped = ~self._large_enough(torch.cat(labels), len(query_class))
            left = _chunks(logits.masked_fill(dropped[query_class][:, None, None], NEVER))
            parts = zip(left, labels, best, inverse, strict=True)
            labels, inverse = zip(*(self._without(dropped, query_class, *part) for part in parts), strict=True)
        return torch.cat(labels).masked_fill(torch.cat(inverse) * self.prob_thd > 1, 0)

    def _labelled(self, logits: Tensor, query_class: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The class of the best word, its logit, and one over its probability (0 where none is asked for), [rows W]."""
        # The softmax keeps the order of the words, so the class of the best word is the class of highest probability,
        # and only the winner's probability is ever needed.
        labels, best = _winners(logits, query_class)
        if not self.prob_thd:
            return labels, best, torch.zeros_like(best)
        # By powers of two, which on a processor take a third of the time of powers of e.
        return labels, best, (logits - best).mul_(self.logit_scale / math.log(2)).exp2_().sum(dim=0)

    def _without(
        self, dropped: Tensor, query_class: Tensor, logits: Tensor, labels: Tensor, best: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The class of the best word that is left in `logits`, and one over its probability, [rows W]."""
        # To ask whether a pixel is concerned would make a GPU wait.
        if not labels.is_cuda and not dropped[labels].any():
            return labels, inverse
        labels, second = _winners(logits, query_class)
        return labels, inverse * (self.logit_scale * (best - second)).exp()

    def _large_enough(self, labels: Tensor, classes: int) -> Tensor:
        """Which classes stay in this image, [classes] bool."""
        area = histogram(labels.flatten(), classes)
        stay = area > (self.area_thd or 0.0) * area[1:].sum()
        stay[0] = True
        return stay


def _chunks(logits: Tensor | Stitched) -> Iterable[Tensor]:
    """Some rows at a time, [q rows W]."""
    return logits.split(ROWS, dim=1) if isinstance(logits, Tensor) else logits


def _winners(logits: Tensor, query_class: Tensor) -> tuple[Tensor, Tensor]:
    """The class of the best word, the first of equals, and its logit, [rows W]."""
    best, places = logits.amax(dim=0), _places(len(query_class), logits.device)
    # On a processor max(dim=0), which finds the place by itself, takes twice as long, and comparing to bool thrice.
    winning = torch.eq(logits, best, out=torch.empty_like(logits, dtype=torch.float32))
    first = len(places) - winning.mul_(places).amax(dim=0).long()
    return query_class[first], best


@lru_cache(64)
@torch.inference_mode(False)  # or what is made there could never be used where gradients are wanted
def _places(words: int, device: torch.device) -> Tensor:
    """The places of words from the last, [q 1 1], of which the first word's is the largest."""
    return torch.arange(words, 0, -1, dtype=torch.float32, device=device)[:, None, None]
