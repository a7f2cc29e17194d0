"""MVP-SEG: several learned prompts, each a view of every class, over the patch features of a frozen CLIP.

Guo, Wang, Gao, Jiang, Hu, Zhang, Zhang, PRCV 2023, arXiv:2304.06957. No code was released. What is learned are the
prompts, vectors in the place of words, and two temperatures; each design can be left out:

- views: how many prompts there are; their cosines with a patch are added. 1 is a single learned prompt.
- `losses.overlap` (orthogonal constraint): how alike the prompts' mean tokens are, with a weight; 0 leaves it out.
- `Refining` (global prompt refining): one more prompt says how much of a class there is in the picture at all, by which
  its map is multiplied; None leaves maps as they are.

What the paper leaves open is decided so. A class of several words has the mean of their vectors. MaskCLIP's features
are those of its released code, where the last block keeps its residual and MLP. Temperatures are learned as logarithms,
and begin at CLIP's own; tokens begin random, of CoOp's spread (Zhou et al., IJCV 2022, arXiv:2109.01134). The overlap
is that of the views alone. The paper's loss of g has no part for absent classes (`losses.presence_of_these`), nor has
the likelihood of m_f g, so that g = 1 is best for all of them: here they count, too (`losses.presence`). Weights,
numbers and rates: see `train_mvpseg`.

MVP-SEG+ teaches a `student`, whose classifier begins as the views' vectors: first by what MVP-SEG makes of the pixels
of unseen classes (`taught`), then by what the student makes of them itself (`zegclip.transductive`).

Letters: b images, v views, l tokens of a prompt, w their width, n words, t tokens of a text, k classes, e CLIP's
embedding, i j patch grid, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclip_lab.clip import Clip
from sclip_lab.images import pixels
from sclip_lab.later import RECIPES
from sclip_lab.losses import Loss, exclusive, likelihood, overlap, presence, resized
from sclip_lab.protocol import Protocol, Stitched, windows
from sclip_lab.segment import cosines
from sclip_lab.splits import Split
from sclip_lab.text import parse
from sclip_lab.training import Objective
from sclip_lab.trunk import dense, encode
from sclip_lab.zegclip import Decoder, NameAlone, Prompts, ZegClip, aligned, own_tower

Reading = tuple[str, str, tuple[int, ...]]  # attention, read-out, layers: see `trunk.dense`


class Words(NamedTuple):
    """What prompts are put before: tokens [n t] of all words, with start and end, and the class of each word [n]."""

    tokens: Tensor
    classes: Tensor


def words(clip: Clip, classes: Sequence[str]) -> Words:
    """The words of classes, lines for `text.parse`, for a CLIP. Raises ValueError for words without an embedding."""
    lists = list(parse(classes).values())
    if strange := [word for own in lists for word in own if not clip.knows(word)]:
        raise ValueError(f"model {clip.name!r} never saw the words of {strange}: expected names from its own world")
    tokens = clip.tokenizer([word for words in lists for word in words])
    label = torch.tensor([label for label, words in enumerate(lists) for _ in words])
    return Words(tokens[:, : tokens.argmax(dim=1).max() + 1].to(clip.device), label.to(clip.device))


class Views(nn.Module):
    """Prompts [v l w], token vectors that stand between the start of a text and a word, the same for all words."""

    def __init__(self, clip: Clip, number: int, length: int, spread: float = 0.02) -> None:
        super().__init__()
        if not _causal(clip):
            raise ValueError(f"model {clip.name!r}: expected a text tower that reads forwards and ends in a token")
        self.clip = clip
        self.tokens = nn.Parameter(spread * torch.randn(number, length, clip.text.token_embedding.embedding_dim))

    def forward(self, words: Words) -> Tensor:
        """Unit vectors [v k e] of all classes in every view: CLIP's text tower, frozen, on [start, prompt, word, end].

        Raises ValueError where that is longer than a text may be.
        """
        text, (views, length, _), (n, t) = self.clip.text, self.tokens.shape, words.tokens.shape
        if length + t > self.clip.context:
            raise ValueError(f"prompts of {length} tokens before texts of {t}: expected {self.clip.context} in all")
        word = text.token_embedding(words.tokens).expand(views, -1, -1, -1)  # v n t w
        own = self.tokens.to(word.dtype)[:, None].expand(-1, n, -1, -1)
        x = torch.cat([word[:, :, :1], own, word[:, :, 1:]], dim=2).flatten(0, 1)  # v*n l+t w
        # No token sees those after it, so that nothing is missing without what follows the last end.
        mask = text.attn_mask[: length + t, : length + t]
        x = text.transformer(x + text.positional_embedding[: length + t].to(x.dtype), attn_mask=mask)
        ends = (words.tokens.argmax(dim=1) + length).repeat(views)
        x = text.ln_final(x[torch.arange(len(x), device=x.device), ends]) @ text.text_projection
        x = F.normalize(x.float(), dim=-1).unflatten(0, (views, n))
        sums = x.new_zeros(views, int(words.classes.max()) + 1, x.shape[-1]).index_add(1, words.classes, x)
        return F.normalize(sums, dim=-1)


class Refining(nn.Module):
    """Whether a class is in a picture: the logit [b k] of g, of what one more prompt makes of its patches [b k i j].

    g = sigmoid(m · softmax(γ m) / τ) of a class's cosines m with all patches, which weigh the more the nearer they are.
    """

    def __init__(self, clip: Clip, length: int, gamma: float) -> None:
        super().__init__()
        self.view, self.gamma = Views(clip, 1, length), gamma
        self.log_tau = nn.Parameter(-clip.model.logit_scale.detach().float().clone())

    def forward(self, masks: Tensor) -> Tensor:
        m = masks.flatten(2)
        return (m * (self.gamma * m).softmax(dim=-1)).sum(dim=-1) / self.log_tau.exp()


class Found(NamedTuple):
    """What MVP-SEG makes of pictures: logits of the fused maps [b k i j], and of g [b k] where there is refining."""

    maps: Tensor
    presence: Tensor | None

    def at(self, size: Sequence[int]) -> Tensor:
        """log(m_f g) [b k H W], the final maps, at the pixels of a size."""
        shares = resized(self.maps, size).log_softmax(dim=1)
        return shares if self.presence is None else shares + F.logsigmoid(self.presence)[..., None, None]


class MvpSeg(nn.Module):
    """Pixels [b 3 H W], normalised, and `Words` -> `Found`, and the overlap of its views. See `mvpseg`.

    Only what is learned is in its `parameters` and `state_dict`: the CLIP stays outside, frozen and in eval mode.
    """

    def __init__(self, clip: Clip, views: Views, refine: Refining | None, reading: Reading) -> None:
        super().__init__()
        self.clip, self.views, self.refine, self.reading = clip, views, refine, reading
        scale = clip.model.logit_scale.detach().float() - math.log(len(views.tokens))
        self.log_tau = nn.Parameter(scale.clone())

    def forward(self, pixels: Tensor, words: Words) -> tuple[Found, Tensor]:
        return self.look(pixels, self.names(words)), overlap(self.views.tokens.mean(dim=1))

    def names(self, words: Words) -> Tensor:
        """Unit vectors [v k e] of classes in every view; with refining, those of its prompt come last."""
        return torch.cat([part(words) for part in (self.views, *([self.refine.view] if self.refine else []))])

    @torch.no_grad()
    def classifier(self, words: Words) -> Tensor:
        """Unit vectors [k e], whose cosines with a patch are those of all views added up, but for a factor."""
        return F.normalize(self.views(words).sum(dim=0), dim=-1)

    def masks(self, pixels: Tensor, names: Tensor) -> Tensor:
        """Cosines m [b v k i j] of patches with names [v k e]."""
        with torch.no_grad():
            trunk = encode(self.clip.visual, pixels)
            trunk = self.clip.step(trunk) if self.clip.step else trunk
            tokens = dense(trunk, *self.reading)
        return cosines(tokens, names.flatten(0, 1), trunk.grid).unflatten(1, names.shape[:2])

    def look(self, pixels: Tensor, names: Tensor) -> Found:
        """What is found by `names`."""
        masks, views = self.masks(pixels, names), len(self.views.tokens)
        fused = self.log_tau.exp() * masks[:, :views].sum(dim=1)
        return Found(fused, self.refine(masks[:, views]) if self.refine else None)


def mvpseg(
    clip: Clip,
    views: int = 3,
    length: int = 8,
    gamma: float | None = 30.0,
    reading: Reading = RECIPES["MaskCLIP"],
    seed: int = 0,
) -> MvpSeg:
    """An untrained MVP-SEG on a CLIP's device: so many `views`, of so many tokens each.

    gamma: how sharply refining looks for what is most like a class; None for none. reading: the attention of the patch
    features, its read-out and layers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompts = Views(clip, views, length)
        model = MvpSeg(clip, prompts, None if gamma is None else Refining(clip, length, gamma), reading)
    return model.to(clip.device).eval()


