"""The methods after SCLIP, in its terms: attentions, a read-out beside the tower, and a step on the trunk.

Most of what followed SCLIP is an attention (here, or `qq`, `kk`, `vv` in `attention`) under another read-out; `RECIPES`
says which belong together. The details are those of the authors' released code, and agreement with what it answers is
tested; what differs from it, or is left out, is said.

Letters: b images, h heads, n tokens (CLS first, where there is one), p patches, c width of a head, d width; i j grid of
patches.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclip_lab.attention import affinity
from sclip_lab.images import MEAN, STD
from sclip_lab.registry import Attention, attention, variant
from sclip_lab.trunk import Trunk

if TYPE_CHECKING:
    from sclip_lab.clip import Clip
    from sclip_lab.trunk import Site

LAST, LAST_SIX = (-1,), (-6, -5, -4, -3, -2, -1)

# Attention, read-out and layers of each method, as its authors have it for the 12 layers of ViT-B/16
RECIPES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "CLIP": ("vanilla", "full", LAST),
    "MaskCLIP": ("identity", "full", LAST),
    "SCLIP": ("csa", "full", LAST),
    "CLIP Surgery": ("vv", "beside", LAST_SIX),
    "GEM": ("gem", "beside", LAST_SIX),
    "ClearCLIP": ("qq", "bare", LAST),
    "NACLIP": ("naclip", "bare", LAST),
    "ResCLIP": ("cross", "bare", LAST),
    "ProxyCLIP": ("proxy(dino='vit_base_patch8_224.dino')", "bare", LAST),
}


@variant
def naclip(std: float = 5.0) -> Attention:
    """softmax(s k kᵀ + ω), ω = exp(-(Δi² + Δj²) / (2 std²)) between patches, 0 for CLS

    NACLIP's Neighbour-Aware attention (Hajimiri, Ben Ayed, Dolz, WACV 2025, arXiv:2404.08181). std is in patches; ω is
    added after the scale, its peak is 1 whatever std. The authors drop residual and MLP: readout "bare".
    """
    _positive("naclip", std)
    return lambda site: (site.scale * site.k @ site.k.mT + _omega(site, std)).softmax(-1).to(site.k.dtype)


@variant
def nonly(std: float = 5.0) -> Attention:
    """softmax(ω m), m = mean of s |q| |k| over heads and pairs of tokens, ω as in `naclip`

    NACLIP's ablation "neighbourhood only" (arXiv:2404.08181): the content of a patch does not matter but for the number
    m, by which the window is as strong as logits are. Readout "bare", as there.
    """
    _positive("nonly", std)

    def attend(site: Site) -> Tensor:
        q, k = (p.float().norm(dim=-1).mean(-1) for p in (site.q, site.k))  # b h
        strength = (site.scale * q[..., None, None] * k[..., None, None]).mean(1, keepdim=True)  # b 1 1 1
        return (strength * _omega(site, std)).softmax(-1).to(site.k.dtype)

    return attend


@variant
def gem(iterations: int = 1, tau: float | None = None) -> Attention:
    """⅓ Σ softmax(τ p̂ p̂ᵀ) over p = q, k, v; p̂ = p / |p|, after `iterations` of p̂ ← softmax(τ p̂ p̂ᵀ) p̂

    Self-self attention of GEM (Bousselham et al., CVPR 2024, arXiv:2312.00878). τ None: s times the mean length of the
    image's tokens ln_1(x), so that sharpness adapts. The authors let it run in a second path beside the last 6 blocks:
    readout "beside" with those layers.
    """
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"gem iterations={iterations!r}: expected a whole number, such as 1")

    def attend(site: Site) -> Tensor:
        factor = site.q.shape[-1] ** -0.5 * site.x.norm(dim=-1).mean(-1)[:, None, None, None] if tau is None else tau
        return sum((_self_self(p, factor, iterations) for p in (site.q, site.k, site.v)), start=torch.zeros(())) / 3

    return attend


def _self_self(p: Tensor, factor: Tensor | float, iterations: int) -> Tensor:
    p = F.normalize(p, dim=-1)
    for _ in range(iterations):
        p = F.normalize((factor * p @ p.mT).softmax(-1) @ p, dim=-1)
    return (factor * p @ p.mT).softmax(-1)


@variant
def cross(
    of: str | Attention = "naclip", weight: float = 0.3, tau: float = 2.0, layers: tuple[int, ...] | None = None
) -> Attention:
    """τ ((1 - w) A + w mean_l softmax(s qₗ kₗᵀ))

    Residual Cross-correlation Self-attention of ResCLIP (Yang et al., CVPR 2025, arXiv:2411.15851), over A `of` another
    method; its second half, the semantic feedback by a first segmentation, is left out. l: layers 5 to 8 of 12, counted
    from 0; None takes those at the same share of the depth (our reading, for other towers). The authors choose w per
    data set, from 0.2 to 0.6 (0.3: VOC21, Context60, ADE20K), and read NACLIP and ClearCLIP out "bare".
    """
    attend = attention(of)

    def attending(site: Site) -> Tensor:
        depth = len(site.blocks)
        middle = range(depth * 5 // 12, depth * 9 // 12) if layers is None else layers
        crossed = torch.stack([affinity(below, below.q, below.k) for below in map(site.at, middle)]).mean(0)
        return tau * ((1 - weight) * attend(site) + weight * crossed)

    return attending


@variant
def proxy(dino: str | None = None, beta: float = 1.2, gamma: float = 3.0) -> Attention:
    """softmax(γ (S - β mean S)) where that is positive, S the cosines of another model's patches; one for all heads

    Proxy attention of ProxyCLIP (Lan et al., ECCV 2024, arXiv:2408.04883). `dino`: a ViT of timm, as in
    "vit_base_patch8_224.dino" (the authors'), downloaded once, or "NAME:path/to/weights". None: no other model, S is of
    the patches' mean colours. CLS is outside: no patch sees it, it sees itself. The authors bring CLIP's values to
    the other model's grid, here its patches come to CLIP's grid; with patches of one size these are the same. They read
    out "bare".
    """
    model = _timm(dino) if dino else None

    def attend(site: Site) -> Tensor:
        features = (
            patches(model.to(site.stream.device), site) if model else F.adaptive_avg_pool2d(_pixels(site), site.grid)
        )
        return proxied(features, beta, gamma)(site)

    return attend


def proxied(features: Tensor, beta: float = 1.2, gamma: float = 3.0) -> Attention:
    """The attention of `proxy` by features [b d i j] of the same images, on any grid."""

    def attend(site: Site) -> Tensor:
        resized = F.interpolate(
            features.to(site.stream.device).float(), site.grid, mode="bilinear", align_corners=False
        )
        unit = F.normalize(resized.flatten(2), dim=1)  # b d p
        cosines = unit.mT @ unit  # b p p
        logits = gamma * (cosines - beta * cosines.mean((1, 2), keepdim=True))
        # A patch keeps sight of itself, which β mean S > 1 would take from it, and all weights would be 0 / 0.
        hidden = (logits < 0) & ~torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
        weights = F.pad(logits.masked_fill(hidden, -torch.inf).softmax(-1), (site.prefix, 0, site.prefix, 0))
        weights[:, : site.prefix, : site.prefix] = torch.eye(site.prefix)
        return weights[:, None].to(site.v.dtype)  # b 1 n n

    return attend


def patches(model: Any, site: Site) -> Tensor:
    """Last-layer patches [b d i j] of a ViT of timm, for the windows that CLIP was shown.

    As in ProxyCLIP's code OpenAI's normalisation is undone and the model's own applied. Windows whose sides are no
    multiple of the model's patch are resized to the nearest that are (the authors pad them).
    """
    pixels, own = _pixels(site), model.pretrained_cfg
    mean, std, shift, scale = (pixels.new_tensor(v)[:, None, None] for v in (MEAN, STD, own["mean"], own["std"]))
    sides = zip(pixels.shape[2:], model.patch_embed.patch_size, strict=True)
    size = [max(round(side / patch), 1) * patch for side, patch in sides]
    shown = F.interpolate((pixels * std + mean - shift) / scale, size, mode="bilinear", align_corners=False)
    shown = shown.to(next(model.parameters()))
    return model.forward_intermediates(shown, indices=1, norm=True, intermediates_only=True)[0]


@lru_cache(maxsize=2)
def _timm(name: str) -> nn.Module:
    import timm  # takes seconds

    kind, _, path = name.partition(":")
    source = {"checkpoint_path": path} if path else {"pretrained": True}
    try:
        model = timm.create_model(kind, num_classes=0, dynamic_img_size=True, **source)
    except Exception as error:  # every reader of weights has exceptions of its own
        reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder="...")
        raise ValueError(
            f"no features of {name!r} ({reason}): expected a ViT of timm, or 'NAME:path/to/weights'"
        ) from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def repair(trunk: Trunk, neighbours: int = 30, contamination: float = 0.05) -> Trunk:
    """x_i ← mean of the 3 x 3 patches around i, for outliers i of the stream that enters the last block

    Anomaly repair of SC-CLIP (Bai et al., arXiv:2411.15869); the rest of that method is left out. Outliers are, in each
    image, the share `contamination` of patches whose Local Outlier Factor (Breunig et al., SIGMOD 2000) over
    `neighbours` is highest. Means are over patches that are none themselves; CLS stays, as do outliers among outliers
    only. The factor is scikit-learn's; the authors wrote their own, by squared distances and with the reach of a patch
    instead of its neighbour's, which finds other outliers in part.
    """
    site = trunk.sites[-1]
    stream = torch.stack([_repaired(x, site.grid, neighbours, contamination) for x in site.stream])
    return Trunk(trunk.visual, (*trunk.sites[:-1], replace(site, stream=stream)))


def repaired(clip: Clip) -> Clip:
    """The same model, with `repair` before every read-out: "tiny" becomes "tiny+repair", wherever results name it.

    Only the last layer sees it: where a layer underneath is replaced too, in the tower, its stream is computed anew.
    """
    return replace(clip, name=f"{clip.name}+repair", step=repair)


def _repaired(x: Tensor, grid: tuple[int, int], neighbours: int, contamination: float) -> Tensor:
    from sklearn.neighbors import LocalOutlierFactor  # takes a second

    factor = LocalOutlierFactor(n_neighbors=min(neighbours, grid[0] * grid[1] - 1), contamination=contamination)
    front, patches = x.tensor_split([-grid[0] * grid[1]])
    sound = torch.from_numpy(factor.fit_predict(patches.float().cpu().numpy()) > 0).to(x.device).unflatten(0, grid)
    maps = patches.mT.unflatten(-1, grid).float()  # d i j
    around = F.conv2d(torch.cat([maps * sound, sound[None].float()])[:, None], maps.new_ones(1, 1, 3, 3), padding=1)
    total, count = around[:-1, 0], around[-1, 0]
    maps = torch.where(sound | (count == 0), maps, total / count.clamp_min(1))
    return torch.cat([front, maps.flatten(1).mT.to(x.dtype)])


def _pixels(site: Site) -> Tensor:
    if site.pixels is None:
        raise ValueError("the site has no pixels to show to another model: expected one made by `encode`")
    return site.pixels


def _omega(site: Site, std: float) -> Tensor:
    """exp(-(Δi² + Δj²) / (2 std²)) between patches, 0 in the row and column of CLS: [n n], float32."""
    place = torch.cartesian_prod(*map(torch.arange, site.grid)).float()  # p 2
    near = torch.exp(-(place[:, None] - place).square().sum(-1) / (2 * std**2))  # p p
    return F.pad(near, (site.prefix, 0, site.prefix, 0)).to(site.k.device)


def _positive(name: str, std: float) -> None:
    if not std > 0:
        raise ValueError(f"{name} std={std!r}: expected a positive number of patches, such as 5")
