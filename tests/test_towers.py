"""Towers of timm against timm's own forward: small random ones of each kind that open_clip wraps."""

import copy
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from test_trunk import images, positions
from timm.layers import DiffAttention
from torch import nn

from sclip_lab import metrics
from sclip_lab.clip import load
from sclip_lab.later import repair
from sclip_lab.protocol import Protocol
from sclip_lab.registry import attention, variants
from sclip_lab.segment import logits
from sclip_lab.towers import view
from sclip_lab.trunk import dense, encode

SMALL = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3}
NORM = partial(nn.LayerNorm, eps=1e-6)
KINDS = {  # a model of timm, and what makes it small without losing what it is
    "EVA01": ("eva_giant_patch14_224", "token", {"mlp_ratio": 2.0}),
    "EVA02": ("eva02_base_patch16_clip_224", "token", {"ref_feat_shape": (5, 5)}),
    "EVA, all at once": ("eva_giant_patch14_224", "token", {
        "use_rot_pos_emb": True, "ref_feat_shape": (3, 3), "rope_rotate_half": True, "qk_norm": True,
        "num_reg_tokens": 2, "no_embed_class": True, "scale_attn_inner": True, "norm_layer": NORM, "use_fc_norm": True,
        "init_values": 0.3,
    }),
    "SigLIP": ("vit_base_patch16_siglip_224", "map", {}),
    "PE": ("vit_pe_core_base_patch16_224", "map", {"ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
    "MobileCLIP": ("vit_large_patch14_clip_224", "token", {"init_values": 0.3, "qk_norm": True, "qkv_bias": False}),
}  # fmt: skip
GRIDS = {"native": (4, 4), "wide": (3, 7), "as many patches as native": (2, 8), "one patch": (1, 1)}


def shrunk(monkeypatch, kind):
    """timm makes the model of a kind small, while the test runs."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **SMALL, **KINDS[kind][2], **kwargs))


@pytest.fixture(params=KINDS)
def tower(request, monkeypatch):
    """open_clip's wrapping of a small model of timm, every weight of which matters."""
    torch.manual_seed(0)
    name, pool, _ = KINDS[request.param]
    shrunk(monkeypatch, request.param)
    tower = TimmModel(name, embed_dim=20, image_size=32, pool=pool, proj="none" if request.param == "SigLIP" else None)
    for weight in tower.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return tower.eval().requires_grad_(False)


@pytest.fixture
def siglip(monkeypatch):
    torch.manual_seed(0)
    shrunk(monkeypatch, "SigLIP")
    return TimmModel("vit_base_patch16_siglip_224", 48, 32, pool="map", proj="none").eval().requires_grad_(False)


def resized(tower, grid):
    """A copy whose own forward takes pictures of a grid, with the positions that the authors' rule gives."""
    copied = copy.deepcopy(tower)
    copied.set_input_size((grid[0] * 8, grid[1] * 8))
    front = 0 if tower.trunk.no_embed_class else tower.trunk.num_prefix_tokens
    own = tower.trunk.pos_embed[0]
    copied.trunk.pos_embed = nn.Parameter(positions(own, (4, 4), grid, front)[None], requires_grad=False)
    return copied


def own_tokens(tower, pixels):
    """What the untouched tower says of every token, each pooled alone where a learned query pools: [b n e]."""
    features = tower.trunk.forward_features(pixels)
    if tower.trunk.attn_pool is None:
        return tower.head(tower.trunk.head(tower.trunk.fc_norm(features)))
    alone = [tower.trunk.forward_head(features[:, token : token + 1]) for token in range(features.shape[1])]
    return tower.head(torch.stack(alone, dim=1))


@pytest.mark.parametrize("layers", [(-1,), range(3), (), 1], ids=["last", "all", "none", "one"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_vanilla_is_the_untouched_tower(tower, grid, layers):
    pixels = images(grid)
    trunk = encode(tower, pixels)
    assert trunk.grid == grid
    assert trunk.site().prefix == tower.trunk.num_prefix_tokens
    found = dense(trunk, "vanilla", layers=layers)
    torch.testing.assert_close(found, own_tokens(resized(tower, grid), pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", [kind for kind in KINDS if KINDS[kind][1] == "token"], indirect=True)
def test_cls_is_what_the_whole_tower_says(tower):
    pixels = images((4, 4))
    torch.testing.assert_close(dense(encode(tower, pixels), "vanilla")[:, 0], tower(pixels), atol=1e-5, rtol=1e-5)


def test_the_streams_are_timms_own(tower):
    pixels = images((4, 4))
    trunk = encode(tower, pixels)
    own = tower.trunk.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
    for found, expected in zip(trunk.stream[1:], own, strict=False):
        torch.testing.assert_close(found[:, trunk.site().prefix :], expected, atol=1e-5, rtol=1e-5)


def test_the_tower_is_left_as_it_was_and_shared(tower):
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    rope = None if getattr(tower.trunk, "rope", None) is None else tower.trunk.rope.get_embed().clone()
    dense(encode(tower, images((3, 7))), "csa", "bare*2", (0, -1))
    assert all(before[name].equal(weight) for name, weight in tower.state_dict().items())
    assert rope is None or rope.equal(tower.trunk.rope.get_embed())
    block = view(tower).blocks((4, 4))[0]
    assert block.mlp is tower.trunk.blocks[0].mlp
    assert block.attn.out_proj is tower.trunk.blocks[0].attn.proj


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_towers(tower, dtype):
    pixels = images((3, 7))
    found = dense(encode(copy.deepcopy(tower).to(dtype), pixels))
    assert found.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(found.float(), dense(encode(tower, pixels)), dim=-1)
    assert cosine.min() > 0.97


def test_rotary_queries_see_how_far_apart_two_patches_are_and_not_where(monkeypatch):
    """What RoPE is for, of a tower of nothing else: with one content everywhere, a logit depends on the offset."""
    shrunk(monkeypatch, "EVA02")
    tower = TimmModel("eva02_base_patch16_clip_224", 20, 32, pool="token", proj=None).eval().requires_grad_(False)
    tower.trunk.pos_embed.zero_()
    tower.trunk.patch_embed.proj.weight.zero_()
    site = encode(tower, images((4, 4))).site(0)
    product = (site.q @ site.k.mT)[0, 0, 1:, 1:].unflatten(0, (4, 4)).unflatten(-1, (4, 4))
    torch.testing.assert_close(product[0, 0, 1, 2], product[2, 1, 3, 3])
    assert (product[0, 0, 0, 0] - product[0, 0, 3, 3]).abs() > 1e-4
    turned, plain = (site.q[0, :, 1:], site.heads(site.x @ site.block.attn.in_proj_weight[:48].T)[0, :, 1:])
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1), rtol=1e-3, atol=1e-3)


# No CLS


@pytest.mark.parametrize("name", variants())
def test_no_variant_needs_cls(siglip, name):
    """The registry's contract, on a tower whose tokens are its patches."""
    pixels = images((3, 7))
    site = encode(siglip, pixels).site()
    b, h, n, _ = site.v.shape
    assert (n, site.prefix) == (21, 0)
    weights = attention(name)(site).expand(b, h, n, n)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    sums = weights.sum(-1)
    torch.testing.assert_close(sums, sums[0, 0, 0].expand_as(sums))
    alone = attention(name)(encode(siglip, pixels[1:]).site()).expand(1, h, n, n)
    torch.testing.assert_close(weights[1:], alone)
    found = dense(encode(siglip, pixels), name, "bare")
    assert found.shape == (2, 21, 48)
    assert found.isfinite().all()


def test_patches_of_a_tower_without_cls_are_told_from_nothing_else(siglip):
    site = encode(siglip, images((3, 7))).site()
    near = attention("window(size=3)")(site)[0, 0].unflatten(0, (3, 7)).unflatten(-1, (3, 7)) > 0
    assert near[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert near.sum(dim=(-1, -2)).tolist() == [[4, 6, 6, 6, 6, 6, 4], [6, 9, 9, 9, 9, 9, 6], [4, 6, 6, 6, 6, 6, 4]]
    weights = attention("vanilla")(site)
    entropy = metrics.entropy(weights, prefix=0)
    torch.testing.assert_close(entropy, -(weights * weights.log()).sum(-1).mean(-1))
    assert metrics.distance(torch.eye(21), (3, 7), prefix=0) == 0
    assert metrics.invariance(torch.full((21, 21), 1 / 21), prefix=0).item() == pytest.approx(1)
    assert metrics.alignment(torch.eye(21), torch.arange(21), prefix=0) == 1


def test_an_outlier_of_a_tower_without_cls_is_repaired_where_it_is(siglip):
    trunk = encode(siglip, images((6, 6)))
    trunk.stream[-1][:, 14] += 50
    after = repair(trunk, contamination=1 / 36).stream[-1]
    changed = (after - trunk.stream[-1]).abs().amax(-1) > 0
    assert changed.nonzero().tolist() == [[0, 14], [1, 14]]


def test_pictures_are_scored_by_all_patches_of_a_tower_without_cls(siglip):
    picture = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    words = torch.nn.functional.normalize(torch.randn(3, 48), dim=-1)
    found = logits(siglip, picture, words, "csa", Protocol(32, 32, 16))
    assert found.shape == (3, 40, 48)
    assert found.abs().max() <= 1


# Others

GROUPED = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnext_atto", {}, "ConvNeXt with layers of its own"),
        ("eva_giant_patch14_224", {"global_pool": "avg"}, "Eva with patches pooled by 'avg'"),
        ("eva_giant_patch14_224", {"global_pool": "token", "use_post_norm": True}, "blocks of EvaBlockPostNorm"),
        ("eva_giant_patch14_224", {"global_pool": "token", "use_abs_pos_emb": False}, "other positions than"),
        ("eva_giant_patch14_224", {"global_pool": "token", **GROUPED}, "gated or grouped attention"),
        ("vit_tiny_patch16_224", {"attn_layer": DiffAttention}, "attention by DiffAttention"),
    ],
)  # fmt: skip
def test_other_models_of_timm_are_refused_in_one_line(name, options, message):
    model = nn.Module()
    model.trunk = timm.create_model(name, **(SMALL if name != "convnext_atto" else {}), **options)
    with pytest.raises(TypeError, match=f"visual is timm's .*{message}.*, expected a plain ViT") as error:
        encode(model, images((4, 4)))
    assert "\n" not in str(error.value)


# Loading


TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None}
CONFIG = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True}


@pytest.fixture
def eva(monkeypatch, tmp_path):
    """The name of a small EVA02-CLIP, random weights of which are on disk, and open_clip's own model of them."""
    shrunk(monkeypatch, "EVA02")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "EVA-nano", CONFIG)
    torch.manual_seed(0)
    model = open_clip.create_model("EVA-nano").eval().requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return f"EVA-nano:{tmp_path}/w.safetensors", model


