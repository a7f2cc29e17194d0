"""The trunk against open_clip's own forward, and its positional embedding against one computed by hand."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from sclip_lab.attention import affinity
from sclip_lab.readout import Readout
from sclip_lab.registry import attention
from sclip_lab.trunk import branch, dense, encode

GRIDS = {"native": (4, 4), "wide": (3, 7), "large": (9, 6), "as many patches as native": (2, 8), "one patch": (1, 1)}
TOWERS = {
    "standard": {"act_layer": QuickGELU},
    "layer scale": {"ls_init_value": 0.3},
    "custom": dict.fromkeys(["qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"], True),
    "scaled cosine": {"scaled_cosine_attn": True, "scale_heads": True, "ls_init_value": 0.5},
}


@pytest.fixture(params=TOWERS)
def tower(request, monkeypatch):
    """A small tower of patch 8 and native grid 4x4, every option of which has weights that matter."""
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 3, "mlp_ratio": 2.0, "output_dim": 20}
    tower = VisionTransformer(**size, output_tokens=True, **TOWERS[request.param])
    for weight in tower.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    if request.param == "scaled cosine":
        # open_clip 3.3 multiplies four-dimensional tensors by torch.bmm, which takes three.
        monkeypatch.setattr(torch, "bmm", torch.matmul)
        tower.transformer.resblocks[-1].attn.logit_scale_max = 2.0  # below the learned scales, so that it counts
    return tower.eval().requires_grad_(False)


def images(grid, patch=8):
    return torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(1))


def cubic(n, native):
    """[n native]: bicubic interpolation (a = -0.75) that samples by the factor (n + 0.1) / native, border repeated."""
    at = (np.arange(n) + 0.5) * native / (n + 0.1) - 0.5
    matrix = np.zeros((n, native))
    for row, position in enumerate(at):
        for tap in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            x = abs(position - tap)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, np.clip(tap, 0, native - 1)] += weight
    return matrix


def positions(embedding, native, grid, front=1):
    """A positional embedding [front+p d] for another grid than its native one, [n d], without torch."""
    ahead, patches = np.split(embedding.double().numpy(), [front])
    rows, cols = (np.eye(n) if grid == native else cubic(n, own) for n, own in zip(grid, native, strict=True))
    patches = np.einsum("rR,cC,RCd->rcd", rows, cols, patches.reshape(*native, -1))
    return torch.from_numpy(np.concatenate([ahead, patches.reshape(-1, patches.shape[-1])])).float()


def own_tokens(tower, pixels, grid):
    """What the untouched tower says of every token, [b n e], its positional embedding put in by hand."""
    copied = copy.deepcopy(tower)
    copied.positional_embedding = torch.nn.Parameter(positions(tower.positional_embedding, tower.grid_size, grid))
    cls, patches = copied(pixels)
    return torch.cat([cls[:, None], patches @ copied.proj], dim=1)


@pytest.mark.parametrize("layers", [(-1,), range(3), (), 1], ids=["last", "all", "none", "one"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_vanilla_is_the_untouched_tower(tower, grid, layers):
    pixels = images(grid)
    trunk = encode(tower, pixels)
    assert trunk.grid == grid
    found = dense(trunk, "vanilla", layers=layers)
    torch.testing.assert_close(found, own_tokens(tower, pixels, grid), atol=1e-5, rtol=0)


def test_the_reference_tower_reads_itself_too(visual, pixels):
    found = dense(encode(visual, pixels), "vanilla", layers=range(4))
    copied = copy.deepcopy(visual)
    copied.output_tokens = True
    torch.testing.assert_close(found, own_tokens(copied, pixels, (6, 9)), atol=1e-5, rtol=0)


def test_positions_are_not_those_of_asking_for_a_size(visual):
    """The rule that is tested above is the authors', and it shows: the 0.1 changes the result."""
    by_factor = positions(visual.positional_embedding, (14, 14), (13, 14))[1:]
    patches = visual.positional_embedding[1:].mT.unflatten(-1, (14, 14))[None]
    by_size = torch.nn.functional.interpolate(patches, size=(13, 14), mode="bicubic")[0].flatten(1).mT
    assert (by_factor - by_size).norm() / by_factor.norm() > 0.03


def test_sides_that_are_no_multiple_of_the_patch_lose_the_remainder(visual, pixels):
    assert pixels.shape[-1] == 150
    whole, cut = (dense(encode(visual, p)) for p in (pixels, pixels[..., :144]))
    assert whole.equal(cut)


