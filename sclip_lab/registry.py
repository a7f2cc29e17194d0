"""Names for attention: the registry, and the specs that users write.

A variant is a factory of `site -> weights`, registered under its own function name. A *spec* names one as Python would
call it, with literals only: "csa", "window(size=3)".
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

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
        for key, value in arguments.items():
            if _number(default := signature.parameters[key].default) and not _number(value):
                raise ValueError(f"{name} {key}={value!r}: expected a number, such as {default}")
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


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def base(spec: str) -> str:
    """The variant that a spec starts from: what it is made `of`, if it is made of another, else its own name.

    "window(size=3)" -> "vanilla", "sharpen(2, of='csa')" -> "csa", "random(n=8)" -> "random". What is no spec of a
    registered variant is returned as it is.
    """
    try:
        name, arguments = _parse(spec)
    except ValueError:
        return spec
    parameter = inspect.signature(_FACTORIES[name]).parameters.get("of")
    return base(arguments.get("of", parameter.default)) if parameter else name


def _spell(name: str, arguments: dict) -> str:
    written = {key: canonical(value) if callable(value) else repr(value) for key, value in arguments.items()}
    return f"{name}({', '.join(f'{key}={value}' for key, value in written.items())})" if arguments else name


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
