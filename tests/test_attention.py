"""Contracts over the registry, so that a new variant is tested by existing; equivalences; the authors' own weights."""

import copy
import json
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import save_file

from sclip_lab.protocol import Protocol, windows
from sclip_lab.registry import _FACTORIES, attention, canonical, variants
from sclip_lab.trunk import encode


class TestContract:
    def pytest_generate_tests(self, metafunc):
        # At every collection, so that a notebook's variants take part whenever it runs these tests in its own kernel.
        metafunc.parametrize("name", variants())

    def test_weights_broadcast_and_are_finite_not_negative_with_rows_of_one_sum(self, name, visual, pixels):
        site = encode(visual, pixels).site()
        b, h, n, _ = site.v.shape
        weights = attention(name)(site).expand(b, h, n, n)
        assert n == 6 * 9 + 1
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        sums = weights.sum(-1)
        torch.testing.assert_close(sums, sums[0, 0, 0].expand_as(sums))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_kept(self, name, dtype, visual, pixels):
        half = encode(copy.deepcopy(visual).to(dtype), pixels).site()
        weights = attention(name)(half)
        assert weights.dtype == dtype
        # The same block in full precision on the same stream: what is left is rounding.
        whole = encode(visual, pixels).site()
        torch.testing.assert_close(weights.float(), attention(name)(whole), atol=0.02, rtol=0)

    def test_an_image_is_independent_of_its_batch(self, name, visual, pixels):
        together, alone = (attention(name)(encode(visual, p).site()) for p in (pixels, pixels[1:]))
        torch.testing.assert_close(together[1:] if together.ndim == 4 else together, alone)

    def test_deterministic(self, name, visual, pixels):
        first, second = (attention(name)(encode(visual, pixels).site()) for _ in range(2))
        assert first.equal(second)

    def test_the_docstring_cites_its_source(self, name):
        assert re.search(r"arXiv:\d{4}\.\d{5}|doi:10\.", _FACTORIES[name].__doc__)

    def test_what_it_returns_is_named_by_the_spec(self, name):
        assert canonical(attention(name)) == canonical(name) == name


@pytest.fixture(scope="module")
def crop(visual):
    """The site that the authors' last block saw: the top left window of the first photograph."""
    cases = json.loads((REFERENCE / "cases.json").read_text())
    image = cv2.cvtColor(cv2.imread(str(REFERENCE / cases["images"][0])), cv2.COLOR_BGR2RGB)
    window = torch.from_numpy(windows(image, Protocol(336, 224, 112))[:1]).float()  # 1 H W 3
    pixels = (window - torch.tensor(cases["mean"])) / torch.tensor(cases["std"])
    return encode(visual, pixels.permute(0, 3, 1, 2)).site()


@pytest.mark.parametrize("name", ["vanilla", "csa"])
def test_weights_are_the_authors(name, crop):
    expected = np.load(REFERENCE / "attention_last.npz")[name]  # h, every 14th row, n
    np.testing.assert_allclose(attention(name)(crop)[0, :, ::14], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "column"), [("qq", 0), ("kk", 1), ("vv", 2)])
def test_one_projection_is_torchs_attention_with_its_queries_and_keys_both_from_it(name, column, visual, pixels):
    site = encode(visual, pixels).site()
    module = copy.deepcopy(site.block.attn)
    for tensor in (module.in_proj_weight.data, module.in_proj_bias.data):
        projections = list(tensor.clone().chunk(3))
        tensor.copy_(torch.cat([projections[column], projections[column], projections[2]]))
    _, expected = module(site.x, site.x, site.x, average_attn_weights=False)
    torch.testing.assert_close(attention(name)(site), expected)


def test_identity_is_the_attention_that_no_other_token_survives(visual, pixels):
    site = encode(visual, pixels).site()
    others = ~torch.eye(site.x.shape[1], dtype=torch.bool)
    _, expected = site.block.attn(site.x, site.x, site.x, attn_mask=others, average_attn_weights=False)
    torch.testing.assert_close(attention("identity")(site).expand_as(expected), expected)


def test_csa_adds_to_two(visual, pixels):
    weights = attention("csa")(encode(visual, pixels).site())
    torch.testing.assert_close(weights.sum(-1), torch.full(weights.shape[:-1], 2.0))


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("window(size=1)", "identity"),
        ("window(size=1, of='qq')", "identity"),
        ("sharpen(tau=1)", "vanilla"),
        ("sharpen(tau=1, of='csa')", "csa"),
        ("sharpen(tau=1e4, of='identity')", "identity"),
        ("sharpen(tau=2, of='sharpen(tau=3)')", "sharpen(tau=6)"),
        ("borrow(layer=-1)", "vanilla"),
        ("borrow(layer=-1, of='csa')", "csa"),
        ("blend('csa', 'kk', 0)", "csa"),
        ("blend('csa', 'kk', 1)", "kk"),
        ("projection('q')", "qq"),
        ("projection('k')", "kk"),
        ("projection('v')", "vv"),
        ("learned", "qq"),
        ("heads", "csa"),
        ("heads(keep=(0, 1), of='identity')", "identity"),
    ],
)
def test_equivalences(spec, same, visual, pixels):
    site = encode(visual, pixels).site()
    found, expected = (attention(name)(site).expand(*site.v.shape[:3], -1) for name in (spec, same))
    torch.testing.assert_close(found, expected)


