"""ZegCLIP: a frozen CLIP, prompted, with a small decoder that matches class names to patches.

Zhou, Lei, Zhang, Liu, Liu, CVPR 2023, arXiv:2212.03588. Three designs, each of which can be left out:

- `Prompts` (deep prompt tuning): a few tokens after CLS in every layer, the same for all pictures, are what is learned
  of the tower; None leaves it as it is.
- `Descriptor` (relationship descriptor): a query is made of a class name and of how it goes with the picture's CLS;
  `NameAlone` of the name.
- `non_exclusive` loss: classes do not compete for a pixel; under `exclusive`, a softmax, they do.

What the paper and the authors' code leave open, or do by accident, is decided so: CLS gets its class embedding once
(the authors' code adds it again with the position); drop path skips whole blocks, not their two branches one by one; a
class of several words has the mean of their vectors; the decoder's heads are 64 wide in every model; pixels are
normalised as CLIP's own (there by ImageNet's mean); void ones are left out of the loss (there negatives of all classes,
see `losses.void_negative`). What comes after the logits of the decoder's last attention does not exist here, and
neither does self-attention: of the authors' 13.8 million parameters for VOC these are 5.8, which nothing reads.

Letters: b images, k classes, e CLIP's embedding, d width, n tokens, i j patch grid, h heads, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from sclip_lab.clip import Clip
from sclip_lab.images import pixels
from sclip_lab.losses import Loss, non_exclusive, resized
from sclip_lab.protocol import Protocol, Stitched, windows
from sclip_lab.splits import Split
from sclip_lab.text import queries
from sclip_lab.training import Objective

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

TEMPLATES = ("a photo of a {}.",)  # for VOC; of COCO they average 15


class Prompts(nn.Module):
    """Tokens [layers n d], through one projection; each layer's replace those of the layer below. A norm at the end.

    Jia et al., ECCV 2022 (arXiv:2203.12119), "deep", whose initialisation it is.
    """

    def __init__(self, layers: int, number: int, width: int, patch: int, dropout: float = 0.1) -> None:
        super().__init__()
        bound = (6 / (3 * patch**2 + width)) ** 0.5
        self.tokens = nn.Parameter(torch.empty(layers, number, width).uniform_(-bound, bound))
        self.proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def into(self, x: Tensor, layer: int) -> Tensor:
        """The stream [b n d] with this layer's tokens after CLS, in the place of those of the layer below."""
        own = self.dropout(self.proj(self.tokens[layer])).to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], own, x[:, 1 + (own.shape[1] if layer else 0) :]], dim=1)


class Descriptor(nn.Module):
    """The query of a class, [t ⊙ g; t] through one linear layer: names t [k e], CLS g [b e] -> [b k e]."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * embedding, embedding)

    def forward(self, names: Tensor, cls: Tensor) -> Tensor:
        t = names.expand(len(cls), -1, -1)
        return self.linear(torch.cat([t * cls[:, None], t], dim=-1))


class NameAlone(nn.Module):
    """The name of a class as its query, whatever the picture: names [k e], CLS [b e] -> [b k e]."""

    def __init__(self, embedding: int) -> None:
        super().__init__()

    def forward(self, names: Tensor, cls: Tensor) -> Tensor:
        return names.expand(len(cls), -1, -1)


class Match(nn.Module):
    """Logits [b h k p] of how queries [b k e] go with patches [b p e]: q kᵀ / sqrt(c), of heads of width c."""

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.heads = max(embedding // 64, 1)
        self.q, self.k = nn.Linear(embedding, embedding), nn.Linear(embedding, embedding)

    def cut(self, x: Tensor) -> Tensor:
        """[b n e] -> [b h n c]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        q, k = self.cut(self.q(queries)), self.cut(self.k(patches))
        return q @ k.mT * q.shape[-1] ** -0.5


