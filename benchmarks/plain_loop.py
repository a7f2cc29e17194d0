"""The field's way of evaluating, as the honest baseline of `speed.py`: once per variant, one window at a time, float32.

It follows the released code of SCLIP, which NACLIP, ClearCLIP, ResCLIP and SC-CLIP share: each window's scores are
upsampled to the window, padded to the picture, added, divided by how many windows overlap, resized; the softmax over
all words is turned into classes by a one-hot maximum. Nothing is shared between variants. The tower's blocks are the
same, so that the two differ in how they are run and in nothing else.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sclip_lab import Clip, Labelling, Protocol, dense, encode
from sclip_lab.images import pixels
from sclip_lab.protocol import resize
from sclip_lab.registry import Attention
from sclip_lab.text import Queries


@torch.no_grad()
def plain_loop(
    clip: Clip,
    picture: np.ndarray,
    words: Queries,
    attention: str | Attention,
    protocol: Protocol,
    labelling: Labelling,
) -> Tensor:
    """Labels [H W] of a picture uint8 [H W 3]."""
    size = protocol.resized(*picture.shape[:2])
    image = pixels(torch.from_numpy(resize(picture, size))[None], clip.mean, clip.std)  # 1 3 h w
    crop, stride = protocol.crop, protocol.stride
    rows = max(size[0] - crop + stride - 1, 0) // stride + 1
    columns = max(size[1] - crop + stride - 1, 0) // stride + 1
    total = torch.zeros(1, len(words.vectors), *size, device=clip.device)
    count = torch.zeros(1, 1, *size, device=clip.device)
    for row in range(rows):
        for column in range(columns):
            y2, x2 = min(row * stride + crop, size[0]), min(column * stride + crop, size[1])
            y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            scores = _scores(clip, image[:, :, y1:y2, x1:x2], words.vectors, attention)
            scores = F.interpolate(scores, size=(y2 - y1, x2 - x1), mode="bilinear")
            total += F.pad(scores, (x1, size[1] - x2, y1, size[0] - y2))
            count[:, :, y1:y2, x1:x2] += 1
    logits = F.interpolate(total / count, size=picture.shape[:2], mode="bilinear")[0]
    return postprocess(logits, words.query_class, labelling)


def postprocess(logits: Tensor, query_class: Tensor, labelling: Labelling) -> Tensor:
    """Cosines [q H W] -> labels [H W] with all that the released code holds in memory for it."""
    probabilities = (logits * labelling.logit_scale).softmax(0)
    classes, count = int(query_class.max()) + 1, len(query_class)
    if classes != count:
        one_hot = F.one_hot(query_class, classes).T.view(classes, count, 1, 1)
        probabilities = (probabilities[None] * one_hot).max(1)[0]
    if labelling.area_thd is not None:
        winners = F.one_hot(probabilities.argmax(0), classes).to(probabilities.dtype)
        area = winners[:, :, 1:].sum((0, 1), keepdim=True)
        area = (area > labelling.area_thd * area.sum()).to(probabilities.dtype)
        probabilities[1:] *= area.transpose(0, -1)
    labels = probabilities.argmax(0, keepdim=True)
    labels[probabilities.max(0, keepdim=True)[0] < labelling.prob_thd] = 0
    return labels[0]


def _scores(clip: Clip, window: Tensor, vectors: Tensor, attention: str | Attention) -> Tensor:
    trunk = encode(clip.visual, window)
    patches = F.normalize(dense(trunk, attention)[:, 1:], dim=-1)
    return (patches @ vectors.T).mT.unflatten(-1, trunk.grid)  # 1 q i j
