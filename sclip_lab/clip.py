"""Loading a CLIP: the one place that knows open_clip's models, names and checkpoints."""

from __future__ import annotations

import difflib
import json
import textwrap
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sclip_lab.files import home
from sclip_lab.towers import view

if TYPE_CHECKING:
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    from sclip_lab.trunk import Trunk


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen CLIP in eval mode. Its pixels are to be normalised by mean and std, of RGB in 0..1 units.

    `step`: what is done to a trunk before it is read (`later.repaired`). Results are kept by name.
    """

    name: str
    model: open_clip.CLIP | open_clip.CustomTextCLIP
    tokenizer: SimpleTokenizer | HFTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: Callable[[Trunk], Trunk] | None = None

    @property
    def visual(self) -> Any:
        """The vision tower: open_clip's VisionTransformer, or its TimmModel. `towers.view` reads both."""
        return self.model.visual

    @property
    def text(self) -> Any:
        """What holds the text tower's parts, token_embedding and transformer among them."""
        return getattr(self.model, "text", self.model)

    @property
    def layers(self) -> int:
        """Blocks of the vision tower."""
        tower = view(self.visual)
        return len(tower.blocks(tower.native))

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return view(self.visual).patch[0]

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it was trained on."""
        return self.visual.image_size[0]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.logit_scale.device

    @property
    def context(self) -> int:
        """Tokens that a text may have, start and end included; the tokenizer cuts longer ones."""
        return self.model.context_length

    def knows(self, text: str) -> bool:
        """Whether every token of a text has an embedding; those that the bundled model never saw have none."""
        tokens = torch.tensor(getattr(self.tokenizer, "tokenizer", self.tokenizer).encode(text))
        return bool(self.text.token_embedding.weight[tokens].any(dim=1).all())

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts -> unit vectors [n e], in one batch."""
        tokens = self.tokenizer(texts).to(self.device)  # [n context]
        return self.model.encode_text(tokens, normalize=True)


DTYPES = {"@bfloat16": torch.bfloat16, "@float16": torch.float16}