def inductive(
    clip: Clip,
    classes: Sequence[str],
    split: Split,
    present: Callable[[Tensor, Tensor], Tensor] = presence,
    presence_weight: float = 1.0,
    overlap_weight: float = 1.0,
) -> Objective:
    """What to minimise on crops hidden by `split.inductive`, by the names of the seen classes alone.

    classes: lines for `text.parse`; present: `losses.presence`, or `presence_of_these` as the paper writes it.
    """
    seen = words(clip, [classes[label] for label in split.seen])

    def objective(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        found, alike = model(pixels(images, clip.mean, clip.std), seen)
        loss = likelihood(found.at(truth.shape[-2:]), truth) + overlap_weight * alike
        return loss if found.presence is None else loss + presence_weight * present(found.presence, truth)

    return objective


@torch.no_grad()
def label(model: MvpSeg, image: np.ndarray, names: Tensor, protocol: Protocol) -> Tensor:
    """Labels [H W] int64 of an image uint8 [H W 3], by the names of all classes [v k e], as `MvpSeg.names` has them.

    Probabilities are averaged where windows overlap.
    """
    cuts = torch.from_numpy(windows(image, protocol)).to(names.device)
    shown = pixels(cuts, model.clip.mean, model.clip.std)
    shares = model.look(shown, names).at(shown.shape[2:]).exp()  # n k h w
    return torch.cat([rows.argmax(dim=0) for rows in Stitched(shares, protocol, image.shape[:2])])


def student(clip: Clip, prompts: int = 10, seed: int = 0) -> ZegClip:
    """An untrained student of MVP-SEG+, on a CLIP's device: the tower, prompted, then one bilinear form of patches and
    names, which begins as CLIP's cosine times its scale.

    The paper's is DeepLab on a ResNet-101, all of which learns, before a classifier of fixed vectors.
    """
    width, embedding = own_tower(clip).proj.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = Prompts(clip.layers, prompts, width, clip.patch)
        model = ZegClip(clip, tuned, NameAlone(embedding), Decoder(embedding, layers=1))
    heads = model.decoder.match.heads
    aligned(model, gain=(clip.model.logit_scale.exp().item() * heads * (embedding / heads) ** 0.5) ** 0.5)
    return model.to(clip.device).eval()


def taught(teacher: MvpSeg, classes: Sequence[str], split: Split, loss: Loss = exclusive) -> Objective:
    """What a student minimises on crops hidden by `split.transductive`: there the teacher's best unseen class is taken
    for true.
    """
    every = words(teacher.clip, classes)
    with torch.no_grad():
        names, texts = teacher.names(every), teacher.classifier(every)

    def objective(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        shown = pixels(images, teacher.clip.mean, teacher.clip.std)
        with torch.no_grad():
            guess = teacher.look(shown, names).at(truth.shape[-2:])
        return loss(model(shown, texts), split.guessed(truth, guess))

    return objective


def _causal(clip: Clip) -> bool:
    """Whether a CLIP's text tower reads forwards, and is read at the token of the highest number, the end."""
    pool = getattr(clip.text, "text_pool_type", None) or clip.text.pool_type
    return clip.text.attn_mask is not None and pool == "argmax"
