"""CLIP's vision tower, run once and read in many ways.

`encode` keeps the residual stream that enters every block of open_clip's own tower, which is never hooked, copied or
mutated. A `Site` is what the attention of one block sees of it. `dense` re-reads the tower with another attention.
Variants over one trunk share its sites, and so the projections q, k, v.

Letters: b images, n tokens (CLS first, where the tower has one, then patches row by row), d width, h heads, c width of
a head, e CLIP's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclip_lab.readout import Readout
from sclip_lab.registry import Attention, canonical
from sclip_lab.registry import attention as resolve
from sclip_lab.towers import Tower, view


@dataclass(frozen=True, eq=False)
class Site:
    """One attention in the tower: the stream that enters its block, and what follows from it, computed once, on demand.

    stream [b n d]; grid: rows and columns of patches; below: the sites of the layers underneath; pixels [b 3 H W]: what
    the tower was shown, normalised, for attentions that ask another model.
    """

    blocks: Sequence[Any]
    stream: Tensor
    grid: tuple[int, int]
    below: tuple[Site, ...] = ()
    pixels: Tensor | None = None

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""
        return len(self.below)

    @property
    def block(self) -> Any:
        """open_clip's block, ResidualAttentionBlock or CustomResidualAttentionBlock, or timm's under the same names."""
        return self.blocks[self.layer]

    @property
    def prefix(self) -> int:
        """Tokens before the patches: 1, CLS, in most towers, 0 in those that have none."""
        return self.stream.shape[1] - math.prod(self.grid)

    def at(self, layer: int) -> Site:
        """The same place in another layer, this one or below, counted from 0, or from the end by negative numbers.

        Where replaced layers lie underneath, it is the stream that they produced. Raises IndexError for a layer above
        this one.
        """
        depth = len(self.blocks)
        if not -depth <= layer < depth or layer % depth > self.layer:
            raise IndexError(f"layer {layer} cannot be read at layer {self.layer} of {depth}: expected it or one below")
        return (*self.below, self)[layer % depth]

    @cached_property
    def x(self) -> Tensor:
        """What the projections read, ln_1(stream): [b n d]."""
        return self.block.ln_1(self.stream)

    def heads(self, y: Tensor) -> Tensor:
        """Cut into heads as the projections are: [b n d] -> [b h n c]."""
        return y.unflatten(-1, (self.block.attn.num_heads, -1)).transpose(1, 2)

    @cached_property
    def _qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.block.attn
        qkv = F.linear(self.x, attention.in_proj_weight, attention.in_proj_bias)  # [b n 3d]
        q, k, v = map(self.heads, qkv.chunk(3, dim=-1))  # [b h n c] each
        if getattr(attention, "logit_scale", None) is not None:
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v
        return _maybe(attention, "ln_q")(q), _maybe(attention, "ln_k")(k), v

    @property
    def q(self) -> Tensor:
        """Queries [b h n c], normalised and rotated where the tower does so (qk norm, scaled cosine, rope)."""
        return self._qkv[0]

    @property
    def k(self) -> Tensor:
        """Keys [b h n c], normalised and rotated as the queries."""
        return self._qkv[1]

    @property
    def v(self) -> Tensor:
        """Values [b h n c]."""
        return self._qkv[2]

    @cached_property
    def affinities(self) -> dict[str, Tensor]:
        """What `attention.affinity` has computed here: [b h n n] by two of q, k, v, as "qk", CLIP's own attention."""
        return {}

    @property
    def scale(self) -> float | Tensor:
        """Factor on q kᵀ before the softmax: c ** -0.5, or the learned scale [h 1 1] of a scaled-cosine tower."""
        attention = self.block.attn
        if getattr(attention, "logit_scale", None) is not None:
            return attention.logit_scale.clamp(max=attention.logit_scale_max).exp()
        return self.q.shape[-1] ** -0.5


@dataclass(frozen=True, eq=False)
class Trunk:
    """A tower that has been run on a batch of images up to the entrance of its last block."""

    visual: nn.Module
    sites: tuple[Site, ...]

    def site(self, layer: int = -1) -> Site:
        """The attention of a layer, counted from 0, or from the end by negative numbers."""
        return self.sites[-1].at(layer)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.sites[-1].grid

    @property
    def stream(self) -> tuple[Tensor, ...]:
        """The residual stream [b n d] that enters each block, one per layer."""
        return tuple(site.stream for site in self.sites)


def encode(visual: nn.Module, pixels: Tensor) -> Trunk:
    """Run every block but the last, once, on normalised pixels [b 3 H W], in the tower's dtype and on its device.

    visual: open_clip's vision tower, its own or timm's. Sides that are no multiple of the patch lose the remainder, as
    in CLIP's patch convolution. Gradients flow where the caller has them on. Raises TypeError or ValueError, in one
    line, for another tower or for unfit pixels.
    """
    tower = view(visual)
    x, grid = _embed(tower, pixels)
    site = Site(tower.blocks(grid), x, grid, pixels=pixels)
    return Trunk(visual, _climb(site, {}))


def dense(
    trunk: Trunk,
    attention: str | Attention = "csa",
    readout: str | Readout = "full",
    layers: int | Sequence[int] = (-1,),
) -> Tensor:
    """CLIP-space tokens [b n e] under another attention: ln_post and projection on all, CLS first, not normalised.

    What the projection is for a patch where CLS is not what pools them: see `towers`.

    attention: a spec ("csa") or a callable(site) -> weights broadcastable to [b h n n]. readout: what the LAST block
    keeps around it, a `Readout` or its key; blocks below stay whole. layers: where the attention takes its place,
    counted from 0, or from the end by negative numbers; the stream above a replaced layer is computed anew, and a last
    layer that is not among them keeps CLIP's own attention. Under the read-out "beside" nothing is computed anew: what
    enters the first of the layers and the attention branches of each add up.
    """
    return next(readings(trunk, attention, [readout], layers))


