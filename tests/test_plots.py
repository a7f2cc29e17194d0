"""What the plots put on their axes."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sclip_lab import plots

NAMES = ["sky", "grass", "bee", "fish"]
PICTURE = np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def halves():
    """Grass, and a smaller part of bee, and a column nobody knows."""
    labels = np.full((48, 64), 1)
    labels[:, 40:] = 2
    labels[:, -1] = 255
    return labels


def pixels(ax, layer=0):
    return np.asarray(ax.images[layer].get_array())


def legend(ax):
    return {text.get_text(): patch.get_facecolor() for text, patch in legend_entries(ax)}


def legend_entries(ax):
    box = ax.get_legend()
    return zip(box.get_texts(), box.get_patches(), strict=True)


def test_a_class_keeps_its_colour_however_many_there_are_and_no_two_share_one():
    many = plots.palette(171)
    np.testing.assert_array_equal(plots.palette(4), many[:4])
    assert len(np.unique(many.round(2), axis=0)) == 171


def test_colours_of_twenty_classes_differ_for_deuteranopes_too():
    twenty = plots.palette(20)
    for seen in (twenty, plots._deuteranope(twenty)):
        lab = plots._lab(seen)
        assert np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(20, dtype=bool)].min() > 8


def test_deuteranopes_see_greys_as_they_are_and_confuse_red_with_green():
    greys = np.linspace(0, 1, 5)[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(plots._deuteranope(greys), greys, atol=1e-3)
    red, green, blue = plots._deuteranope(np.array([[0.8, 0.2, 0.2], [0.4, 0.5, 0.1], [0.2, 0.2, 0.8]]))
    assert np.linalg.norm(red - green) < 0.2 < np.linalg.norm(red - blue)


def test_image_shows_the_very_pixels_on_the_axes_that_it_gets(ax):
    assert plots.image(PICTURE, ax) is ax
    np.testing.assert_array_equal(pixels(ax), PICTURE)


def test_without_axes_the_current_ones_are_used():
    import matplotlib.pyplot as plt

    current = plt.figure().subplots()
    assert plots.image(PICTURE) is current
    plt.close("all")


def test_label_map_has_the_colours_of_its_classes_and_grey_where_ignored(ax, halves):
    assert plots.labels(halves, NAMES, ax) is ax
    np.testing.assert_allclose(pixels(ax)[0, [0, 50, 63]], [*plots.palette(4)[1:3], plots.GREY])


def test_label_map_names_large_regions_inside_them(ax, halves):
    halves[:2, :2] = 3
    plots.labels(halves, NAMES, ax)
    named = {text.get_text(): halves[tuple(map(round, text.get_position()[::-1]))] for text in ax.texts}
    assert named == {"grass": 1, "bee": 2}


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_label_without_a_name_is_refused(ax, halves, wrong):
    halves[0, 0] = wrong
    with pytest.raises(ValueError, match=f"label {wrong} in a map of 4 names: expected 0 to 3 or 255"):
        plots.labels(halves, NAMES, ax)


def test_overlay_lists_what_is_there_by_area_in_the_colours_of_the_map(ax, halves):
    assert plots.overlay(PICTURE, halves, NAMES, ax) is ax
    assert list(legend(ax)) == ["grass", "bee"]
    np.testing.assert_array_equal(pixels(ax), PICTURE)
    over = pixels(ax, 1)
    np.testing.assert_allclose(over[0, 0, :3], legend(ax)["grass"][:3])
    assert over[0, 0, 3] > 0.3
    assert not over[:, -1, 3].any()


def test_attention_glows_where_the_weights_are_and_leaves_a_grey_picture_elsewhere(ax):
    weights = np.zeros((6, 8), np.float32)
    weights[1, 2] = 1
    assert plots.attention_map(PICTURE, weights, None, ax, "red") is ax
    shown = pixels(ax)
    assert shown.shape == (48, 64, 3)
    red = shown[..., 0] - shown[..., 2]
    assert red[8:16, 16:24].min() > 0.15  # patches are 8 x 8
    far = np.ones((48, 64), bool)
    far[4:20, 12:28] = False
    assert not red[far].any()


def test_one_patch_that_takes_all_attention_does_not_hide_the_rest(ax):
    weights = np.ones((12, 16))
    weights[0, 0] = 1000
    plots.attention_map(PICTURE, weights, None, ax, "red")
    assert (pixels(ax)[24:, :, 0] > 0.9).all()


def test_sources_are_marked_in_the_middle_of_their_patches(ax):
    points = [(1, 2), (5, 7)]
    plots.sources(PICTURE, (6, 8), points, ax)
    marks = [(*line.get_xydata()[0], to_rgb(line.get_color())) for line in ax.lines]
    colours = [to_rgb(colour) for colour in plots.SOURCE_COLOURS]
    assert marks == [(19.5, 11.5, colours[0]), (59.5, 43.5, colours[1])]
    plots.attention_map(PICTURE, np.ones((6, 8)), (5, 7), ax)
    assert ax.lines[-1].get_xydata().tolist() == [[59.5, 43.5]]


def test_like_features_have_like_colours_in_all_maps_whatever_their_order_and_length():
    rng = np.random.default_rng(0)
    features, order = rng.normal(size=(300, 16)) * np.r_[4:1:16j], rng.permutation(300)
    first, second = plots.features_as_colours([features, 3 * features[order]], (15, 20))
    np.testing.assert_allclose(first.reshape(300, 3)[order], second.reshape(300, 3), atol=1e-12)
    (alone,) = plots.features_as_colours([features], (15, 20))
    (shuffled,) = plots.features_as_colours([features[order]], (15, 20))
    np.testing.assert_allclose(alone.reshape(300, 3)[order], shuffled.reshape(300, 3), atol=1e-9)
    assert [(alone == end).sum(axis=(0, 1)).tolist() for end in (0, 1)] == [[3, 3, 3]] * 2  # 1 % at either end


def test_a_figure_is_saved_whole_or_not_at_all_and_twice_the_same(tmp_path, monkeypatch, ax):
    monkeypatch.setenv("SCLIP_HOME", str(tmp_path))
    plots.image(PICTURE, ax)
    plots.save(ax.figure, "00_one")
    plots.save(ax.figure, "00_two")
    one, two = (tmp_path / "figures" / f"{name}.png" for name in ("00_one", "00_two"))
    assert one.read_bytes() == two.read_bytes()
    assert matplotlib.image.imread(one).shape[2] == 4

    def torn(path, **options):
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(ax.figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        plots.save(ax.figure, "00_two")
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in one.parent.iterdir()) == ["00_one.png", "00_two.png"]


def test_nothing_outside_the_axes_is_changed(ax, halves):
    import matplotlib.pyplot as plt

    settings, figures, picture, labels = dict(matplotlib.rcParams), plt.get_fignums(), PICTURE.copy(), halves.copy()
    plots.overlay(PICTURE, halves, NAMES, ax)
    plots.labels(halves, NAMES, ax)
    plots.attention_map(PICTURE, np.ones((6, 8)), (0, 0), ax)
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures
    np.testing.assert_array_equal(PICTURE, picture)
    np.testing.assert_array_equal(halves, labels)
