"""What several test files share. Nothing here, or in any test, reaches for the network."""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, by open_clip
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: threads on a busy machine wait for one another

import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # also where torch was there before, in a notebook's kernel

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # what one run keeps is none of the next one's


@pytest.fixture(scope="session")
def visual():
    """The small random tower that the authors' code answered for; its tests leave it as it is."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    vit = json.loads((REFERENCE / "cases.json").read_text())["vit"]
    size = {"image_size": vit["res"], "patch_size": vit["patch"], "output_dim": vit["dim"]}
    depth = {"width": vit["width"], "layers": vit["layers"], "heads": vit["heads"], "mlp_ratio": 4.0}
    tower = VisionTransformer(**size, **depth, act_layer=QuickGELU)
    tower.load_state_dict(load_file(REFERENCE / "visual.safetensors"))
    return tower.eval().requires_grad_(False)


@pytest.fixture
def pixels():
    """Two images whose grid, 6x9 for patches of 16, is neither square nor the tower's own."""
    return torch.randn(2, 3, 96, 150, generator=torch.Generator().manual_seed(0))
