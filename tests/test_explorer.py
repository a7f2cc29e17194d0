"""The explorer without a browser: what it shows, and what it says when something is wrong."""

import base64
import io
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import with_timms

from sclip_lab import Protocol, load, scenes, segment
from sclip_lab.explorer import explore
from sclip_lab.panels import legend, look, panels, poster, weights
from sclip_lab.plots import palette
from sclip_lab.text import queries

PICTURES = scenes.draw(3, seed=2, size=(80, 100))[0]  # 15 columns but for rounding, and a column that is cut off


@pytest.fixture(scope="module")
def clip():
    return load("tiny")


@pytest.fixture(scope="module")
def subject(clip):
    return look(clip, PICTURES[1], queries(clip, scenes.NAMES))


@pytest.fixture
def explorer(clip):
    return explore(clip, {"a": PICTURES[0], "b": PICTURES[1]}, attentions=("vanilla", "csa"), layers=(0, -1))


def seen(explorer):
    """The pictures in the table, [rows][columns]; text where there is none."""
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', explorer.table.value)
    return [[_decoded(cell) for cell in re.findall(r"<td>(.+?)</td>", row)] for row in rows]


def _decoded(cell):
    data = re.search(r'base64,([^"]+)"', cell)
    return cell if data is None else np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB"))


def test_weights_are_what_torchs_own_attention_averages_over_heads(subject):
    for layer in (0, -1):
        site = subject.trunk.site(layer)
        with torch.no_grad():
            _, expected = site.block.attn(site.x, site.x, site.x, need_weights=True, average_attn_weights=True)
        np.testing.assert_allclose(weights(subject, "vanilla", layer), expected[0, 1:, 1:], atol=1e-6)


def test_segmentation_is_that_of_segment_on_the_whole_picture_in_the_colours_of_the_palette(clip, subject):
    whole = Protocol(short_side=144, crop=0)
    for spec, row in zip(("vanilla", "csa"), panels(subject, ("vanilla", "csa"), (), (0, 0)), strict=True):
        expected = segment(subject.picture, scenes.NAMES, clip, spec, protocol=whole).labels
        np.testing.assert_array_equal(row[-1], (255 * palette(len(scenes.NAMES))[expected]).astype(np.uint8))


def test_legend_has_the_classes_that_are_seen_and_no_others(subject):
    row = panels(subject, ("identity",), (), (0, 0))[0]
    colours = {"#{:02x}{:02x}{:02x}".format(*colour) for colour in np.unique(row[-1].reshape(-1, 3), axis=0)}
    assert len(legend(subject, ("identity",))) == len(colours) > 1


def test_identity_glows_in_the_very_patch_that_is_asked_for(subject):
    rows, cols = subject.trunk.grid
    for patch in [(0, 0), (4, cols - 1), (rows - 1, 2)]:
        ((panel, _),) = panels(subject, ("identity",), (-1,), patch)
        glow = panel[..., 0].astype(int) - panel[..., 2]
        mean = cv2.resize(glow.astype(np.float32), (cols, rows), interpolation=cv2.INTER_AREA)
        assert divmod(int(mean.argmax()), cols) == patch


def test_a_variant_that_fails_in_a_layer_says_so_there_and_spoils_no_other(subject):
    def broken(site):
        raise RuntimeError("not today\nat all")

    (below, top, _), (why, *_), (fine, *_) = panels(subject, ("borrow(layer=3)", broken, "csa"), (0, -1), (1, 1))
    assert below.startswith("layer 3 cannot be read at layer 0 of 6")
    assert isinstance(top, np.ndarray)
    assert why == "not today"
    assert isinstance(fine, np.ndarray)


def test_a_panorama_is_looked_at_in_no_more_than_four_squares(clip):
    wide = look(clip, np.zeros((20, 300, 3), np.uint8), queries(clip, ["sky"]))
    assert wide.trunk.grid[1] * clip.patch == 4 * 144


def test_another_patch_changes_where_it_looks_and_not_the_segmentation(explorer):
    before = seen(explorer)
    explorer.picker.patch = (2, 3)
    for old, new in zip(before, seen(explorer), strict=True):
        assert [np.array_equal(*pair) for pair in zip(old, new, strict=True)] == [False, False, True]
    assert f"row 2, column 3 of {explorer.picker.grid[0]} x" in explorer.status.value


