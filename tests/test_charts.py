"""What the charts put on their axes, and that a variant looks the same in all of them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from sclip_lab import charts, plots, variants

TABLE = pd.DataFrame({"attention": "window(size=3)", "size": [5, 1, 3], "miou": [3.0, 1, 2], "low": [2.5, 0, 1]})
TABLE["high"] = TABLE["miou"] + 0.5


@pytest.fixture
def ax():
    return Figure().subplots()


def test_no_two_variants_look_alike_to_normal_eyes_or_deuteranopes_unless_one_is_made_of_the_other():
    from sclip_lab.registry import base

    names = sorted({base(name) for name in variants()} | {"uniform"})
    assert len({charts.marker(name) for name in names}) == len(names)
    colours = np.array([to_rgb(charts.colour(name)) for name in names])
    for seen in (colours, plots._deuteranope(colours)):
        lab = plots._lab(seen)
        assert np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(len(names), dtype=bool)].min() > 8


@pytest.mark.parametrize(
    ("name", "same"),
    [("SCLIP", "csa"), ("CLIP", "vanilla"), ("window(size=3, of='csa')", "csa"), ("borrow(layer=0)", "vanilla")],
)
def test_what_is_the_same_or_made_of_it_has_its_look(name, same):
    assert (charts.colour(name), charts.marker(name)) == (charts.colour(same), charts.marker(same))


def test_an_own_variant_has_a_colour_that_stays():
    assert charts.colour("mine") == charts.colour("mine") != charts.colour("csa")


def test_layers_draws_the_mean_over_images_of_each_attention(ax):
    frame = pd.DataFrame({"attention": ["csa"] * 4 + ["qq"] * 4, "layer": [0, 0, 1, 1] * 2, "entropy": range(8)})
    assert charts.layers(frame, "entropy", ax) is ax
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0.5, 2.5], [4.5, 6.5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["csa", "qq"]
    assert charts.layers(frame, "entropy", Figure().subplots(), legend=False).get_legend() is None


def test_intervals_reach_from_low_to_high_and_are_absent_where_unknown(ax):
    known = {"dataset": ["a", "b"], "method": ["CLIP", "CLIP"], "miou": [10.0, 20.0]}
    charts.intervals(pd.DataFrame(known | {"low": [9, 18], "high": [12, 21]}), ax)
    (points,) = ax.containers
    assert points.lines[0].get_xdata().tolist() == [10, 20]
    bars = points.lines[2][0].get_segments()
    assert [bar[:, 0].tolist() for bar in bars] == [[9, 12], [18, 21]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    bare = charts.intervals(pd.DataFrame(known), Figure().subplots())
    assert not np.concatenate(bare.containers[0].lines[2][0].get_segments()).size


def test_a_curve_goes_through_the_means_in_order_and_its_band_is_the_interval(ax):
    charts.curve(TABLE, "size", ax)
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 1], [3, 2], [5, 3]]
    assert to_hex(line.get_color()) == charts.colour("vanilla")
    band = ax.collections[0].get_paths()[0].vertices
    assert {(1, 0), (1, 1.5), (5, 2.5), (5, 3.5)} <= set(map(tuple, band.tolist()))


def test_levels_are_named_lines(ax):
    charts.levels(TABLE.assign(attention=["csa", "identity", "vanilla"]), ax)
    assert [line.get_ydata()[0] for line in ax.lines] == [3, 1, 2]
    assert [(text.get_text(), text.get_position()[1]) for text in ax.texts] == [
        ("csa", 3),
        ("identity", 1),
        ("vanilla", 2),
    ]


def test_every_seed_is_a_point_and_the_line_is_their_mean(ax):
    table = pd.DataFrame({"attention": "random", "n": [1, 1, 8, 8], "miou": [1.0, 3, 4, 6]})
    charts.seeds(table, "n", ax)
    assert [sorted(points.get_offsets()[:, 1].tolist()) for points in ax.collections] == [[1, 3], [4, 6]]
    assert ax.lines[-1].get_ydata().tolist() == [2, 5]


def test_a_heat_map_writes_every_number(ax):
    charts.heat(pd.DataFrame({"full": [1.25, 2.0], "bare": [-3.0, 4.0]}, index=["csa", "kk"]), ax, centre=0)
    assert [text.get_text() for text in ax.texts] == ["1.2", "-3.0", "2.0", "4.0"]


def test_points_against_a_measure(ax):
    table = pd.DataFrame(
        {"attention": ["csa", "csa", "qq"], "layer": [0, 5, 5], "entropy": [1.0, 2, 3], "miou": [4, 5, 6]}
    )
    charts.against(table, "entropy", ax)
    assert [points.get_offsets().tolist() for points in ax.collections] == [[[1, 4], [2, 5]], [[3, 6]]]
    small, large = ax.collections[0].get_sizes()
    assert small < large == ax.collections[1].get_sizes()[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["csa", "qq"]
