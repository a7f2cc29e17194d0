"""The ablation section: every way the tokens of one block may look at each other.

A variant is a factory. It closes over its parameters and returns `site -> weights`, where `weights` broadcast to [b h n
n] and row i holds what token i gathers from every token j; `sclip_lab.dense` applies them. Adding one takes a decorated
function with defaults and a docstring that opens with the formula and its source. A *spec* names a variant as Python
would call it, with literals only: "csa", "window(size=3)".

Letters: b images, h heads, n tokens (CLS first), c width of a head; q k v [b h n c], and s the block's own scale (1 /
sqrt(c)).
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sclip_lab.trunk import Site

Attention = Callable[["Site"], Tensor]

_FACTORIES: dict[str, Callable[..., Attention]] = {}


def variant(factory: Callable[..., Attention]) -> Callable[..., Attention]:
    """Register a factory of attention under its own name; what it returns is named by its canonical spec.

    Every parameter needs a default, so that the bare name is a spec. A name that is taken is an error, except that a
    notebook may run its own cell again.
    """
    name = factory.__name__
    if name in _FACTORIES and not factory.__module__ == _FACTORIES[name].__module__ == "__main__":
        raise ValueError(f"variant {name!r} exists already in {_FACTORIES[name].__module__}: choose another name")
    signature = inspect.signature(factory)
    for parameter in signature.parameters.values():
        if parameter.default is parameter.empty:
            raise TypeError(f"parameter {parameter.name!r} of variant {name!r} has no default: give it one")

    @wraps(factory)
    def named(*args: Any, **kwargs: Any) -> Attention:
        arguments = signature.bind(*args, **kwargs).arguments
        attend = factory(*args, **kwargs)
        attend.__name__ = _spell(name, arguments)
        return attend

    _FACTORIES[name] = named
    return named


def variants() -> tuple[str, ...]:
    """Names of the registered variants, in the order of their definition."""
    return tuple(_FACTORIES)


def attention(spec: str | Attention) -> Attention:
    """The attention that a spec names: `site -> weights`, broadcastable to [b h n n].

    A callable passes through, a registered factory is called with its defaults.
    Raises ValueError, in one line, for an unknown name, for code in a spec, and for arguments that the variant does not
    take.
    """
    name = getattr(spec, "__name__", "")
    if name in _FACTORIES and spec is _FACTORIES[name]:
        spec = name
    if isinstance(spec, str):
        name, arguments = _parse(spec)
        return _FACTORIES[name](**arguments)
    if not callable(spec):
        raise TypeError(f"attention {spec!r} is neither a spec such as 'csa' nor a callable(site) -> weights")
    return spec


def canonical(spec: str | Attention) -> str:
    """The one spelling of a spec, key of results and label of plots: "csa()" -> "csa", "window(3)" -> "window(size=3)".

    A callable is spelt by its `__name__`, or by its repr where it has none.
    """
    if isinstance(spec, str):
        return _spell(*_parse(spec))
    return getattr(spec, "__name__", None) or " ".join(repr(spec).split())


def _spell(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" if arguments else name


def _parse(spec: str) -> tuple[str, dict]:
    """Name and arguments, by keyword, of a spec."""
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not isinstance(call.func, ast.Name):
            raise ValueError
        name = call.func.id
        positional = [ast.literal_eval(value) for value in call.args]
        keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(keywords) < len(call.keywords):
            raise ValueError("a repeated argument")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"attention spec {spec!r} is not a name or a call with literals, such as 'csa' or 'window(size=3)'"
        ) from None
    if name not in _FACTORIES:
        close = difflib.get_close_matches(name, _FACTORIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown attention {name!r} in spec {spec!r}: {hint}registered are {', '.join(_FACTORIES)}")
    signature = inspect.signature(_FACTORIES[name])
    try:
        return name, signature.bind(*positional, **keywords).arguments
    except TypeError as error:
        takes = ", ".join(f"{p.name}={p.default!r}" for p in signature.parameters.values())
        raise ValueError(f"attention spec {spec!r}: {error}; expected {name}({takes})") from None


def affinity(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """softmax(s a bᵀ) over the last axis: [b h n c], [b h n c] -> [b h n n], in the running dtype as the authors do."""
    return (site.scale * a @ b.mT).softmax(-1)


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