def test_csa_is_twice_the_mean_of_its_halves(visual, pixels):
    site = encode(visual, pixels).site()
    torch.testing.assert_close(attention("csa")(site), 2 * attention("blend")(site))


def test_a_temperature_is_a_power(visual, pixels):
    site = encode(visual, pixels).site()
    expected = (0.3 * site.scale * site.q @ site.k.mT).softmax(-1)
    torch.testing.assert_close(attention("sharpen(tau=0.3)")(site), expected)


def test_a_window_is_torchs_masked_attention(visual, pixels):
    site = encode(visual, pixels).site()
    rows, cols = site.grid
    hidden = torch.ones(1 + rows * cols, 1 + rows * cols, dtype=torch.bool)
    hidden[0, 0] = False
    for y, x in np.ndindex(rows, cols):
        for v, u in np.ndindex(rows, cols):
            hidden[1 + y * cols + x, 1 + v * cols + u] = max(abs(y - v), abs(x - u)) > 2
    _, expected = site.block.attn(site.x, site.x, site.x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(attention("window(size=5)")(site), expected)


def test_a_borrowed_layer_is_that_layers_own(visual, pixels):
    trunk = encode(visual, pixels)
    for layer in range(len(trunk.sites)):
        borrowed = attention(f"borrow({layer}, of='csa')")(trunk.site())
        assert borrowed.equal(attention("csa")(trunk.site(layer)))


def test_heads_one_by_one_add_up_before_the_output_projection(visual, pixels):
    site = encode(visual, pixels).site()
    count = site.v.shape[1]
    parts = [attention(f"heads(keep={head}, of='vanilla')")(site) @ site.v for head in range(count)]
    torch.testing.assert_close(sum(parts), attention("vanilla")(site) @ site.v)
    for head, part in enumerate(parts):
        assert [bool(out.any()) for out in part.unbind(1)] == [other == head for other in range(count)]


def test_an_ensemble_is_the_mean_of_its_members(visual, pixels):
    site = encode(visual, pixels).site()
    one, two = (attention(f"random(n={n}, seed=5)")(site) for n in (1, 2))
    torch.manual_seed(5)
    members = []
    for _ in range(2):
        p = (site.x @ torch.randn(site.x.shape[-1], site.x.shape[-1]) / site.x.shape[-1] ** 0.5).chunk(2, dim=-1)
        members.append(torch.stack([(site.scale * head @ head.mT).softmax(-1) for head in p], dim=1))
    torch.testing.assert_close(one, members[0])
    torch.testing.assert_close(two, (members[0] + members[1]) / 2)
    assert not attention("random(seed=6)")(site).allclose(one)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))
    return tmp_path


def test_a_learned_projection_set_to_the_queries_is_qq(results, visual, pixels):
    site = encode(visual, pixels).site()
    weight, bias = (
        p.detach().chunk(3)[0].contiguous() for p in (site.block.attn.in_proj_weight, site.block.attn.in_proj_bias)
    )
    save_file({"weight": weight, "bias": bias}, results / "q.safetensors")
    torch.testing.assert_close(attention("learned('q.safetensors')")(site), attention("qq")(site))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("projection('x')", "projection by 'x': expected 'identity', 'q', 'k' or 'v'"),
        ("random(n=0)", "random n=0: expected a number of matrices"),
        ("sharpen(tau=0)", "sharpen tau=0: expected a positive number"),
        ("sharpen(tau='a')", "sharpen tau='a': expected a number, such as 2.0"),
        ("sharpen(of='cas')", "unknown attention 'cas'"),
        ("window(True)", "window size=True: expected a number, such as 3"),
        ("learned('torn.safetensors')", "torn.safetensors cannot be read"),
        ("window(size=4)", "window size=4: expected an odd number"),
        ("heads(keep=9)", "heads keep=9: no head 9, expected 0 to 1"),
        ("learned('small.safetensors')", r"small.safetensors is \[2, 2\], expected \[128, 128\]"),
        ("learned('empty.safetensors')", "empty.safetensors holds no bias and no weight"),
    ],
)
def test_what_a_variant_cannot_do_is_one_line(spec, message, results, visual, pixels):
    save_file({"weight": torch.eye(2), "bias": torch.zeros(2)}, results / "small.safetensors")
    save_file({"other": torch.eye(2)}, results / "empty.safetensors")
    (results / "torn.safetensors").write_bytes(b"not safe")
    with pytest.raises(ValueError, match=message) as error:
        attention(spec)(encode(visual, pixels).site())
    assert "\n" not in str(error.value)


def test_a_missing_projection_names_what_makes_it(results):
    with pytest.raises(
        FileNotFoundError, match=r"no learned projection at .*/other\.safetensors: make it with sclip_lab\.fit\.fit"
    ):
        attention("learned('other.safetensors')")
