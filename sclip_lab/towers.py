"""Vision towers of two makes under one interface: open_clip's own ViTs, and timm's that open_clip wraps (EVA, SigLIP).

A `Tower` shares the parameters of the model it is a view of, and copies or changes nothing. What differs between the
makes ends here: the names of a block's parts, rotary embeddings, what precedes the patches, and how they are pooled.

Letters: b images, n tokens (r in front, then p patches row by row), d width, h heads, c width of a head, e CLIP's
embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Tower:
    """What the trunk reads of a vision tower.

    conv: pixels -> [b d rows cols], by patches of the sides `patch`; front [r d]: the tokens before the patches, CLS
    first, or none; positions [r+p d]: for the `native` grid; blocks: of a grid, with the names of open_clip's
    ResidualAttentionBlock; project: the tokens that leave the last block [b n d] -> CLIP's space [b n e].
    """

    conv: nn.Conv2d
    patch: tuple[int, int]
    front: Tensor
    positions: Tensor
    native: tuple[int, int]
    ln_pre: nn.Module
    blocks: Callable[[tuple[int, int]], Sequence[Any]]
    project: Callable[[Tensor], Tensor]


def view(visual: nn.Module) -> Tower:
    """The tower that open_clip calls `model.visual`: its VisionTransformer, or its TimmModel around a ViT.

    Raises TypeError, in one line, for any other.
    """
    if hasattr(visual, "class_embedding") and getattr(visual, "attn_pool", None) is None:
        return _open_clip(visual)
    if hasattr(visual, "trunk"):
        return _timm(visual)
    raise TypeError(f"visual is {type(visual).__name__}, expected open_clip's VisionTransformer, pooled by CLS")


def _open_clip(visual: Any) -> Tower:
    return Tower(
        visual.conv1,
        visual.patch_size,
        visual.class_embedding[None],
        visual.positional_embedding,
        tuple(visual.grid_size),
        visual.ln_pre,
        lambda grid: visual.transformer.resblocks,
        lambda x: visual.ln_post(x) @ visual.proj,
    )


def _timm(visual: Any) -> Tower:
    """A ViT of timm, pooled by CLS or by attention, and the head that open_clip puts behind it.

    Where a learned query pools the patches (SigLIP, the Perception Encoder), a patch reaches the text's space as it
    would if the pool saw nothing else: by the value and output projections of the pool, and its MLP. So does MaskCLIP
    with the attention pool of CLIP's ResNets (Zhou, Loy, Dai, ECCV 2022, arXiv:2112.01071), and with regions for
    patches TextRegion with SigLIP 2 (arXiv:2505.23769).
    """
    trunk = visual.trunk
    if misfit := _misfit(trunk):
        raise TypeError(f"visual is timm's {type(trunk).__name__} with {misfit}, expected a plain ViT, such as EVA's")
    front = [token[0] for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    positions = trunk.pos_embed[0]

    def blocks(grid: tuple[int, int]) -> list[_Block]:
        rope = _rope(trunk, grid)
        return [_Block(block, rope) for block in trunk.blocks]

    def project(x: Tensor) -> Tensor:
        x = trunk.norm(x)
        if trunk.attn_pool is not None:
            x = trunk.attn_pool(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        return visual.head(trunk.head(trunk.fc_norm(x)))

    return Tower(
        trunk.patch_embed.proj,
        trunk.patch_embed.patch_size,
        torch.cat([positions[:0], *front]),
        F.pad(positions, (0, 0, trunk.num_prefix_tokens, 0)) if trunk.no_embed_class else positions,
        trunk.patch_embed.grid_size,
        trunk.norm_pre,
        blocks,
        project,
    )


def _misfit(trunk: Any) -> str:
    """What the lab cannot read in a model of timm, or nothing."""
    from timm.layers import Attention, AttentionRope, PatchEmbed
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(trunk) not in (VisionTransformer, Eva):
        return "layers of its own"
    if type(trunk.patch_embed) is not PatchEmbed or not isinstance(trunk.patch_embed.norm, nn.Identity):
        return f"patches by {type(trunk.patch_embed).__name__}"
    if trunk.pos_embed is None or getattr(trunk, "rope_mixed", False):
        return "other positions than absolute and axial ones"
    if trunk.global_pool not in ("token", "map"):
        return f"patches pooled by {trunk.global_pool!r}"
    for block in trunk.blocks:
        if type(block) not in (Block, EvaBlock):
            return f"blocks of {type(block).__name__}"
        attention = block.attn
        if type(attention) not in (Attention, AttentionRope, EvaAttention):
            return f"attention by {type(attention).__name__}"
        if attention.gate is not None or getattr(attention, "num_kv_groups", 1) > 1:
            return "gated or grouped attention"
    return ""


def _rope(trunk: Any, grid: tuple[int, int]) -> Tensor | None:
    """The rotary embedding of the patches of a grid, [p 2c], or None for a tower without."""
    if getattr(trunk, "rope", None) is None:
        return None
    rope = copy.deepcopy(trunk.rope)  # it keeps the embedding of one grid, the tower's own
    rope.update_feat_shape(list(grid))
    return rope.get_embed(list(grid))


class _Block:
    """A block of timm's under the names of open_clip's."""

    def __init__(self, own: Any, rope: Tensor | None) -> None:
        self.forward = own if rope is None else partial(own, rope=rope)
        self.attn = _Attention(own.attn, rope)
        self.ln_1, self.ln_2, self.mlp = own.norm1, own.norm2, own.mlp
        self.ls_1 = own.ls1 if hasattr(own, "ls1") else partial(_scaled, own.gamma_1)
        self.ls_2 = own.ls2 if hasattr(own, "ls2") else partial(_scaled, own.gamma_2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


class _Attention:
    """An attention of timm's under the names of open_clip's."""

    def __init__(self, own: Any, rope: Tensor | None) -> None:
        self.own, self.num_heads = own, own.num_heads
        self.ln_q, self.ln_k = own.q_norm, own.k_norm
        if rope is not None:
            self.ln_q, self.ln_k = (partial(_turned, own, norm, rope) for norm in (own.q_norm, own.k_norm))
        self.ln_inner, self.out_proj = own.norm, own.proj

    @property
    def in_proj_weight(self) -> Tensor:
        own = self.own
        return own.qkv.weight if own.qkv else torch.cat([getattr(own, f"{p}_proj").weight for p in "qkv"])

    @property
    def in_proj_bias(self) -> Tensor | None:
        own = self.own
        if own.qkv and getattr(own, "q_bias", None) is None:
            return own.qkv.bias
        biases = [getattr(own, f"{p}_bias") if own.qkv else getattr(own, f"{p}_proj").bias for p in "qkv"]
        none = own.proj.weight.new_zeros(own.proj.in_features)  # EVA's keys have no bias
        return torch.cat([none if bias is None else bias for bias in biases])


def _turned(own: Any, norm: nn.Module, rope: Tensor, y: Tensor) -> Tensor:
    """Queries or keys [b h n c], normalised, those of the patches rotated by their places."""
    from timm.layers import apply_rot_embed_cat

    front, patches = norm(y).tensor_split([own.num_prefix_tokens], dim=2)
    return torch.cat([front, apply_rot_embed_cat(patches, rope, half=own.rotate_half)], dim=2)


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x