def test_a_clip_with_timms_tower_loads_as_any(eva):
    name, model = eva
    clip = load(name, device="cpu")
    assert (clip.patch, clip.image_size, clip.layers, clip.context) == (8, 32, 3, 12)
    pixels, texts = images((4, 4)), ["a photo of a cat", "grass"]
    own = torch.nn.functional.normalize(model.visual(pixels), dim=-1)
    found = torch.nn.functional.normalize(dense(encode(clip.visual, pixels), "vanilla")[:, 0], dim=-1)
    torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
    tokens = open_clip.get_tokenizer("EVA-nano")(texts)
    torch.testing.assert_close(clip.encode_text(texts), model.encode_text(tokens, normalize=True))
    assert clip.knows("cat")
    assert not any(weight.requires_grad for weight in clip.model.parameters())


def test_a_checkpoint_of_another_tower_is_refused(eva, tmp_path, monkeypatch):
    name, model = eva
    state = model.state_dict()
    state["visual.trunk.pos_embed"] = torch.zeros(1, 10, 48)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"visual\.trunk\.pos_embed is \[1, 10, 48\], expected \[1, 17, 48\]"):
        load(name)


def test_a_siglip_loads_with_the_tokenizer_of_transformers(monkeypatch, tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "grass": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    own.save_pretrained(tmp_path / "words")
    shrunk(monkeypatch, "SigLIP")
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}
    text = {**TEXT, "vocab_size": 5, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"hf_tokenizer_name": str(tmp_path / "words"), "tokenizer_kwargs": {"clean": "canonicalize"}}
    config = {"embed_dim": 48, "vision_cfg": {**vision, "timm_proj": "none"}, "text_cfg": text, "custom_text": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "SigLIP-nano", {**config, "init_logit_bias": -10})
    model = open_clip.create_model("SigLIP-nano").eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    clip = load(f"SigLIP-nano:{tmp_path}/w.safetensors", device="cpu")
    tokens = torch.tensor([[3] + 11 * [0], [4, 3] + 10 * [0]])
    torch.testing.assert_close(clip.encode_text(["Cat", "grass, cat"]), model.encode_text(tokens, normalize=True))
    assert clip.knows("cat")
    assert dense(encode(clip.visual, images((3, 7)))).shape == (2, 21, 48)