def readings(
    trunk: Trunk,
    attention: str | Attention,
    readouts: Iterable[str | Readout],
    layers: int | Sequence[int] = (-1,),
) -> Iterator[Tensor]:
    """`dense` for several read-outs, which share what the attention gathers: [b n e] of each, in their order."""
    attend = resolve(attention)
    replaced = {trunk.site(layer).layer: attend for layer in ([layers] if isinstance(layers, int) else layers)}
    last = len(trunk.sites) - 1
    first = trunk.sites[min(replaced, default=last)]
    site, out, project = None, None, view(trunk.visual).project
    for readout in map(Readout.parse, readouts):
        if readout.beside:
            x = first.stream + readout.gain * sum(branch(trunk.sites[layer], attend) for layer in replaced)
        else:
            site = site or _climb(first, replaced)[-1]
            out = branch(site, replaced.get(last, _OWN)) if out is None else out
            x = _block(site, out, readout)
        yield project(x)  # [b n e]


_OWN = resolve("vanilla")


def _climb(site: Site, replaced: dict[int, Attention]) -> tuple[Site, ...]:
    """The sites up to the last layer: those below `site`, itself, and those that its stream leads to."""
    while site.layer < len(site.blocks) - 1:
        attend = replaced.get(site.layer)
        x = _block(site, branch(site, attend), Readout()) if attend else site.block(site.stream)
        site = Site(site.blocks, x, site.grid, (*site.below, site), site.pixels)
    return (*site.below, site)


def _block(site: Site, out: Tensor, readout: Readout) -> Tensor:
    """What a block adds up to, [b n d], with `out` in the place of its attention's branch."""
    x = site.stream + readout.gain * out if readout.residual else readout.gain * out
    return x + site.block.ls_2(site.block.mlp(site.block.ln_2(x))) if readout.mlp else x


def branch(site: Site, attention: str | Attention = "vanilla") -> Tensor:
    """The attention branch of a block under an attention, [b n d], before its residual."""
    block, own = site.block, site.block.attn
    out = _weights(site, resolve(attention)) @ site.v  # [b h n c]
    if getattr(own, "head_scale", None) is not None:
        out = out * own.head_scale
    out = out.transpose(1, 2).flatten(2)  # [b n d]
    out = own.out_proj(_maybe(own, "ln_inner")(out))
    return block.ls_1(_maybe(block, "ln_attn")(out))


def _weights(site: Site, attend: Attention) -> Tensor:
    """The weights of an attention, [... n n], checked against the site."""
    weights = attend(site)
    if not isinstance(weights, Tensor):
        raise TypeError(f"attention {canonical(attend)} returned {type(weights).__name__}, expected a tensor [b h n n]")
    b, h, n, _ = site.v.shape
    try:
        fits = torch.broadcast_shapes(weights.shape, (b, h, n, n)) == (b, h, n, n)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"attention {canonical(attend)} returned weights {list(weights.shape)}, "
            f"expected a shape that broadcasts to [b h n n] = {[b, h, n, n]}"
        )
    return weights.to(site.v.dtype).expand(*weights.shape[:-2], n, n)


def _embed(tower: Tower, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The stream that enters the first block [b n d], and the grid."""
    _check(tower, pixels)
    x = tower.conv(pixels.to(tower.conv.weight))  # [b d rows cols]
    grid = (x.shape[2], x.shape[3])
    x = torch.cat([tower.front.to(x.dtype).expand(len(x), -1, -1), x.flatten(2).mT], dim=1)  # [b n d]
    return tower.ln_pre(x + _positions(tower, grid).to(x.dtype)), grid


def _positions(tower: Tower, grid: tuple[int, int]) -> Tensor:
    """The tower's positional embedding for a grid of patches, [n d].

    SCLIP's authors (as DINO before them) interpolate bicubically, without antialiasing, by the SCALE FACTOR (n + 0.1) /
    native side per axis; the 0.1 enters the sampling coordinates, so asking for the size instead gives other values.
    They compare token counts and so take a 7x28 grid for the native 14x14; here rows and columns are compared.
    """
    if grid == tower.native:
        return tower.positions
    front, patches = tower.positions.tensor_split([len(tower.front)])
    patches = patches.float().mT.unflatten(-1, tower.native)[None]  # [1 d rows cols]
    factors = [(side + 0.1) / own for side, own in zip(grid, tower.native, strict=True)]
    patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([front, patches[0].flatten(1).mT.to(front.dtype)])


def _check(tower: Tower, pixels: Tensor) -> None:
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1] != 3:
        what = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"pixels are {what}, expected floats [b 3 H W], normalised by the model's mean and std")
    rows, cols = tower.patch
    if pixels.shape[2] < rows or pixels.shape[3] < cols:
        raise ValueError(f"pixels are {list(pixels.shape)}, expected sides of at least one patch ({rows}x{cols})")
    if bad := int((~pixels.isfinite()).sum()):
        raise ValueError(f"pixels hold {bad} NaN or infinite values, expected none: check the image, mean and std")


def _maybe(module: nn.Module, name: str) -> nn.Module:
    """A layer that only one of open_clip's attention classes has, or nothing in its place."""
    return getattr(module, name, nn.Identity())
