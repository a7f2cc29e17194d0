"""What the last block adds around its attention: residual, MLP, and how much its branch weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass

_READOUTS = {  # residual, mlp, beside
    "full": (True, True, False),
    "no_mlp": (True, False, False),
    "no_residual": (False, True, False),
    "bare": (False, False, False),
    "beside": (True, False, True),
}


@dataclass(frozen=True)
class Readout:
    """What the last block adds around its attention branch; its `str` is the key in results, as in "full", "no_mlp*2".

    residual: the stream is kept; mlp: the block's MLP is run (on what there is, with its own residual); gain: factor on
    the attention branch. beside: the attention branches of all the layers are added up in a second path, without MLP,
    beside the tower, which stays as it is. "full" is CLIP, MaskCLIP and SCLIP; "no_mlp" ITACLIP; "bare" NACLIP and
    ClearCLIP; "beside" GEM and CLIP Surgery, with the last 6 layers.
    """

    residual: bool = True
    mlp: bool = True
    gain: float = 1.0
    beside: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.gain):
            raise ValueError(f"gain {self.gain} of a read-out is not a finite number")
        if self._kept not in _READOUTS.values():
            raise ValueError(f"read-out {self._kept}: a path beside the tower has a residual and no MLP")

    @property
    def _kept(self) -> tuple[bool, bool, bool]:
        return self.residual, self.mlp, self.beside

    def __str__(self) -> str:
        name = next(name for name, kept in _READOUTS.items() if kept == self._kept)
        return name if self.gain == 1 else f"{name}*{str(float(self.gain)).removesuffix('.0')}"

    @classmethod
    def parse(cls, key: str | Readout) -> Readout:
        """The read-out of a key: one of "full", "no_mlp", "no_residual", "bare", "beside", with "*GAIN" at will."""
        if isinstance(key, Readout):
            return key
        try:
            name, times, gain = key.replace(" ", "").partition("*")
            residual, mlp, beside = _READOUTS[name]
            return cls(residual, mlp, float(gain if times else 1), beside)
        except (AttributeError, KeyError, ValueError):
            expected = ", ".join(_READOUTS)
            raise ValueError(f"unknown readout {key!r}: expected {expected}, or one with a gain: 'full*2'") from None
