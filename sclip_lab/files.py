"""Where the lab's files live, and how one is written: whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def home() -> Path:
    """The folder that holds `data/`: SCLIP_HOME, else an editable install's parent, else the working directory."""
    if folder := os.environ.get("SCLIP_HOME"):
        return Path(folder).expanduser()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "data").is_dir() else Path.cwd()


def chosen() -> str:
    """The model that notebooks load: SCLIP_MODEL, a name for `clip.load`, else the bundled one."""
    return os.environ.get("SCLIP_MODEL") or "tiny"


def results() -> Path:
    """The folder of stored results: SCLIP_RESULTS (as seen from `home()`), else data/results; of another model than the
    bundled one, the folder of its name in it, and there the one of SCLIP_DATA.
    """
    return home() / Path(os.environ.get("SCLIP_RESULTS") or "data/results").expanduser() / _of_model_and_data()


def cache() -> Path:
    """The folder of what can be made again: SCLIP_CACHE, else data/cache."""
    return Path(os.environ.get("SCLIP_CACHE") or home() / "data" / "cache").expanduser()


def figures() -> Path:
    """The folder that notebooks draw to; of another model than the bundled one, a folder in it, as of `results`."""
    return home() / "figures" / _of_model_and_data()


def _of_model_and_data() -> Path:
    if chosen() == "tiny":
        return Path()
    data = os.environ.get("SCLIP_DATA")
    return Path(plain(chosen()), plain(str(Path(data).expanduser().resolve())) if data else "")


def plain(name: str) -> str:
    """A name or path as the name of one folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, to be written: it takes `path`'s name on success and is removed on failure.

    The temporary name keeps the suffix, since many writers choose a format by it. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
