"""From logits to a label map, as the SCLIP authors' released code does it.

Letters: q queries (words), H W image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64  # rows labelled at a time


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

    def __call__(self, logits: Tensor | Iterable[Tensor], query_class: Tensor) -> Tensor:
        """Cosines `logits` [q H W] and the class of each query [q] -> labels [H W] int64.

        `logits` may also be chunks of rows [q rows W] that can be iterated twice, such as `protocol.Stitched`.
        """
        chunks = logits.split(ROWS, dim=1) if isinstance(logits, Tensor) else logits
        allowed = torch.ones_like(query_class, dtype=torch.bool)
        if self.area_thd is not None:
            allowed = self._large_enough(chunks, query_class)[query_class]
        return torch.cat([self._label(chunk, query_class, allowed) for chunk in chunks])

    def _label(self, logits: Tensor, query_class: Tensor, allowed: Tensor) -> Tensor:
        # The softmax keeps the order of the words, so the class of the best word is the class of highest probability,
        # and only the winner's probability is ever needed.
        best, query = logits[allowed].max(dim=0)  # rows W
        labels = query_class[allowed][query]
        if self.prob_thd > 0:
            scale = self.logit_scale
            probability = (scale * best - (scale * logits).logsumexp(dim=0)).exp()
            labels[probability < self.prob_thd] = 0
        return labels

    def _large_enough(self, chunks: Iterable[Tensor], query_class: Tensor) -> Tensor:
        """Which classes stay in this image, [classes] bool."""
        classes = int(query_class.max()) + 1
        winners = (query_class[chunk.argmax(dim=0)].flatten() for chunk in chunks)
        area = torch.stack([winner.bincount(minlength=classes) for winner in winners]).sum(dim=0)
        stay = area > (self.area_thd or 0.0) * area[1:].sum()
        stay[0] = True
        return stay
