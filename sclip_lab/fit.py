"""SCLIP's learned projection: one matrix, learned from a few labelled pictures through the frozen tower.

Table 2 of the paper (Wang, Mei, Yuille, ECCV 2024, arXiv:2312.01597) has a projection learned from 64 samples of each
benchmark's training split, and says no more than that. Here all pictures run through the tower once; then only its last
block is run, over and over, and only the projection in it has gradients.

Defaults were chosen on the bundled model with pictures 64 to 183 of the training split, none of which they learn from.
There, starts at W_q, at the identity and at a random matrix end alike. More than 100 steps lower the loss further, but
the mIoU hardly, while that of the 64 pictures goes on rising: stopping early is all the regularisation there is.

Letters: b windows of a batch, n windows or tokens, d width, i j patch grid of a window, q queries, k classes.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from sclip_lab.attention import affinity
from sclip_lab.clip import Clip
from sclip_lab.datasets import BrokenImage, Dataset
from sclip_lab.files import replacing, results
from sclip_lab.metrics import IGNORE
from sclip_lab.protocol import Protocol, window_labels
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import queries
from sclip_lab.trunk import Site, Trunk


class Projection(nn.Module):
    """softmax(s p pᵀ), p = x Wᵀ + b, with parameters: an attention. weight [d d], bias [d], as in torch's Linear."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(start.detach().float().clone()) for start in (weight, bias))

    def forward(self, site: Site) -> Tensor:
        """The weights at a site, [b h n n], float32."""
        p = site.heads(F.linear(site.x.float(), self.weight, self.bias))
        return affinity(site, p, p)


@dataclass(frozen=True, eq=False)
class Fit:
    """A learned projection, the loss of every step [steps], and what it was made with (strings)."""

    projection: Projection
    losses: np.ndarray
    made_with: dict[str, str]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file for the attention `learned(path)`; a relative path is in the folder of results."""
        tensors = self.projection.state_dict() | {"loss": torch.from_numpy(self.losses)}
        with replacing(results() / path) as temporary:
            save_file(tensors, temporary, self.made_with)


def curve(path: str | PathLike[str]) -> np.ndarray:
    """The loss of every step [steps] that a saved projection took; a relative path is in the folder of results."""
    return load_file(results() / path)["loss"].numpy()


def fit(
    clip: Clip,
    dataset: Dataset,
    samples: int = 64,
    steps: int = 100,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> Fit:
    """Learn a projection for one dataset from the first `samples` pictures of its training split.

    It starts as the tower's own W_q. Adam minimises the `loss_of` cosines that are scaled as `dataset.labelling` does,
    in the windows of the evaluation, read out in full; `batch` windows a step, drawn by `seed`. The paper gives none of
    these. Pictures whose files cannot be used are left out, with a warning that names them. Raises ValueError for
    another split than "train", for more samples than there are, and where no picture is left.
    """
    if dataset.split != "train":
        raise ValueError(
            f"dataset {dataset.name!r} is of split {dataset.split!r}, which is for evaluation: expected one to learn "
            f"from, load_dataset(..., split='train')"
        )
    if not 1 <= samples <= len(dataset.keys):
        raise ValueError(f"samples={samples} of {dataset.name!r}: expected 1 to {len(dataset.keys)}, or load more")
    words = queries(clip, dataset.classes)
    protocol = dataset.protocol or Protocol.for_image_size(clip.image_size)
    site, truth = _encode(clip, dataset, dataset.keys[:samples], protocol)
    attention = site.block.attn
    w_q, bias = attention.in_proj_weight.chunk(3)[0], attention.in_proj_bias
    projection = Projection(w_q, w_q.new_zeros(len(w_q)) if bias is None else bias.chunk(3)[0])
    optimiser = torch.optim.Adam(projection.parameters(), lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    progress = tqdm(range(steps), desc=f"learning a projection on {dataset.name}", unit="step", file=sys.stdout)
    for _ in progress:
        chosen = torch.randperm(len(truth), generator=generator)[:batch].to(truth.device)
        trunk = Trunk(clip.visual, (replace(site, stream=site.stream[chosen]),))
        logits = dataset.labelling.logit_scale * scores(trunk, words.vectors, projection)
        loss = loss_of(logits, words.query_class, truth[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    made_with = {
        "model": clip.name, "dataset": dataset.name, "split": dataset.split, "samples": samples, "seed": seed,
        "steps": steps, "batch": batch, "lr": lr, "protocol": protocol, "labelling": dataset.labelling,
    }  # fmt: skip
    return Fit(projection.requires_grad_(False), np.array(losses), {key: str(made_with[key]) for key in made_with})


def loss_of(logits: Tensor, query_class: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy over classes, each scored by its best word: logits [b q i j], truth [b i j], 255 left out."""
    classes = range(int(query_class.max()) + 1)
    best = torch.stack([logits[:, query_class == k].amax(dim=1) for k in classes], dim=1)  # b k i j
    return F.cross_entropy(best, truth, ignore_index=IGNORE)


@torch.no_grad()
def _encode(clip: Clip, dataset: Dataset, keys: Sequence[str], protocol: Protocol) -> tuple[Site, Tensor]:
    """The last block's site for all windows [n] with labels, as if of a tower of one layer, and the labels [n i j]."""
    streams, truths, broken = [], [], []
    for key in keys:
        try:
            image, truth = dataset.read(key)
        except BrokenImage as error:
            broken.append(str(error))
            continue
        trunk = trunk_of(clip.visual, image, protocol, clip.mean, clip.std, clip.step)
        streams.append(trunk.site().stream)
        truths.append(window_labels(truth, protocol, trunk.grid))
    if broken:
        warnings.warn(f"pictures left out, {len(broken)} in all: {'; '.join(broken):.2000}", stacklevel=4)
    if not streams:
        raise ValueError(f"no picture of {dataset.name!r} is left to learn from: expected whole files")
    stream, labels = torch.cat(streams), torch.cat(truths).to(streams[0].device)
    labelled = (labels != IGNORE).flatten(1).any(dim=1)
    return Site(trunk.site().blocks[-1:], stream[labelled], trunk.grid), labels[labelled]
