"""Class names -> text queries: prompt templates, synonyms, averaged embeddings, which are kept on disk.

Letters: q queries (one per word or synonym), e embedding.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sclip_lab.files import cache, replacing

if TYPE_CHECKING:
    from sclip_lab.clip import Clip

TEMPLATES: tuple[str, ...]  # the 80 prompts of CLIP's ImageNet evaluation, "{}" where the word goes; see __getattr__


@dataclass(frozen=True, eq=False)
class Queries:
    """What a label map can say: unit `vectors` [q e], the class of each `query_class` [q] and the classes' `names`."""

    vectors: Tensor
    query_class: Tensor
    names: list[str]

    def to(self, device: str | torch.device) -> "Queries":
        """The same on a device."""
        return Queries(self.vectors.to(device), self.query_class.to(device), self.names)


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
    vector_of = _embedded(clip, list(unique), tuple(prompts))
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


_EMBEDDED: WeakKeyDictionary = WeakKeyDictionary()  # of each living Clip: its vectors by templates and word


def _embedded(clip: "Clip", words: list[str], templates: tuple[str, ...]) -> dict[str, Tensor]:
    """The vector of each word: as it is known, in memory or on disk, or encoded now and known from then on."""
    known: dict[str, Tensor] = _EMBEDDED.setdefault(clip, {}).setdefault(templates, {})
    if not known.keys() >= set(words):
        path = cache() / "text" / f"{_fingerprint(clip, templates)}.safetensors"
        known |= _on_disk(path, clip.model.logit_scale.device)
        missing = [word for word in words if word not in known]
        try:
            for word in tqdm(missing, f"words for {clip.name}", unit="word", disable=None, delay=3):
                known[word] = _embed(clip, word, templates)
        finally:
            # Words that another process has added meanwhile are kept. A disk that takes nothing costs only time.
            with suppress(OSError, SafetensorError), replacing(path) as temporary:
                own = _on_disk(path, "cpu") | {word: vector.cpu() for word, vector in known.items()}
                save_file(own, temporary, {"digest": _digest(own)})
    return known


def _embed(clip: "Clip", word: str, templates: Iterable[str]) -> Tensor:
    vectors = clip.encode_text([template.replace("{}", word) for template in templates])
    return torch.nn.functional.normalize(vectors.float().mean(dim=0), dim=0)


def _on_disk(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt", str(device)) as file:
            found = {word: file.get_tensor(word) for word in file.keys()}  # noqa: SIM118
            return found if (file.metadata() or {}).get("digest") == _digest(found) else {}
    except (OSError, SafetensorError):  # nothing there, or nothing that can be used: it is written anew
        return {}


def _digest(vectors: dict[str, Tensor]) -> str:
    """What tells whether a bit of the vectors has changed."""
    digest = blake2b(digest_size=12)
    for word, vector in sorted(vectors.items()):
        digest.update(word.encode() + vector.cpu().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(clip: "Clip", templates: tuple[str, ...]) -> str:
    """What vectors depend on but for the word: the text tower's architecture and weights, and the templates."""
    architecture = clip.name.partition(":")[0], str(clip.text.transformer)
    digest = blake2b(repr((architecture, templates)).encode(), digest_size=12)
    for name, tensor in clip.model.state_dict().items():
        if not name.startswith("visual."):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