class Layer(nn.Module):
    """Cross-attention of queries to patches and an MLP, each with residual and a norm after it; no self-attention."""

    def __init__(self, embedding: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.match = Match(embedding)
        self.v, self.out = nn.Linear(embedding, embedding), nn.Linear(embedding, embedding)
        wide = nn.Linear(embedding, 4 * embedding), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * embedding, embedding)
        self.mlp = nn.Sequential(*wide)
        self.norms = nn.ModuleList([nn.LayerNorm(embedding), nn.LayerNorm(embedding)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        weights = self.dropout(self.match(queries, patches).softmax(dim=-1))  # b h k p
        read = self.out((weights @ self.match.cut(self.v(patches))).transpose(1, 2).flatten(2))
        queries = self.norms[0](queries + self.dropout(read))
        return self.norms[1](queries + self.dropout(self.mlp(queries)))


class Decoder(nn.Module):
    """Queries [b k e], patches [b p e] -> maps [b k p], the last layer's logits before its softmax, mean over heads."""

    def __init__(self, embedding: int, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(embedding) for _ in range(layers - 1))
        self.match = Match(embedding)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.match(queries, patches).mean(dim=1)


class ZegClip(nn.Module):
    """Pixels [b 3 H W], normalised, and names [k e], unit vectors -> maps [b k i j], logits. See `zegclip`.

    Only what is learned is in its `parameters` and `state_dict`: the CLIP stays outside, frozen and in eval mode.
    """

    def __init__(self, clip: Clip, prompts: Prompts | None, describe: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.clip, self.prompts, self.describe, self.decoder = clip, prompts, describe, decoder

    def forward(self, pixels: Tensor, names: Tensor) -> Tensor:
        cls, patches = self.tower(pixels)
        queries = self.describe(names, cls)
        return self.decoder(queries, patches.flatten(1, 2)).unflatten(-1, patches.shape[1:3])

    def tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """CLS [b e] and patches [b i j e], unit vectors, of the prompted tower."""
        visual = self.clip.visual
        x, grid = _embedded(visual, pixels)
        blocks = visual.transformer.resblocks
        for layer, block in enumerate(blocks):
            x = self.prompts.into(x, layer) if self.prompts else x
            skipped = 0.1 * layer / max(len(blocks) - 1, 1)  # drop path
            x = x + stochastic_depth(block(x) - x, skipped, "row", self.training)
        x = self.prompts.norm(x) if self.prompts else x
        x = F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1)
        return x[:, 0], x[:, -grid[0] * grid[1] :].unflatten(1, grid)


def _embedded(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What enters the first block [b n d], and the grid; positions are resized bilinearly, other than in `encode`."""
    x = visual.conv1(pixels)  # b d i j
    cls, patches = visual.positional_embedding.split([1, len(visual.positional_embedding) - 1])
    native = patches.mT.unflatten(-1, visual.grid_size)[None]  # 1 d i j
    x = x + F.interpolate(native, x.shape[2:], mode="bilinear", align_corners=False).to(x.dtype)
    first = (visual.class_embedding + cls).to(x.dtype).expand(len(x), 1, -1)
    return visual.ln_pre(torch.cat([first, x.flatten(2).mT], dim=1)), (x.shape[2], x.shape[3])


def published(model: ZegClip) -> None:
    """Begin as the authors do: weights of descriptor and decoder from a normal of 0.02, cut at 2."""
    for layer in [*model.describe.modules(), *model.decoder.modules()]:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def aligned(model: ZegClip, gain: float = 5.0) -> None:
    """Begin with maps that are CLIP's own cosines, times a number: queries are names, and the last q and k `gain` times
    the identity; all else is as published.

    From a random beginning the decoder has to find out from the seen names alone how names go with patches. Where there
    are few, and unseen ones are not like them, what it finds does not hold for these.
    """
    published(model)
    if isinstance(model.describe, Descriptor):
        times, alone = model.describe.linear.weight.data.chunk(2, dim=1)
        nn.init.zeros_(times)
        nn.init.eye_(alone)
    for layer in (model.decoder.match.q, model.decoder.match.k):
        layer.weight.data.copy_(gain * torch.eye(layer.in_features))


def zegclip(
    clip: Clip,
    prompts: int = 10,
    describe: type[nn.Module] = Descriptor,
    seed: int = 0,
    begin: Callable[[ZegClip], None] = published,
) -> ZegClip:
    """An untrained ZegCLIP on a CLIP's device. prompts: per layer, 10 for VOC, 100 for COCO, 0 for none.

    begin: what sets the initial weights of descriptor and decoder, `published` or `aligned`. Raises ValueError for a
    tower that is not open_clip's own, or not in float32.
    """
    visual = own_tower(clip)
    layers, (width, embedding) = len(visual.transformer.resblocks), visual.proj.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = Prompts(layers, prompts, width, clip.patch) if prompts else None
        model = ZegClip(clip, tuned, describe(embedding), Decoder(embedding))
        begin(model)
    return model.to(visual.proj.device).eval()


def own_tower(clip: Clip) -> VisionTransformer:
    """The vision tower of a CLIP. Raises ValueError where prompts cannot go into it."""
    if not hasattr(clip.visual, "transformer") or clip.visual.proj.dtype != torch.float32:
        raise ValueError(f"model {clip.name!r}: expected open_clip's own ViT, in float32, such as ViT-B-16-quickgelu")
    return clip.visual


def names(clip: Clip, classes: Sequence[str], templates: Sequence[str] | None = TEMPLATES) -> Tensor:
    """One unit vector per class [k e], the mean over its words of what `text.queries` makes of them."""
    words = queries(clip, classes, templates)
    vectors = [words.vectors[words.query_class == label].mean(dim=0) for label in range(len(words.names))]
    return F.normalize(torch.stack(vectors), dim=-1)


def inductive(clip: Clip, texts: Tensor, split: Split, loss: Loss = non_exclusive) -> Objective:
    """What to minimise on crops hidden by `split.inductive`: the loss of the seen ones among texts [classes e]."""
    seen = texts[list(split.seen)]

    def objective(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        return loss(model(pixels(images, clip.mean, clip.std), seen), truth)

    return objective


def transductive(clip: Clip, texts: Tensor, split: Split, loss: Loss = non_exclusive) -> Objective:
    """Self-training, on crops hidden by `split.transductive`: there the best unseen class is taken for true.

    It is found anew at every step by the network that learns, which is to have been trained inductively.
    """

    def objective(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        maps = model(pixels(images, clip.mean, clip.std), texts)
        return loss(maps, split.guessed(truth, resized(maps.detach(), truth.shape[-2:])))

    return objective


def softmax(maps: Tensor) -> Tensor:
    """Probabilities of maps [b k ..] that were trained by `exclusive`."""
    return maps.softmax(dim=1)


@torch.no_grad()
def label(
    model: ZegClip,
    image: np.ndarray,
    texts: Tensor,
    split: Split,
    protocol: Protocol,
    offset: float = 0.1,
    probability: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """Labels [H W] int64 of an image uint8 [H W 3], by the names of all classes, texts [classes e].

    `offset` is taken from seen classes' probabilities, which training has raised; 0 after self-training. They are
    averaged where windows overlap. The authors' protocol for photographs is Protocol(512, 512, 426).
    """
    cuts = torch.from_numpy(windows(image, protocol)).to(texts.device)
    shown = pixels(cuts, model.clip.mean, model.clip.std)
    shares = probability(resized(model(shown, texts), shown.shape[2:]))  # n k h w
    shares[:, list(split.seen)] -= offset
    return torch.cat([rows.argmax(dim=0) for rows in Stitched(shares, protocol, image.shape[:2])])