@pytest.mark.parametrize("layers", [(0, -1), (1,), -2, (), range(3)])
def test_a_replaced_layer_changes_the_stream_above_it_and_no_other_is_replaced(tower, layers):
    """Identity is what open_clip's own block computes when every other token is masked."""
    pixels = images((4, 4))
    trunk = encode(tower, pixels)
    mask = torch.full((17, 17), -torch.inf).fill_diagonal_(0)
    x = trunk.stream[0]
    replaced = [range(3)[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    for layer, block in enumerate(tower.transformer.resblocks):
        x = block(x, attn_mask=mask if layer in replaced else None)
    found = dense(trunk, "identity", layers=layers)
    torch.testing.assert_close(found, tower.ln_post(x) @ tower.proj, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "residual", "mlp", "gain"),
    [
        ("full", 1, 1, 1), ("no_mlp", 1, 0, 1), ("no_residual", 0, 1, 1), ("bare", 0, 0, 1), ("full*2", 1, 1, 2),
        ("no_mlp * -0.5", 1, 0, -0.5),
    ],
)  # fmt: skip
def test_the_readout_is_what_the_last_block_keeps(visual, pixels, key, residual, mlp, gain):
    trunk = encode(visual, pixels)
    block, stream = visual.transformer.resblocks[-1], trunk.stream[-1]
    x = residual * stream + gain * block.attention(block.ln_1(stream))
    x = x + mlp * block.mlp(block.ln_2(x))
    expected = visual.ln_post(x) @ visual.proj
    for readout in (key, Readout(bool(residual), bool(mlp), gain)):
        torch.testing.assert_close(dense(trunk, "vanilla", readout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", range(4))
def test_a_branch_is_what_the_attention_of_a_block_adds(visual, pixels, layer):
    site = encode(visual, pixels).site(layer)
    block = visual.transformer.resblocks[layer]
    expected = block.attention(block.ln_1(site.stream))
    torch.testing.assert_close(branch(site), expected, atol=1e-5, rtol=1e-5)


def test_layers_below_the_last_stay_whole_under_any_readout(visual, pixels):
    trunk = encode(visual, pixels)
    torch.testing.assert_close(dense(trunk, "vanilla", "bare", range(4)), dense(trunk, "vanilla", "bare"))


@pytest.mark.parametrize(
    ("readout", "key"),
    [
        (Readout(), "full"),
        (Readout(mlp=False), "no_mlp"),
        (Readout(residual=False), "no_residual"),
        (Readout(False, False, 2), "bare*2"),
        (Readout(gain=2**0.5), f"full*{2**0.5}"),
    ],
)
def test_a_readouts_str_is_its_key(readout, key):
    assert str(readout) == key
    assert Readout.parse(key) == Readout.parse(readout) == readout


@pytest.mark.parametrize("key", ["fill", "", "full*", "full*two", "full*2*3", "full*nan", 3, None])
def test_an_unknown_readout_is_refused_in_one_line(key):
    with pytest.raises(ValueError, match="expected full, no_mlp") as error:
        Readout.parse(key)
    assert repr(key) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_callable_sees_the_site_and_may_borrow_from_below(visual, pixels):
    trunk = encode(visual, pixels)
    borrowed = affinity(trunk.site(1), trunk.site(1).q, trunk.site(1).k)
    expected = dense(trunk, lambda site: borrowed)
    assert dense(trunk, lambda site: attention("vanilla")(site.at(1))).equal(expected)
    assert dense(trunk, lambda site: attention("vanilla")(site.at(-3))).equal(expected)
    assert not dense(trunk, "vanilla").allclose(expected, atol=1e-2)


def test_borrowing_below_a_replaced_layer_sees_the_stream_as_it_has_become(visual, pixels):
    trunk = encode(visual, pixels)
    seen = {}

    def spy(site):
        seen[site.layer] = site
        return attention("identity")(site)

    dense(trunk, spy, layers=(1, 3))
    assert seen[3].at(1) is seen[1] is trunk.site(1)
    assert not seen[3].at(2).stream.allclose(trunk.stream[2])


def test_weights_may_be_any_shape_that_broadcasts(visual, pixels):
    trunk = encode(visual, pixels)
    n = 55
    expected = dense(trunk, lambda site: torch.full((2, 2, n, n), 1 / n))
    for shape in [(1, 1, n, n), (2, 1, n, n), (n, n), (1, n), (1, 1, 1, n), (1,), ()]:
        torch.testing.assert_close(dense(trunk, lambda site, shape=shape: torch.full(shape, 1 / n)), expected)


@pytest.mark.parametrize("shape", [(54, 54), (3, 1, 55, 55), (1, 2, 2, 55, 55), (2, 55, 55, 1)])
def test_weights_of_another_shape_are_refused(visual, pixels, shape):
    def mine(site):
        return torch.ones(shape)

    expected = rf"attention mine returned weights \[{', '.join(map(str, shape))}\].* \[2, 2, 55, 55\]"
    with pytest.raises(ValueError, match=expected):
        dense(encode(visual, pixels), mine)


def test_weights_that_are_no_tensor_are_refused(visual, pixels):
    with pytest.raises(TypeError, match="attention <lambda> returned NoneType"):
        dense(encode(visual, pixels), lambda site: None)


def test_variants_share_the_projections(visual, pixels):
    trunk = encode(visual, pixels)
    q, k = trunk.site().q, trunk.site(0).k
    for name in ("csa", "vv"):
        dense(trunk, name, layers=(1, -1))
    assert trunk.site().q is q
    assert trunk.site(-4).k is k
    assert trunk.site().at(0) is trunk.site(0)


def test_a_trunk_is_freed_with_its_last_reference(visual, pixels):
    """No cycle may hold gigabytes of streams until the garbage collector comes by."""
    gc.disable()
    try:
        trunk = encode(visual, pixels)
        dense(trunk, lambda site: attention("csa")(site.at(0)), layers=(1, 3))
        stream = weakref.ref(trunk.stream[0])
        del trunk
        assert stream() is None
    finally:
        gc.enable()


def test_the_tower_is_left_as_it_was(visual, pixels):
    before = {name: weight.clone() for name, weight in visual.state_dict().items()}
    dense(encode(visual, pixels), "csa", "bare*2", (0, -1))
    after = visual.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in visual.modules())


def test_gradients_flow_to_pixels_and_to_a_learned_attention(visual, pixels):
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(64, 64)

        def forward(self, site):
            return affinity(site, self.proj(site.q), self.proj(site.q))

    learned = Learned()
    dense(encode(visual, pixels.requires_grad_()), learned).square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    assert learned.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(visual, pixels, mode):
    expected = dense(encode(visual, pixels), layers=(0, -1))
    with mode():
        found = dense(encode(visual, pixels), layers=(0, -1))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_an_image_is_independent_of_its_batch(visual, pixels):
    together, alone = (dense(encode(visual, p)) for p in (pixels, pixels[1:]))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_towers(visual, pixels, dtype):
    found = dense(encode(copy.deepcopy(visual).to(dtype), pixels))
    assert found.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(found.float(), dense(encode(visual, pixels)), dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_weights_of_another_dtype_are_taken_on(visual, pixels, dtype):
    trunk = encode(visual, pixels)
    assert dense(trunk, lambda site: torch.eye(55, dtype=dtype)).equal(dense(trunk, "identity"))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 \[1, 3, 32, 32\], expected floats"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\], expected floats \[b 3 H W\]"),
        (torch.zeros(1, 32, 32, 3), r"\[1, 32, 32, 3\]"),
        (np.zeros((1, 3, 32, 32)), "pixels are ndarray"),
        (torch.zeros(1, 3, 15, 32), r"\[1, 3, 15, 32\], expected sides of at least one patch \(16x16\)"),
        (torch.full((1, 3, 16, 16), torch.nan), "768 NaN"),
        (torch.full((1, 3, 16, 16), torch.inf), "768 NaN or infinite"),
    ],
)
def test_unfit_pixels_are_refused_in_one_line(visual, pixels, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(visual, pixels)
    assert "\n" not in str(error.value)


def test_other_towers_are_refused(pixels):
    with pytest.raises(TypeError, match="visual is Conv2d, expected open_clip's VisionTransformer"):
        encode(torch.nn.Conv2d(3, 3, 3), pixels)
    pooled = VisionTransformer(32, 16, 64, 1, 1, 2.0, attentional_pool=True, output_dim=64)
    with pytest.raises(TypeError, match="pooled by CLS"):
        encode(pooled, pixels)


@pytest.mark.parametrize("layer", [4, -5])
def test_layers_that_are_not_there_are_refused(visual, pixels, layer):
    trunk = encode(visual, pixels)
    with pytest.raises(IndexError, match=f"layer {layer} cannot be read at layer 3 of 4"):
        dense(trunk, layers=(layer,))
    with pytest.raises(IndexError, match="layer 2 cannot be read at layer 1 of 4"):
        trunk.site(1).at(2)


def test_an_attention_that_changes_what_others_share_is_found_out(visual, pixels):
    with torch.no_grad():
        trunk = encode(visual, pixels)
        dense(trunk, lambda site: attention("qq")(site).mul_(3))
        with pytest.raises(RuntimeError, match=r"changed softmax\(qq\) in place"):
            dense(trunk, "csa")


def test_affinities_are_shared_among_variants_and_computed_anew_where_a_gradient_is_wanted(visual, pixels):
    with torch.no_grad():
        site = encode(visual, pixels).site()
        first, again = attention("qq")(site), attention("qq")(site)
        assert first is again
        torch.testing.assert_close(attention("csa")(site) - first, attention("kk")(site))
        assert set(site.affinities) == {"qq", "kk"}
        other = encode(visual, pixels.flip(0)).site()
        torch.testing.assert_close(attention("qq")(other), first.flip(0))
    shown = pixels.clone().requires_grad_()
    learning = encode(visual, shown).site()
    assert learning.q.requires_grad
    with torch.no_grad():
        attention("qq")(learning)
    attention("qq")(learning)[0, 0, 1, 2].backward()
    assert shown.grad.abs().sum() > 0