def test_another_picture_is_shown_from_its_middle_and_the_first_is_not_run_again(explorer):
    first, picture = explorer.subject, explorer.picker.picture
    explorer.picker.patch = (2, 3)
    explorer.choice.value = "b"
    assert explorer.picker.picture != picture
    assert explorer.picker.patch == tuple(side // 2 for side in explorer.picker.grid)
    np.testing.assert_array_equal(explorer.subject.picture, look(explorer.clip, PICTURES[1], explorer.words).picture)
    explorer.choice.value = "a"
    assert explorer.subject is first


def test_attentions_and_layers_make_the_rows_and_columns(explorer):
    assert [len(row) for row in seen(explorer)] == [3, 3]
    explorer.attentions.value = "csa(); window(3) ; csa;"
    explorer.layers.value = (1, 2, 5)
    assert re.findall(r'<th scope="row">(.*?)</th>', explorer.table.value) == ["csa", "window(size=3)"]
    assert re.findall(r'<th scope="col">(.*?)</th>', explorer.table.value)[:3] == ["layer 1", "layer 2", "layer 5"]
    assert [len(row) for row in seen(explorer)] == [4, 4]


@pytest.mark.parametrize(
    ("text", "told"), [("cas", "did you mean"), (" ; ", "no attention"), ("window(size=2)", "size")]
)
def test_a_wrong_spec_is_told_in_one_line_and_what_was_seen_stays(explorer, text, told):
    before = explorer.table.value
    explorer.attentions.value = text
    assert told in explorer.status.value
    assert 'role="alert"' in explorer.status.value
    assert "\n" not in explorer.status.value
    assert explorer.table.value == before


def test_a_callable_that_was_given_is_a_row_and_can_be_named_again(clip):
    def uniform(site):
        return torch.ones_like(site.q @ site.k.mT)

    explorer = explore(clip, [PICTURES[0]], attentions=(uniform,), layers=(-1,))
    explorer.attentions.value = "uniform; csa"
    assert [len(row) for row in seen(explorer)] == [2, 2]


def upload(explorer, name, content):
    """As the browser sends it."""
    file = {"name": name, "content": memoryview(content), "type": "", "size": len(content), "last_modified": 0}
    explorer.upload.set_state({"value": [file]})


def test_an_uploaded_picture_is_seen_and_offered(explorer):
    data = io.BytesIO()
    Image.fromarray(PICTURES[2]).save(data, "png")
    upload(explorer, "mine.png", data.getvalue())
    assert explorer.choice.value == "2: mine.png"
    np.testing.assert_array_equal(explorer.subject.picture, look(explorer.clip, PICTURES[2], explorer.words).picture)
    explorer.choice.value = "a"
    explorer.choice.value = "2: mine.png"
    assert "alert" not in explorer.status.value


def _png(picture):
    return cv2.imencode(".png", picture)[1].tobytes()


@pytest.mark.parametrize(
    "content", [b"", b"no picture", _png(PICTURES[0])[:2000], _png(np.zeros((1, 500), np.uint8))],
    ids=["empty", "text", "truncated", "elongated"],
)  # fmt: skip
def test_a_file_that_will_not_do_is_told_in_one_line_and_is_not_offered(explorer, content):
    before = explorer.table.value
    upload(explorer, "<b>.png", content)
    assert re.fullmatch(r'<p role="alert">[^<>\n]*expected[^<>\n]*</p>', explorer.status.value)
    assert " at 0x" not in explorer.status.value
    assert (explorer.table.value, explorer.choice.options) == (before, ("a", "b"))


def test_where_no_widget_can_live_a_picture_of_the_same_is_seen(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/jpeg"} < bundle.keys()
    size = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"]))).size
    assert min(size) > 200
    explorer.picker.patch = (1, 1)
    assert explorer._repr_mimebundle_()["image/jpeg"] != bundle["image/jpeg"]
    figure = poster(explorer.subject, ["csa", "borrow(layer=2)"], (0, 5), (1, 1))
    assert [ax.get_title() for ax in figure.axes[:4]] == ["picture", "layer 0", "layer 5", "segmentation"]
    assert "cannot be read" in figure.axes[4].texts[0].get_text().replace("\n", " ")


def test_every_picture_of_the_table_has_an_alternative_text(explorer):
    alts = re.findall(r'<img alt="([^"]+)"', explorer.table.value)
    assert len(alts) == explorer.table.value.count("<img") == 6
    assert len(set(alts)) == 6


def test_a_tower_of_timm_without_cls_is_explored_as_any(clip, monkeypatch):
    made = explore(with_timms(clip, monkeypatch), {"a": PICTURES[0]}, attentions=("identity", "csa"), layers=(0, -1))
    assert made.layers.options == (0, 1, 2)
    assert all(isinstance(panel, np.ndarray) for row in seen(made) for panel in row)
    (subject,) = made.seen.values()
    np.testing.assert_array_equal(weights(subject, "identity", -1), np.eye(np.prod(subject.trunk.grid)))
