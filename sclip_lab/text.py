"""Class names -> text queries: prompt templates, synonyms, averaged embeddings.

Letters: q queries (one per word or synonym), e embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sclip_lab.clip import Clip

TEMPLATES: tuple[str, ...]  # the 80 prompts of CLIP's ImageNet evaluation, "{}" where the word goes; see __getattr__


@dataclass(frozen=True, eq=False)
class Queries:
    """What a label map can say: unit `vectors` [q e], the class of each `query_class` [q] and the classes' `names`."""

    vectors: Tensor
    query_class: Tensor
    names: list[str]


def queries(
    clip: "Clip", classes: Sequence[str] | str | PathLike[str], templates: Sequence[str] | None = None
) -> Queries:
    """Embed the words of `classes` with a CLIP's text tower.

    Per word the unit embeddings of all `templates` (strings with a "{}"; None: the 80 of `TEMPLATES`) are averaged and
    scaled to unit length again, as Radford et al. 2021 (arXiv 2103.00020, section 3.1.4) and the SCLIP authors do.
    `classes` is read by `parse`. Raises ValueError where a name or a template is not usable, or where the model, as the
    bundled one may, has no embedding for a word.
    """
    words_of = parse(classes)
    prompts = _openai_templates() if templates is None else _checked(templates)
    unique = dict.fromkeys(word for words in words_of.values() for word in words)
    if strange := [word for word in unique if not clip.knows(word)]:
        raise ValueError(
            f"model {clip.name!r} never saw the words of {strange}: expected names from its own world, or another "
            f"model, such as 'ViT-B-16-quickgelu:openai'"
        )
    vector_of = {word: _embed(clip, word, prompts) for word in unique}
    vectors = torch.stack([vector_of[word] for words in words_of.values() for word in words])
    query_class = [index for index, words in enumerate(words_of.values()) for _ in words]
    return Queries(vectors, torch.tensor(query_class, device=vectors.device), list(words_of))


def parse(classes: Sequence[str] | str | PathLike[str]) -> dict[str, list[str]]:
    """Class lines -> {name: words}, in label order.

    A class is one line: `cat`, or `person|person in shirt` with synonyms, named after the first, or
    `background: sky|wall|grass` with a name of its own. `classes` is a list of lines, or a text file of them: a Path,
    or a str that ends in .txt. The same word may serve two classes.
    """
    words_of: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(classes)):
        if not isinstance(line, str):
            raise ValueError(f"class {number} is {line!r}: expected a str, such as 'cat' or 'person|man|woman'")
        name, colon, synonyms = line.partition(":")
        words = [word.strip() for word in (synonyms if colon else line).split("|")]
        name = name.strip() if colon else words[0]
        if not name or not all(words):
            raise ValueError(f"class {number} is {line!r}: expected a name and no empty word, as 'cat' or 'person|man'")
        if len(set(words)) < len(words):
            raise ValueError(f"class {number} is {line!r}: expected every word once")
        if name in words_of:
            raise ValueError(f"class {number} is named {name!r} like an earlier one: expected different names")
        words_of[name] = words
    if not words_of:
        raise ValueError(f"no class names in {classes!r}: expected at least one, such as ['cat', 'grass']")
    return words_of


def _lines(classes: Sequence[str] | str | PathLike[str]) -> Sequence[str]:
    if isinstance(classes, PathLike) or (isinstance(classes, str) and classes.endswith(".txt")):
        try:
            return Path(classes).read_text(encoding="utf-8").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"class names {str(classes)!r} cannot be read ({error}): expected a text file") from None
    if isinstance(classes, str):
        raise ValueError(f"classes={classes!r} is one string: expected a list such as [{classes!r}] or a .txt file")
    return classes


_EMBEDDED: WeakKeyDictionary = WeakKeyDictionary()  # of each living Clip: its vectors by word and templates


def _embed(clip: "Clip", word: str, templates: Sequence[str]) -> Tensor:
    known = _EMBEDDED.setdefault(clip, {})
    key = (word, tuple(templates))
    if key not in known:
        vectors = clip.encode_text([template.replace("{}", word) for template in templates])
        known[key] = torch.nn.functional.normalize(vectors.float().mean(dim=0), dim=0)
    return known[key]


def _checked(templates: Sequence[str]) -> Sequence[str]:
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates={templates!r}: expected a list such as ['a photo of a {{}}.']")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template {template!r}: expected a str with {{}} where the class name goes")
    return templates


@lru_cache
def _openai_templates() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def __getattr__(name: str) -> Any:
    # TEMPLATES is made on first use: importing open_clip takes seconds.
    if name == "TEMPLATES":
        return _openai_templates()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
