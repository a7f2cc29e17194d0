"""Specs, and the registry that they name."""

import subprocess
import sys

import pytest
import torch

from sclip_lab.attention import csa
from sclip_lab.registry import _FACTORIES, attention, base, canonical, variant, variants
from sclip_lab.trunk import encode


@pytest.fixture
def registry():
    """The registry, restored afterwards."""
    before = dict(_FACTORIES)
    yield _FACTORIES
    _FACTORIES.clear()
    _FACTORIES.update(before)


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
def ring(registry):
    @variant
    def ring(size=3, soft=False):
        return lambda site: torch.full((1,), float(size))

    return ring


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("csa()", "csa"),
        (" csa ", "csa"),
        ("ring( size = 3 )", "ring(size=3)"),
        ("ring(5)", "ring(size=5)"),
        ("ring(soft=True, size=-1)", "ring(size=-1, soft=True)"),
        ("ring('a')", "ring(size='a')"),
    ],
)
def test_canonical(spec, expected, ring):
    assert canonical(spec) == expected == canonical(expected)


def test_the_arguments_of_a_spec_reach_the_factory(ring):
    assert attention("ring(size=7)")(None) == attention(ring(7))(None) == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cas", "unknown attention 'cas'.*did you mean 'csa'.*vanilla, identity"),
        ("", "''.*name or a call"),
        ("csa(", r"'csa\('.*name or a call"),
        ("csa + kk", "name or a call with literals"),
        ("sclip.csa", "name or a call with literals"),
        ("ring(size=__import__('os').getpid())", "name or a call with literals"),
        ("ring(size=n)", "name or a call with literals"),
        ("ring(**{'size': 3})", r"unexpected.*'\*\*'"),
        ("ring(size=3, size=4)", "name or a call with literals"),
        ("(lambda: 0)()", "name or a call with literals"),
        ("csa(3)", r"csa\(3\).*too many.*expected csa\(\)"),
        ("ring(width=3)", r"unexpected.*'width'.*expected ring\(size=3, soft=False\)"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(spec, message, ring):
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
    with pytest.raises(ValueError, match="'mine' exists already in test_registry"):
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


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("csa", "csa"),
        ("random(n=8, seed=1)", "random"),
        ("projection('identity')", "projection"),
        ("window", "vanilla"),
        ("sharpen(2, of='csa')", "csa"),
        ("""sharpen(2, "window(of='kk')")""", "kk"),
        ("blend", "blend"),
        ("no spec at all", "no spec at all"),
    ],
)
def test_base(spec, expected):
    assert base(spec) == expected
