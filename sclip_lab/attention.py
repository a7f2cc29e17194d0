"""The ablation section: every way the tokens of one block may look at each other.

A variant is a factory. It closes over its parameters and returns `site -> weights`, where `weights` broadcast to [b h n
n] and row i holds what token i gathers from every token j; `sclip_lab.dense` applies them. Adding one takes a decorated
function with defaults and a docstring that opens with the formula and its source. An argument `of` is another
attention, a spec or a callable: variants compose, as in "sharpen(tau=2, of='csa')".

Letters: b images, h heads, n tokens (CLS first, where the tower has one: no variant here needs it), c width of a head,
d width; x [b n d], q k v [b h n c], and s the block's own scale (1 / sqrt(c)).
"""

from __future__ import annotations

import math
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sclip_lab.files import results
from sclip_lab.registry import Attention, attention, variant

if TYPE_CHECKING:
    from sclip_lab.trunk import Site

TINY = torch.finfo(torch.float32).tiny


def affinity(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """softmax(s a bᵀ) over the last axis: [b h n c], [b h n c] -> [b h n n], in the running dtype as the authors do.

    Of a site's own q, k, v it is computed once for all variants, where no gradient is wanted: none may change it.
    Raises RuntimeError where one has.
    """
    own = {id(site.q): "q", id(site.k): "k", id(site.v): "v"}
    if torch.is_grad_enabled() or not own.keys() >= {id(a), id(b)}:
        return (site.scale * a @ b.mT).softmax(-1)
    pair = own[id(a)] + own[id(b)]
    if pair not in site.affinities:
        site.affinities[pair] = (site.scale * a @ b.mT).softmax(-1)
    weights = site.affinities[pair]
    if not weights.is_inference() and weights._version:
        raise RuntimeError(f"an attention changed softmax({pair}) in place, which others share: let it change a copy")
    return weights


@variant
def vanilla() -> Attention:
    """softmax(s q kᵀ)

    CLIP's own attention (Radford et al., ICML 2021, arXiv:2103.00020; Vaswani et al., arXiv:1706.03762).
    """
    return lambda site: affinity(site, site.q, site.k)


@variant
def identity() -> Attention:
    """I

    MaskCLIP: a token gathers its own value only (Zhou, Loy, Dai, ECCV 2022, arXiv:2112.01071). As the authors' code
    does it, CLS included, with residual and MLP of the block kept.
    """
    return lambda site: torch.eye(site.v.shape[-2], dtype=site.v.dtype, device=site.v.device)  # [n n]


@variant
def csa() -> Attention:
    """softmax(s q qᵀ) + softmax(s k kᵀ)

    SCLIP's Correlative Self-Attention (Wang, Mei, Yuille, ECCV 2024, arXiv:2312.01597). The authors' code SUMS the two
    softmaxes: rows add to 2, which doubles the attention branch beside the residual. CLS is among queries and keys;
    residual and MLP are kept.
    """
    return lambda site: affinity(site, site.q, site.q) + affinity(site, site.k, site.k)


@variant
def qq() -> Attention:
    """softmax(s q qᵀ)

    One half of SCLIP's CSA (its ablation of the projection, arXiv:2312.01597), and the attention of ClearCLIP (Lan et
    al., ECCV 2024, arXiv:2407.12442), whose authors drop residual and MLP: readout "bare".
    """
    return lambda site: affinity(site, site.q, site.q)


@variant
def kk() -> Attention:
    """softmax(s k kᵀ)

    The other half of SCLIP's CSA (arXiv:2312.01597), and NACLIP's attention before its neighbourhood window is added
    (Hajimiri, Ben Ayed, Dolz, WACV 2025, arXiv:2404.08181), whose authors drop residual and MLP: readout "bare".
    """
    return lambda site: affinity(site, site.k, site.k)


@variant
def vv() -> Attention:
    """softmax(s v vᵀ)

    CLIP Surgery (Li et al., arXiv:2304.05653). The authors run it in a second path beside the last 6 blocks, without
    MLP; here it takes the place of the layers that `dense` is told, the last by default.
    """
    return lambda site: affinity(site, site.v, site.v)


# The projection (SCLIP's Table 2): correlation of x with itself under other projections than q and k


@variant
def projection(by: str = "identity") -> Attention:
    """softmax(s p pᵀ) with p = x, or p = q, k, v

    A single projection in the place of CSA's two (SCLIP's Table 2, arXiv:2312.01597). `by` "identity": the input of the
    projections itself, ln_1 of the stream, cut into heads as q and k are. "q", "k", "v" are `qq`, `kk`, `vv`.
    """
    if by not in ("identity", "q", "k", "v"):
        raise ValueError(f"projection by {by!r}: expected 'identity', 'q', 'k' or 'v'")

    def attend(site: Site) -> Tensor:
        p = site.heads(site.x) if by == "identity" else getattr(site, by)
        return affinity(site, p, p)

    return attend


@variant
def random(n: int = 1, seed: int = 0) -> Attention:
    """1/n Σᵢ softmax(s pᵢ pᵢᵀ), pᵢ = x Wᵢ, with Wᵢ drawn from N(0, 1/d)

    SCLIP's ensemble of n random projections (Table 2, arXiv:2312.01597). The paper does not say how they are drawn nor
    what is averaged: here each keeps the length of x on average, and the softmaxes are averaged. With one seed, a
    larger ensemble holds the smaller one.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"random n={n!r}: expected a number of matrices, at least 1")

    def attend(site: Site) -> Tensor:
        projected = (site.heads(site.x @ matrix) for matrix in _matrices(n, site.x.shape[-1], seed).to(site.x))
        return sum((affinity(site, p, p) for p in projected), start=torch.zeros(())) / n

    return attend


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _matrices(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(d, d, generator=generator) for _ in range(n)]) / math.sqrt(d)


@variant
def learned(path: str | PathLike[str] | None = None) -> Attention:
    """softmax(s p pᵀ), p = x Wᵀ + b with W and b learned from labels

    SCLIP's learned projection (Table 2, arXiv:2312.01597: 64 samples of the training split), as `sclip_lab.fit` makes
    it. `path`: a safetensors file with weight [d d] and bias [d], as seen from the folder of results. None: not
    learned yet, W_q, from which the training starts.
    """
    tensors = _projection(path) if path else None

    def attend(site: Site) -> Tensor:
        if tensors is None:
            return affinity(site, site.q, site.q)
        d = site.x.shape[-1]
        if tensors["weight"].shape != (d, d):
            expected = f"expected {[d, d]}: it was learned for another tower"
            raise ValueError(f"learned projection {path} is {list(tensors['weight'].shape)}, {expected}")
        p = site.heads(F.linear(site.x, tensors["weight"].to(site.x), tensors["bias"].to(site.x)))
        return affinity(site, p, p)

    return attend


def _projection(path: str | PathLike[str]) -> dict[str, Tensor]:
    file = results() / path
    if not file.is_file():
        made = f"sclip_lab.fit.fit(clip, load_dataset(name, split='train')).save({str(path)!r})"
        raise FileNotFoundError(f"no learned projection at {file}: make it with {made}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}): expected a file that sclip_lab.fit made") from None
    if missing := {"weight", "bias"} - set(tensors):
        raise ValueError(f"{path} holds no {' and no '.join(sorted(missing))}: expected a file that sclip_lab.fit made")
    return tensors


# Localisation (SCLIP's Table 3): is it enough that patches look near, or hard?


@variant
def sharpen(tau: float = 2.0, of: str | Attention = "vanilla") -> Attention:
    """softmax(τ s q kᵀ), for any other attention A its power A^τ with rows brought back to their sums

    Attention sharpening (SCLIP's Table 3, arXiv:2312.01597). The paper does not say whether τ multiplies the logits or
    divides them; here it MULTIPLIES, so that more is sharper, 1 changes nothing, and 1/τ is the other reading.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"sharpen tau={tau!r}: expected a positive number; above 1 sharpens, below 1 smooths")
    attend = attention(of)

    def sharper(site: Site) -> Tensor:
        weights = attend(site)
        peak = weights.amax(-1, keepdim=True).float().clamp_min(TINY)  # that high powers do not underflow
        return _scaled((weights.float() / peak) ** tau, weights)

    return sharper


@variant
def window(size: int = 3, of: str | Attention = "vanilla") -> Attention:
    """softmax(s q kᵀ) over the size × size patches around the query, for any other attention its restriction to them

    Local window attention (SCLIP's Table 3, arXiv:2312.01597, does not say more). Windows are cut at the border, rows
    keep their sums; CLS sees itself alone and no patch sees it, so that size 1 is MaskCLIP's `identity`.
    """
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"window size={size!r}: expected an odd number of patches, such as 3")
    attend = attention(of)

    def near(site: Site) -> Tensor:
        weights = attend(site)
        place = torch.cartesian_prod(*map(torch.arange, site.grid))  # p 2
        apart = (place[:, None] - place[None]).abs().amax(-1)  # p p
        seen = torch.block_diag(torch.eye(site.prefix), apart <= size // 2).to(weights.device)  # n n
        return _scaled(weights.float() * seen, weights)

    return near


@variant
def borrow(layer: int = 2, of: str | Attention = "vanilla") -> Attention:
    """softmax(s qₗ kₗᵀ) of an earlier layer l

    Early-layer attention (SCLIP's Table 3, arXiv:2312.01597). The paper's "layer #3" may count from 0 or from 1; here
    `layer` counts from 0, and from the end by negative numbers, so that the default is the third block and -1 the last.
    """
    attend = attention(of)
    return lambda site: attend(site.at(layer))


@variant
def blend(a: str | Attention = "qq", b: str | Attention = "kk", weight: float = 0.5) -> Attention:
    """(1 - w) A + w B

    Any two attentions mixed. The default is CSA with the mean of its halves instead of their sum, a choice
    that, as its author has it, only changes a temperature (arXiv:2312.01597, issue 6 of its repository).
    """
    first, second = attention(a), attention(b)
    return lambda site: (1 - weight) * first(site) + weight * second(site)


@variant
def heads(keep: int | tuple[int, ...] | None = None, of: str | Attention = "csa") -> Attention:
    """A in the heads that are kept, 0 in the others

    What single heads contribute (as in Michel, Levy, Neubig, NeurIPS 2019, arXiv:1905.10650, by pruning). None keeps
    all. Before the output projection the heads one by one add up to the whole; a gain makes up for those left out.
    """
    attend = attention(of)

    def kept(site: Site) -> Tensor:
        count = site.v.shape[1]
        chosen = range(count) if keep is None else [keep] if isinstance(keep, int) else keep
        if wrong := [head for head in chosen if not 0 <= head < count]:
            raise ValueError(f"heads keep={keep!r}: no head {wrong[0]}, expected 0 to {count - 1}")
        weights = attend(site)
        return weights * torch.isin(torch.arange(count), torch.tensor(chosen)).to(weights)[:, None, None]

    return kept


def _scaled(weights: Tensor, like: Tensor) -> Tensor:
    """Rows of `weights`, float32, brought to the sums of the rows of `like`, in its dtype; empty rows stay empty."""
    return (F.normalize(weights, p=1, dim=-1, eps=TINY) * like.sum(-1, keepdim=True).float()).to(like.dtype)
