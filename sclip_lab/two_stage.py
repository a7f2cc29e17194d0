"""Two stages: class-agnostic proposals, then CLIP on a crop of each. What ZegCLIP's speed is measured against.

As in ZegFormer (Ding et al., CVPR 2022, arXiv:2112.07910) and zsseg (Xu et al., ECCV 2022, arXiv:2112.14757), whose
proposals a MaskFormer makes, trained on seen classes. Here they are segments of the tower's own patches, grouped from
fine to coarse, and nothing is trained: the first stage is far cheaper than theirs, the second is the same.

Letters: n proposals, i j patch grid, k classes, e embedding, H W pixels, s side of the tower's own pictures.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from sclip_lab.clip import Clip
from sclip_lab.images import pixels
from sclip_lab.protocol import Protocol
from sclip_lab.segment import trunk_of
from sclip_lab.trunk import dense


@torch.no_grad()
def label(clip: Clip, image: np.ndarray, texts: Tensor, number: int = 50, short_side: int = 512) -> Tensor:
    """Labels [H W] int64 of an image uint8 [H W 3] by names, texts [k e], with so many proposals.

    A pixel's score for a class is the sum, over the proposals that it is in, of CLIP's probability for their crops.
    """
    masks = proposals(features(clip, image, short_side), number)
    masks = np.stack([cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) for mask in masks])
    shown = torch.from_numpy(crops(image, masks, clip.image_size, clip.mean)).to(clip.device)
    vectors = clip.model.encode_image(pixels(shown, clip.mean, clip.std), normalize=True)
    shares = (clip.model.logit_scale.exp() * vectors @ texts.T.to(vectors)).softmax(dim=-1)  # n k
    return torch.einsum("nk,nhw->khw", shares, torch.from_numpy(masks).to(shares)).argmax(dim=0)


def features(clip: Clip, image: np.ndarray, short_side: int) -> np.ndarray:
    """What groups patches, unit vectors [i j e]: CSA's, of the whole picture at once."""
    trunk = trunk_of(clip.visual, image, Protocol(short_side, crop=0), clip.mean, clip.std)
    patches = torch.nn.functional.normalize(dense(trunk, "csa")[0, -trunk.grid[0] * trunk.grid[1] :].float(), dim=-1)
    return patches.unflatten(0, trunk.grid).cpu().numpy()


def proposals(features: np.ndarray, number: int) -> np.ndarray:
    """Masks [n i j], 0 and 1, of connected segments, one inside another: the top of a tree over patches, smallest last.

    Ward's clustering of features [i j e], patches being joined to neighbours alone (Ward 1963). The n nodes are those
    that the last joins have joined, and the whole picture where n is odd.
    """
    from sklearn.cluster import ward_tree  # takes a second
    from sklearn.feature_extraction.image import grid_to_graph

    grid, patches = features.shape[:2], features.shape[0] * features.shape[1]
    if not 1 <= number < 2 * patches:
        raise ValueError(f"number={number} of proposals for {patches} patches: expected 1 to {2 * patches - 1}")
    joins, *_ = ward_tree(features.reshape(patches, -1), connectivity=grid_to_graph(*grid))
    nodes = list(np.eye(patches, dtype=np.uint8))
    for one, other in joins:
        nodes.append(nodes[one] + nodes[other])
    whole = [len(nodes) - 1] * (number % 2)
    kept = [*whole, *joins[len(joins) - number // 2 :][::-1].ravel()]
    return np.stack([nodes[node] for node in kept]).reshape(-1, *grid)


def crops(image: np.ndarray, masks: np.ndarray, side: int, mean: tuple[float, ...]) -> np.ndarray:
    """The box around each mask [n H W] in an image uint8 [H W 3], grey outside the mask: uint8 [n s s 3]."""
    cuts = []
    for mask in masks:
        x, y, width, height = cv2.boundingRect(mask)
        box = np.s_[y : y + height, x : x + width]
        shown = np.where(mask[box][..., None], image[box], np.rint(255 * np.array(mean)).astype(np.uint8))
        cuts.append(cv2.resize(shown, (side, side)))
    return np.stack(cuts)
