"""The methods after SCLIP: their limits and equivalences. Their formulas, in loops, are in test_oracle.py."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REFERENCE
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize, resize

from sclip_lab import Readout, Site, Trunk, attention, canonical, dense, encode, summarise, sweep
from sclip_lab.images import MEAN, STD
from sclip_lab.later import LAST_SIX, RECIPES, patches, proxied, repair


def tower(layers):
    torch.manual_seed(layers)
    size = {"image_size": 32, "patch_size": 8, "output_dim": 12, "mlp_ratio": 2.0, "width": 32, "heads": 2}
    return VisionTransformer(**size, layers=layers, act_layer=QuickGELU).eval().requires_grad_(False)


@pytest.fixture
def site(visual, pixels):
    return encode(visual, pixels).site()


# Attentions


def test_naclip_without_reach_favours_the_patch_itself_by_one(site):
    favour = torch.eye(site.x.shape[1])
    favour[0, 0] = 0
    expected = (site.scale * site.k @ site.k.mT + favour).softmax(-1)
    torch.testing.assert_close(attention("naclip(std=0.01)")(site), expected)


def test_naclip_with_all_reach_is_kk_among_patches(site):
    found, expected = (attention(spec)(site)[..., 1:] for spec in ("naclip(std=1e6)", "kk"))
    torch.testing.assert_close(F.normalize(found, p=1, dim=-1), F.normalize(expected, p=1, dim=-1))


def test_neighbourhood_only_sees_the_same_in_every_place_of_equal_surroundings(site):
    rows, cols = site.grid
    maps = attention("nonly(std=0.7)")(site)[0, 0, 1:, 1:].unflatten(0, site.grid).unflatten(-1, site.grid)
    middle, beside = maps[2, 3, 1:4, 2:5], maps[3, 5, 2:5, 4:7]
    torch.testing.assert_close(middle / middle[1, 1], beside / beside[1, 1])
    assert maps.flatten(2).argmax(-1).tolist() == [[row * cols + col for col in range(cols)] for row in range(rows)]


FEATURES = torch.randn(2, 20, 6, 9, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize(
    ("name", "attend", "readout", "layers"),
    [
        ("CLIP Surgery", "vv", "beside", (-3, -2, -1)),
        ("GEM", "gem", "beside", (-3, -2, -1)),
        ("ResCLIP", "cross", "bare", (-1,)),
        ("ProxyCLIP", proxied(FEATURES), "bare", (-1,)),
    ],
)
def test_patches_are_the_authors(name, attend, readout, layers, visual, pixels):
    # Patches that the blocks or attentions of their released code make of this tower's streams; ResCLIP's of NACLIP
    # with layers 1 and 2 and without the semantic feedback, ProxyCLIP's of FEATURES.
    expected = np.load(REFERENCE / "later.npz")[name]
    found = dense(encode(visual, pixels), attend, readout, layers)[:, 1:]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("cross(of='csa', weight=0, tau=1)", "csa"),
        ("cross(weight=0, tau=1)", "naclip"),
        ("cross(of='qq', weight=1, tau=1, layers=(1,))", "borrow(layer=1)"),
        ("cross(of='qq', weight=0.4, tau=1, layers=(-1,))", "blend(a='qq', b='vanilla', weight=0.4)"),
        ("cross(tau=1, weight=1)", "blend('borrow(1)', 'borrow(2)')"),
    ],
)
def test_cross_correlation_equivalences(spec, same, site):
    torch.testing.assert_close(attention(spec)(site), attention(same)(site))


def test_the_middle_of_twelve_layers_is_the_authors_5_to_8():
    site = encode(tower(12), torch.randn(1, 3, 32, 32)).site()
    found, expected = (attention(f"cross(weight=1{layers})")(site) for layers in ("", ", layers=(5, 6, 7, 8)"))
    assert found.equal(expected)


# Another model's features


def test_a_patch_gathers_from_those_alike_and_from_itself_where_none_is(site):
    rows, cols = site.grid
    kinds = torch.arange(rows * cols) % 3
    features = F.one_hot(kinds, 3).T.float().unflatten(-1, site.grid).expand(2, -1, -1, -1)
    found = proxied(features)(site)
    alike = (kinds[:, None] == kinds).float()
    expected = torch.block_diag(torch.ones(1, 1), alike / alike.sum(-1))
    torch.testing.assert_close(found[:, 0], expected.expand(2, -1, -1))
    torch.testing.assert_close(proxied(features.new_ones(2, 3, rows, cols))(site)[0, 0], torch.eye(1 + rows * cols))
    finer = features.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(proxied(finer)(site), found)


@pytest.fixture(params=["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def dino(request, tmp_path, monkeypatch):
    """The spec of a model of random weights, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=0, dynamic_img_size=True).eval().requires_grad_(False)
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    return f"proxy(dino={f'{request.param}:{file}'!r})", model