def load(name: str = "tiny", device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Clip:
    """A CLIP by name, frozen: on the GPU where there is one (device None), its weights float32 (dtype None).

    - "tiny": the bundled one; "tiny:PATH" another that `train_tiny.py` wrote, its .json beside it.
    - "MODEL:TAG": any ViT of open_clip, its own or timm's (EVA, SigLIP, PE-Core), with its published weights, which are
      downloaded once. QuickGELU follows the weights, whatever the model is called: "ViT-B-16:openai" is the same as
      "ViT-B-16-quickgelu:openai". SigLIP's tokenizer needs the package transformers.
    - "MODEL:PATH": weights on disk (.safetensors; .pt or .bin without other objects; OpenAI's own TorchScript .pt),
      looked up from the working directory, then from `home()`. A file does not tell its activation, so here the MODEL
      does: OpenAI, MetaCLIP and DFN weights want a name that ends in -quickgelu, LAION and DataComp one without. Its
      pixels are normalised as for the MODEL's first published weights.
    - "NAME@bfloat16", "NAME@float16": the same in that precision, as by `dtype`. Results are kept under that name.

    Raises ValueError for an unknown or unsupported model, for an unknown tag and for a checkpoint that cannot be read
    or does not fit; FileNotFoundError, which says what to fetch and where to put it, for weights that are not there.
    Without a network a download gives up after most of a minute; HF_HUB_OFFLINE=1 makes it do so at once.
    """
    from open_clip import CLIP, CustomTextCLIP

    name, half = next(((name.removesuffix(end), end) for end in DTYPES if name.endswith(end)), (name, ""))
    half = half or next((end for end, known in DTYPES.items() if known == dtype), "")
    config, path = (_tiny if name.partition(":")[0] == "tiny" else _open_clip)(name)
    parts = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    if config.get("custom_text"):
        model = CustomTextCLIP(**parts, init_logit_bias=config.get("init_logit_bias"))
    else:
        model = CLIP(**parts)
    _fill(model, _read(path), name, path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().requires_grad_(False).to(device, DTYPES.get(half, dtype or torch.float32))
    tokenizer = _tokenizer(name, config["text_cfg"], model.context_length)
    return Clip(name + half, model, tokenizer, tuple(config["mean"]), tuple(config["std"]))


@lru_cache(maxsize=2)
def loaded(name: str, device: str | torch.device | None = None) -> Clip:
    """`load`, which keeps the last models for the next call."""
    return load(name, device)


def _tokenizer(name: str, config: dict, context: int) -> SimpleTokenizer | HFTokenizer:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if not (source := config.get("hf_tokenizer_name")):
        return SimpleTokenizer(context_length=context)
    try:
        return HFTokenizer(source, context, **config.get("tokenizer_kwargs", {}))
    except (OSError, ValueError) as error:
        hint = f"fetch it once with a network, or with HF_HUB_OFFLINE=0 ({_line(error)})"
        raise FileNotFoundError(f"model {name!r} needs the tokenizer {source!r}, which is not there: {hint}") from None


def _tiny(name: str) -> tuple[dict, Path]:
    """Configuration and checkpoint of the bundled model, or of one that was trained like it."""
    tag = name.partition(":")[2]
    path = _on_disk(tag) or home() / (tag or "data/tiny.safetensors")
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(
                f"model {name!r} needs {file}, which is not there: point SCLIP_HOME at a checkout, or run "
                f"`python -m sclip_lab.train_tiny`"
            )
    return json.loads(path.with_suffix(".json").read_text()), path


def _open_clip(name: str) -> tuple[dict, Path]:
    """Configuration, with the activation and the normalisation of the weights, and checkpoint of "MODEL:TAG"."""
    import open_clip

    model, _, tag = name.partition(":")
    model = model.replace("/", "-")
    config = open_clip.get_model_config(model)
    if config is None:
        close = difflib.get_close_matches(model, open_clip.list_models()) or ["ViT-B-16-quickgelu"]
        raise ValueError(f"unknown model {model!r} in {name!r}: expected 'tiny' or one of open_clip's, such as {close}")
    if reason := _unfit(config):
        raise ValueError(f"model {model!r} {reason}: expected a plain ViT, such as 'ViT-B-16-quickgelu'")
    weights = open_clip.get_pretrained_cfg(model, tag)
    if weights:
        path = _fetch(model, tag, weights)
    elif found := _on_disk(tag):
        weights, path = {"quick_gelu": config.get("quick_gelu", False), **_published(model)}, found
    elif Path(tag).suffix:
        places = f"{Path(tag).expanduser().absolute()}, or below {home()}"
        raise FileNotFoundError(f"model {name!r} needs the weights {tag!r}, which are not there: expected {places}")
    else:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(f"no weights {tag!r} for model {model!r}: expected 'MODEL:TAG', TAG a file or one of {tags}")
    normalisation = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return {**config, "quick_gelu": False, **normalisation, **weights}, path


def _published(model: str) -> dict:
    """The normalisation of a model's first published weights, if it has any."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    first = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
    return {key: first[key] for key in ("mean", "std") if key in first}


def _on_disk(path: str) -> Path | None:
    """The file at a path from the working directory or else from `home()`, or nothing."""
    return next((file for file in (Path(path).expanduser(), home() / path) if file.is_file()), None)


def _unfit(config: dict) -> str:
    """Why the lab cannot read this architecture, or nothing."""
    import timm

    vision, text = config["vision_cfg"], config["text_cfg"]
    if inner := vision.get("timm_model_name"):
        if not timm.models.is_model_in_modules(inner, ["vision_transformer", "eva"]):
            return f"has timm's vision tower {inner}, which is no plain ViT"
    elif isinstance(vision["layers"], list):
        return "has a ResNet as vision tower"
    elif vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        return "does not pool its patches by a CLS token"
    if "hf_model_name" in text:
        return f"has a text tower of another library ({text['hf_model_name']})"
    if "hf_tokenizer_name" in text and not find_spec("transformers"):
        return f"has a tokenizer of the package transformers ({text['hf_tokenizer_name']}), which is not installed"
    return ""


def _fetch(model: str, tag: str, weights: dict) -> Path:
    """Download the weights of a tag, with a progress bar, or find them in the cache of earlier downloads; verified."""
    import open_clip

    from sclip_lab.fetch import verified  # takes a tenth of a second

    try:
        return verified(Path(open_clip.download_pretrained(weights)))
    except (OSError, RuntimeError) as error:
        repo, _, file = weights["hf_hub"].rpartition("/")
        file = file or "open_clip_model.safetensors"
        # From a file the model's name decides on the activation, so the advice must name the one that fits.
        quick = f"{model}-quickgelu"
        fitting = quick if weights.get("quick_gelu") and quick in open_clip.list_models() else model
        copy = Path("data/cache") / f"{fitting}-{tag}{Path(file).suffix}"
        raise FileNotFoundError(
            f"cannot download the weights of '{model}:{tag}' ({_line(error)}): fetch {file} of {repo} on Hugging Face "
            f"by other means, save it as {home() / copy} and load '{fitting}:{copy}'"
        ) from None


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without ever running what it may have pickled."""
    from open_clip.factory import load_state_dict

    try:
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, OpenAI's files are not
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # every reader has exceptions of its own
        raise ValueError(f"cannot read checkpoint {path} ({_line(error)}): expected named tensors") from None
    # OpenAI's archives carry three numbers along.
    numbers = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in state.items() if key not in numbers}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _fill(model: open_clip.CLIP, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Copy a checkpoint into a model; names and shapes must be the same."""
    own = model.state_dict()
    if "token_embedding.rows" in state:  # a small vocabulary: only the rows in use are stored, the others are zero
        rows, values = state.pop("token_embedding.rows"), state.pop("token_embedding.values")
        state["token_embedding.weight"] = torch.zeros_like(own["token_embedding.weight"]).index_copy(
            0, rows.long(), values.float()
        )
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())  # some are stored as [1]
    for key in [*own, *state]:
        found, expected = (list(tensors[key].shape) if key in tensors else "no such tensor" for tensors in (state, own))
        if found != expected:
            raise ValueError(f"checkpoint {path} does not fit {name!r}: {key} is {found}, expected {expected}")
    model.load_state_dict(state)


def _line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder="...")
