"""Contracts over the registry, so that a new variant is tested by existing; the authors' own weights; specs."""

import copy
import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import REFERENCE

from sclip_lab.attention import _FACTORIES, attention, canonical, csa, variant, variants
from sclip_lab.protocol import Protocol, windows
from sclip_lab.trunk import encode


@pytest.fixture
def registry():
    """The registry, restored afterwards."""
    before = dict(_FACTORIES)
    yield _FACTORIES
    _FACTORIES.clear()
    _FACTORIES.update(before)


@pytest.mark.parametrize("name", variants())
class TestContract:
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


def test_a_callable_passes_through_and_a_factory_stands_for_its_bare_name(visual, pixels):
    def mine(site):
        return site.q

    assert attention(mine) is mine
    assert canonical(mine) == "mine"
    site = encode(visual, pixels).site()
    assert attention(csa)(site).equal(attention("csa")(site))
    assert canonical(attention(csa)) == canonical(csa) == canonical(csa()) == "csa"
    assert canonical(torch.nn.Linear(2, 3)) == "Linear(in_features=2, out_features=3, bias=True)"


@pytest.fixture
def window(registry):
    @variant
    def window(size=3, soft=False):
        return lambda site: torch.full((1,), float(size))

    return window


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("csa()", "csa"),
        (" csa ", "csa"),
        ("window( size = 3 )", "window(size=3)"),
        ("window(5)", "window(size=5)"),
        ("window(soft=True, size=-1)", "window(size=-1, soft=True)"),
        ("window('a')", "window(size='a')"),
    ],
)
def test_canonical(spec, expected, window):
    assert canonical(spec) == expected == canonical(expected)


def test_the_arguments_of_a_spec_reach_the_factory(window):
    assert attention("window(size=7)")(None) == attention(window(7))(None) == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cas", "unknown attention 'cas'.*did you mean 'csa'.*vanilla, identity"),
        ("", "''.*name or a call"),
        ("csa(", r"'csa\('.*name or a call"),
        ("csa + kk", "name or a call with literals"),
        ("sclip.csa", "name or a call with literals"),
        ("window(size=__import__('os').getpid())", "name or a call with literals"),
        ("window(size=n)", "name or a call with literals"),
        ("window(**{'size': 3})", r"unexpected.*'\*\*'"),
        ("window(size=3, size=4)", "name or a call with literals"),
        ("(lambda: 0)()", "name or a call with literals"),
        ("csa(3)", r"csa\(3\).*too many.*expected csa\(\)"),
        ("window(width=3)", r"unexpected.*'width'.*expected window\(size=3, soft=False\)"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(spec, message, window):
    for read in (attention, canonical):
        with pytest.raises(ValueError, match=message) as error:
            read(spec)
        assert "\n" not in str(error.value)


def test_what_is_neither_spec_nor_callable_is_refused():
    with pytest.raises(TypeError, match="3 is neither a spec"):
        attention(3)


def test_a_variant_is_registered_once_by_its_name_and_has_defaults(registry):
    def csa():
        return lambda site: site.q

    def mine():
        return lambda site: site.q

    with pytest.raises(ValueError, match=r"'csa' exists already in sclip_lab\.attention"):
        variant(csa)

    variant(mine)
    with pytest.raises(ValueError, match="'mine' exists already in test_attention"):
        variant(mine)

    def fresh(size):
        return lambda site: site.q

    with pytest.raises(TypeError, match="'size' of variant 'fresh' has no default"):
        variant(fresh)
    assert "fresh" not in variants()


def test_a_notebook_may_run_its_cell_again(registry):
    source = "def mine(size={}):\n    return lambda site: size"
    for size in (1, 2):
        cell = {"__name__": "__main__"}
        exec(source.format(size), cell)
        variant(cell["mine"])
    assert attention("mine")(None) == 2


def test_names_shared_by_function_and_module_mean_the_function_in_every_order_of_import():
    orders = [
        "import sclip_lab",
        "import sclip_lab.attention, sclip_lab.datasets, sclip_lab.segment, sclip_lab.sweep",
        "import sclip_lab.trunk, sclip_lab.attention",
        "from sclip_lab.attention import csa",
        "from sclip_lab import attention\nimport sclip_lab.datasets",
        "import importlib; importlib.import_module('sclip_lab.attention')",
    ]
    script = """
import sys
for order in ORDERS:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sclip_lab"]:
        del sys.modules[name]
    exec(order, {})
    import sclip_lab
    from sclip_lab.attention import csa
    assert sclip_lab.attention("csa").__name__ == csa().__name__ == "csa", order
    for name in sclip_lab.__all__:
        assert callable(getattr(sclip_lab, name)), (order, name)
    assert sclip_lab.scenes.NAMES, order
assert "open_clip" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", script.replace("ORDERS", repr(orders))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