@pytest.mark.parametrize(
    ("size", "asked_size"),  # as the model's patch has it: of 14 pixels, of 16
    [((112, 224), {14: (112, 224), 16: (112, 224)}), ((96, 150), {14: (98, 154), 16: (96, 144)})],
)
def test_features_are_timms_own_of_the_picture_in_its_normalisation_and_nearest_size(size, asked_size, dino, visual):
    spec, model = dino
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    trunk = encode(visual, normalize(image, MEAN, STD))
    asked = resize(image, asked_size[model.patch_embed.patch_size[0]], antialias=False)
    asked = normalize(asked, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    tokens = model.forward_features(asked)[:, model.num_prefix_tokens :]
    found = patches(model, trunk.site())
    torch.testing.assert_close(found.flatten(2).mT, tokens, atol=1e-4, rtol=1e-4)
    read = [dense(trunk, attend, "bare") for attend in (spec, proxied(tokens.mT.unflatten(-1, found.shape[2:])))]
    torch.testing.assert_close(*read, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.pth", None, "FileNotFoundError"),
        ("cut.safetensors", b"garbage", "header too small"),
        ("other.pth", {"head.weight": torch.zeros(2)}, "Error.* in loading state_dict.* Missing key.*"),
    ],
)
def test_weights_that_are_missing_broken_or_of_another_model_are_named_in_one_line(name, content, reason, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"no features of 'test_vit:.*{name}' \(.*{reason}.*\): expected") as error:
        attention(f"proxy(dino={f'test_vit:{tmp_path / name}'!r})")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("proxy(dino='vit_none')", "no features of 'vit_none' .*: expected a ViT of timm"),
        ("proxy(dino='vit_base_patch8_224.dino')", "no features of 'vit_base_patch8_224.dino' .*: expected a ViT"),
        (
            "proxy(dino='test_convnext:missing.safetensors')",
            "no features of 'test_convnext:missing.safetensors' .*: expected a ViT of timm",
        ),
        ("naclip(std=0)", "naclip std=0: expected a positive number of patches"),
        ("nonly(std=-1)", "nonly std=-1: expected a positive number of patches"),
        ("gem(iterations=-1)", "gem iterations=-1: expected a whole number"),
    ],
)
def test_what_cannot_be_is_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        attention(spec)
    assert "\n" not in str(error.value)


def test_a_site_without_pixels_says_so(site):
    blind = Site(site.blocks, site.stream, site.grid, site.below)
    with pytest.raises(ValueError, match="the site has no pixels to show to another model"):
        attention("proxy")(blind)


# The path beside the tower


def test_beside_the_last_layer_alone_is_no_mlp(visual, pixels):
    trunk = encode(visual, pixels)
    for gain in ("", "*0.5"):
        torch.testing.assert_close(dense(trunk, "vv", f"beside{gain}"), dense(trunk, "vv", f"no_mlp{gain}"))


