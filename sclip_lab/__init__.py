"""sclip-lab: what must change in CLIP's last self-attention for its patch features to know where things are?"""

from importlib import import_module
from types import ModuleType

# `attention`, `datasets`, `segment` and `sweep` are functions named like their modules. A module becomes an attribute
# of the package when it is first imported; that it is imported here, and the function bound after it, makes the
# function stay, whatever is imported later. (`from sclip_lab.attention import csa` reads the module as ever.)
from sclip_lab.attention import affinity
from sclip_lab.clip import Clip, load
from sclip_lab.datasets import datasets, load_dataset
from sclip_lab.label import Labelling
from sclip_lab.later import repair
from sclip_lab.protocol import Protocol
from sclip_lab.readout import Readout
from sclip_lab.registry import attention, canonical, variant, variants
from sclip_lab.segment import Segmentation, logits, segment
from sclip_lab.summary import compare, summarise
from sclip_lab.sweep import sweep
from sclip_lab.trunk import Site, Trunk, dense, encode

__all__ = [
    "Clip", "Labelling", "Protocol", "Readout", "Segmentation", "Site", "Trunk", "affinity", "attention",
    "canonical", "compare", "datasets", "dense", "encode", "load", "load_dataset", "logits", "repair", "segment",
    "summarise", "sweep", "variant", "variants",
]  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in ("charts", "explorer", "fit", "plots", "predict", "scenes"):  # on demand: some take long
        return import_module(f"sclip_lab.{name}")
    raise AttributeError(f"module 'sclip_lab' has no attribute {name!r}")
