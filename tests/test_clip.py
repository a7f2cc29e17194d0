"""Loading, against open_clip's own loader, with a model small enough to be written by the test."""

import copy
import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from sclip_lab.clip import _open_clip, load

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEXTS = ["a photo of a cat", "grass"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """open_clip knows two models more, while the test runs."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-nano", CONFIG)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-nano-quickgelu", {**CONFIG, "quick_gelu": True})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("SCLIP_HOME", str(tmp_path))
    return tmp_path


def write_tiny(model, path):
    """A file as the bundled one: half precision, of the token embedding the rows in use alone."""
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    embedding = state.pop("token_embedding.weight")
    rows = open_clip.SimpleTokenizer(context_length=12)(TEXTS).unique()
    state |= {"token_embedding.rows": rows.int(), "token_embedding.values": embedding[rows]}
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)
    extra = {"quick_gelu": False, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "pictures": 100}
    path.with_suffix(".json").write_text(json.dumps({**CONFIG, **extra}))


def same(clip, model, tolerance=1e-6):
    """Both towers say what the model says."""
    tokens = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(clip.encode_text(TEXTS), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(clip.visual(pixels), model.encode_image(pixels), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("name", "file"), [("tiny", "data/tiny"), ("tiny:mine.safetensors", "mine")])
def test_tiny_is_read_from_its_two_files(home, model, name, file):
    write_tiny(model, home / f"{file}.safetensors")
    clip = load(name, device="cpu")
    same(clip, copy.deepcopy(model).half().float(), tolerance=1e-5)
    assert (clip.name, clip.patch, clip.image_size, clip.context) == (name, 16, 32, 12)
    assert (clip.mean, clip.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_tiny_that_is_not_there_says_how_to_make_it(home):
    with pytest.raises(FileNotFoundError, match=r"'tiny' needs .*data/tiny\.safetensors.*train_tiny") as error:
        load("tiny")
    assert str(home) in str(error.value)


def test_the_bundled_model():
    clip = load(device="cpu")
    assert (clip.name, clip.patch, clip.image_size) == ("tiny", 8, 96)
    vectors = clip.encode_text(["a bee on grass", "a zebra on sand"])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert vectors[0] @ vectors[1] < 0.9


def traced(model):
    """TorchScript as OpenAI publishes: all weights by name, and three numbers among them."""
    archive = copy.deepcopy(model).half().float()
    del archive.attn_mask
    for name in ("input_resolution", "context_length", "vocab_size"):
        archive.__dict__.pop(name, None)
        archive.register_buffer(name, torch.tensor(12))
    return torch.jit.trace_module(archive, {"encode_image": torch.zeros(1, 3, 32, 32)})


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["safetensors", "state", "training", "logit scale of one", "torchscript"])
def test_checkpoints_on_disk(kind, model, tmp_path):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "state":
        torch.save(state, path)
    elif kind == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": weight for name, weight in state.items()}}, path)
    elif kind == "logit scale of one":
        torch.save({**state, "logit_scale": state["logit_scale"][None]}, path)
    else:
        traced(model).save(str(path))
    clip = load(f"ViT-nano:{path}", device="cpu")
    same(clip, model, tolerance=1e-3 if kind == "torchscript" else 1e-6)
    if kind != "torchscript":
        same(clip, open_clip.create_model("ViT-nano", pretrained=str(path)).eval())


def test_a_path_is_looked_up_from_the_working_directory_and_from_home(home, checkpoint, model, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    same(load(f"ViT-nano:{checkpoint.name}", device="cpu"), model)
    (home / "data").mkdir()
    (home / "data" / "nano.safetensors").symlink_to(checkpoint)
    same(load("ViT-nano:data/nano.safetensors", device="cpu"), model)


def test_a_loaded_clip_is_frozen_in_eval_mode_and_of_unit_norm(checkpoint):
    clip = load(f"ViT-nano:{checkpoint}", device="cpu")
    assert not clip.model.training
    assert not any(weight.requires_grad for weight in clip.model.parameters())
    assert (clip.mean, clip.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(clip.encode_text(TEXTS).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_converted_to_a_dtype(checkpoint, dtype):
    clip = load(f"ViT-nano:{checkpoint}", device="cpu", dtype=dtype)
    assert {weight.dtype for weight in clip.model.parameters()} == {dtype}
    vectors = clip.encode_text(TEXTS)
    assert vectors.dtype == dtype
    whole = load(f"ViT-nano:{checkpoint}", device="cpu").encode_text(TEXTS)
    torch.testing.assert_close(vectors.float(), whole, atol=0.02, rtol=0)


def activations(clip):
    """The activations of both towers."""
    blocks = [*clip.visual.transformer.resblocks, *clip.model.transformer.resblocks]
    return {type(block.mlp.gelu) for block in blocks}


@pytest.mark.parametrize("model_name", ["ViT-nano", "ViT-nano-quickgelu"])
def test_the_activation_follows_the_weights_of_a_tag_and_the_name_for_a_path(model_name, checkpoint, monkeypatch):
    tags = {
        "quick": {"file": str(checkpoint), "quick_gelu": True, "mean": (0, 0, 0), "std": (1, 1, 1)},
        "plain": {"file": str(checkpoint)},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, model_name, tags)
    quick, plain, path = (load(f"{model_name}:{tag}", device="cpu") for tag in ("quick", "plain", checkpoint))
    assert (activations(quick), activations(plain)) == ({QuickGELU}, {torch.nn.GELU})
    assert activations(path) == ({QuickGELU} if model_name.endswith("quickgelu") else {torch.nn.GELU})
    assert (quick.mean, quick.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("ViT-B-16:openai", True), ("ViT-B-16-quickgelu:openai", True), ("ViT-B/16:openai", True),
        ("ViT-B-32:openai", True), ("ViT-L-14:openai", True), ("ViT-L-14-336:openai", True),
        ("ViT-B-16:metaclip_fullcc", True), ("ViT-H-14-quickgelu:metaclip_fullcc", True), ("ViT-L-14:dfn2b", True),
        ("ViT-B-16:laion2b_s34b_b88k", False), ("ViT-L-14:datacomp_xl_s13b_b90k", False),
        ("ViT-H-14:laion2b_s32b_b79k", False),
    ],
)  # fmt: skip
def test_the_activation_of_published_weights(name, quick, monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda weights: "downloaded")
    config, path = _open_clip(name)
    assert config["quick_gelu"] == quick
    assert path == Path("downloaded")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("ViT-B-16:openai", "ViT-B-16-quickgelu:data/cache/ViT-B-16-quickgelu-openai.safetensors"),
        ("ViT-L-14:laion2b_s32b_b82k", "ViT-L-14:data/cache/ViT-L-14-laion2b_s32b_b82k.safetensors"),
    ],
)
def test_weights_that_cannot_be_downloaded_say_what_to_do(name, advice, home, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    with pytest.raises(FileNotFoundError, match=r"fetch open_clip_model\.safetensors of ") as error:
        load(name)
    message = str(error.value)
    repo = open_clip.get_pretrained_cfg(*name.split(":"))["hf_hub"].rstrip("/")
    assert repo in message
    assert f"save it as {home}" in message
    assert message.endswith(f"load '{advice}'")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown model ''"),
        ("tinny", "unknown model 'tinny'.*expected 'tiny'"),
        ("ViT-B-17:openai", "unknown model 'ViT-B-17'.*ViT-B-16"),
        ("ViT-B-16", "no weights '' for model 'ViT-B-16'.*openai"),
        ("ViT-B-16:opena", "no weights 'opena' for model 'ViT-B-16'.*openai"),
        ("RN50:openai", "'RN50' has a ResNet as vision tower"),
        ("convnext_base:laion400m_s13b_b51k", "'convnext_base' has timm's vision tower convnext_base.* no plain ViT"),
        ("nllb-clip-base-siglip:v1", "'nllb-clip-base-siglip' has a text tower of another library"),
        ("coca_ViT-B-32:laion2b_s13b_b90k", "does not pool its patches by a CLS token"),
        ("ViT-L-14-CLIPA:datacomp1b", "does not pool its patches by a CLS token"),
        ("roberta-ViT-B-32:laion2b_s12b_b32k", "text tower of another library"),
    ],
)
def test_names_that_cannot_be_loaded_are_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_library_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("sclip_lab.clip.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'ViT-B-16-SigLIP' has a tokenizer of the package transformers .*SigLIP\)"):
        load("ViT-B-16-SigLIP:webli")


@pytest.mark.parametrize(
    ("model_name", "mean"), [("ViT-B-16", open_clip.OPENAI_DATASET_MEAN), ("PE-Core-B-16", (0.5, 0.5, 0.5))]
)
def test_pixels_for_weights_on_disk_are_normalised_as_for_published_ones(model_name, mean, checkpoint):
    assert _open_clip(f"{model_name}:{checkpoint}")[0]["mean"] == mean


def test_a_path_where_nothing_is_says_where_it_was_looked_for(home):
    with pytest.raises(FileNotFoundError, match=rf"needs the weights 'no/such\.pt'.*/no/such\.pt, or below {home}"):
        load("ViT-B-16:no/such.pt")


@pytest.mark.parametrize(
    ("key", "weight", "message"),
    [
        ("visual.conv1.weight", torch.zeros(64, 3, 16, 16), r"\[64, 3, 16, 16\], expected \[32, 3, 16, 16\]"),
        ("visual.proj", None, r"visual\.proj is no such tensor, expected \[32, 24\]"),
        ("extra", torch.zeros(3), r"extra is \[3\], expected no such tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_offending_tensor(key, weight, message, model, tmp_path):
    state = {name: tensor for name, tensor in {**model.state_dict(), key: weight}.items() if tensor is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load(f"ViT-nano:{tmp_path}/w.safetensors")
    assert "\n" not in str(error.value)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_garbage(path, sprung):
    path.write_bytes(b"garbage")


def write_trap(path, sprung):
    torch.save({"state_dict": {"logit_scale": Trap(sprung)}}, path)


def write_plain_pickle(path, sprung):
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))


@pytest.mark.parametrize("write", [write_garbage, write_trap, write_plain_pickle])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_unreadable_and_dangerous_files_are_refused_in_one_line_and_never_run(write, suffix, tmp_path):
    path, sprung = tmp_path / f"w.{suffix}", tmp_path / "sprung"
    write(path, sprung)
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*expected named tensors") as error:
        load(f"ViT-nano:{path}")
    assert not sprung.exists()
    assert "\n" not in str(error.value)