def test_the_key_of_the_path_beside():
    readout = Readout(mlp=False, gain=2, beside=True)
    assert str(readout) == "beside*2"
    assert Readout.parse("beside*2") == readout
    with pytest.raises(ValueError, match="a path beside the tower has a residual and no MLP"):
        Readout(beside=True)


# The step on the trunk


def planted(visual, pixels):
    """A trunk whose last stream is smooth but for outliers: two neighbours in one image, a corner in the other."""
    trunk = encode(visual, pixels)
    rows, cols = trunk.grid
    line = torch.linspace(0, 1, rows * cols + 1)[:, None]
    stream = (line + 0.01 * torch.randn(2, rows * cols + 1, 128, generator=torch.Generator().manual_seed(0))) / 8
    outliers = [[2 * cols + 4, 2 * cols + 5], [0]]
    for image, places in enumerate(outliers):
        stream[image, 1 + torch.tensor(places)] += 9
    last = trunk.sites[-1]
    return Trunk(visual, (*trunk.sites[:-1], Site(last.blocks, stream, last.grid, last.below))), outliers


def test_outliers_are_the_mean_of_what_is_sound_around_them(visual, pixels):
    trunk, outliers = planted(visual, pixels)
    rows, cols = trunk.grid
    before = trunk.stream[-1].clone()
    for image, places in enumerate(outliers):
        after = repair(trunk, contamination=len(places) / (rows * cols)).stream[-1][image]
        expected = before[image].clone()
        for place in places:
            row, col = divmod(place, cols)
            around = [(y, x) for y in range(row - 1, row + 2) for x in range(col - 1, col + 2)]
            sound = [y * cols + x for y, x in around if 0 <= y < rows and 0 <= x < cols and y * cols + x not in places]
            expected[1 + place] = sum(before[image, 1 + other] for other in sound) / len(sound)
        torch.testing.assert_close(after, expected)
    assert trunk.stream[-1].equal(before)


def test_repair_touches_the_given_share_of_the_last_stream_of_each_image_alone(visual, pixels):
    trunk = encode(visual, pixels)
    repaired, alone = repair(trunk, contamination=0.1), repair(encode(visual, pixels[1:]), contamination=0.1)
    changed = (repaired.stream[-1] != trunk.stream[-1]).any(-1)
    assert changed[:, 1:].sum(1).tolist() == [6, 6]
    assert not changed[:, 0].any()
    torch.testing.assert_close(repaired.stream[-1][1:], alone.stream[-1])
    assert all(a is b for a, b in zip(repaired.sites[:-1], trunk.sites[:-1], strict=True))
    assert not dense(repaired).allclose(dense(trunk))


def test_repair_keeps_the_dtype_and_takes_few_patches(visual, pixels):
    small = encode(visual, pixels[..., :48, :48])
    half = Trunk(visual, (Site(small.site().blocks, small.stream[-1].bfloat16(), small.grid, small.sites[:-1]),))
    assert repair(half).stream[-1].dtype == torch.bfloat16


# Recipes


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ProxyCLIP"])
def test_recipes_run_as_they_are(name):
    attend, readout, layers = RECIPES[name]
    assert canonical(attend) == attend
    assert str(Readout.parse(readout)) == readout
    tokens = dense(encode(tower(6), torch.randn(2, 3, 32, 32)), attend, readout, layers)
    assert tokens.shape == (2, 17, 12)
    assert tokens.isfinite().all()


def test_the_proxy_of_the_recipe_is_one_that_timm_has():
    spec, *_ = RECIPES["ProxyCLIP"]
    assert canonical(spec) == spec
    assert spec.split("'")[1] in timm.list_pretrained()


def test_a_sweep_takes_a_path_beside_the_tower():
    frame = sweep("tiny", "scenes-full", ["vv", "gem"], readouts="beside", layers=[LAST_SIX], limit=1)
    table = summarise(frame)
    assert table["attention"].tolist() == ["vv", "gem"]
    assert set(zip(table["readout"], table["layers"], strict=True)) == {("beside", "-6,-5,-4,-3,-2,-1")}
