import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sclip_lab import protocol as module
from sclip_lab.protocol import Protocol, Stitched, resize, stitch, windows

SMALL = Protocol(short_side=48, crop=32, stride=16, long_side=300)
CASES = [
    pytest.param(SMALL, 8, (60, 81), id="odd"),
    pytest.param(SMALL, 8, (91, 37), id="upright"),
    pytest.param(SMALL, 8, (48, 48), id="square"),
    pytest.param(SMALL, 8, (500, 17), id="elongated-to-the-cap"),
    pytest.param(SMALL, 8, (20, 25), id="enlarged"),
    pytest.param(Protocol(24, crop=32, stride=16), 8, (50, 55), id="smaller-than-crop"),
    pytest.param(Protocol(24, crop=32, stride=16), 8, (50, 155), id="one-side-smaller-than-crop"),
    pytest.param(Protocol(53, crop=37, stride=11), 8, (70, 61), id="not-divisible-by-the-patch"),
    pytest.param(Protocol(48, crop=32, stride=32), 8, (75, 75), id="no-regular-overlap"),
    pytest.param(Protocol(45, crop=0), 8, (63, 100), id="whole"),
]


def authors_loop(scores, protocol, size):
    """The released code's slide_inference on scores [n q i j]: upsample a window, pad it, add, count, resize."""
    factor = min(protocol.short_side / min(size), protocol.long_side / max(size))
    height, width = (int(side * factor + 0.5) for side in size)
    if protocol.crop == 0:
        return F.interpolate(scores, size=size, mode="bilinear")[0]
    crop, stride = protocol.crop, protocol.stride
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    total, count = torch.zeros(scores.shape[1], height, width), torch.zeros(1, height, width)
    for row in range(rows):
        for column in range(columns):
            y2, x2 = min(row * stride + crop, height), min(column * stride + crop, width)
            y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            window = F.interpolate(scores[None, row * columns + column], size=(y2 - y1, x2 - x1), mode="bilinear")[0]
            total += F.pad(window, (x1, width - x2, y1, height - y2))
            count[:, y1:y2, x1:x2] += 1
    return F.interpolate((total / count)[None], size=size, mode="bilinear")[0]


def scores_for(protocol, patch, size, queries=3):
    cut = windows(np.zeros((*size, 3), np.uint8), protocol)
    n, h, w, _ = cut.shape
    return torch.randn(n, queries, h // patch, w // patch, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("protocol", "patch", "size"), CASES)
def test_stitching_equals_the_authors_loop(protocol, patch, size):
    scores = scores_for(protocol, patch, size)
    logits = stitch(scores, protocol, size)
    assert logits.shape == (3, *size)
    torch.testing.assert_close(logits, authors_loop(scores, protocol, size), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("protocol", "size", "count"),
    [  # SCLIP's settings on VOC, COCO, COCO-Stuff and Cityscapes, ClearCLIP's on Cityscapes
        (Protocol(), (375, 500), 6),
        (Protocol(), (480, 640), 6),
        (Protocol(448), (480, 640), 15),
        (Protocol(560), (1024, 2048), 36),
        (Protocol(448, 224, 224), (1024, 2048), 8),
        (Protocol(336, 0), (375, 500), 1),
    ],
)
def test_number_of_windows(protocol, size, count):
    assert len(windows(np.zeros((*size, 3), np.uint8), protocol)) == count


@pytest.mark.parametrize(("protocol", "patch", "size"), CASES)
def test_windows_cover_the_resized_image_and_nothing_else(protocol, patch, size):
    for side in protocol.resized(*size):
        covered = np.zeros(side, bool)
        for start in protocol.starts(side):
            stop = start + protocol.window(side)
            assert 0 <= start < stop <= side
            covered[start:stop] = True
        assert covered.all()


def test_windows_are_cut_row_by_row_from_opencvs_bilinear():
    image = np.random.default_rng(0).integers(0, 256, (60, 81, 3), dtype=np.uint8)
    resized = cv2.resize(image, (65, 48), interpolation=cv2.INTER_LINEAR)  # 81 x 48 / 60 = 64.8
    np.testing.assert_array_equal(resize(image, (48, 65)), resized)
    expected = [resized[y : y + 32, x : x + 32] for y in (0, 16) for x in (0, 16, 32, 33)]
    np.testing.assert_array_equal(windows(image, SMALL), np.stack(expected))


@pytest.mark.parametrize(
    ("size", "expected"),
    # int(side * factor + 0.5), the rule of MMCV's rescale_size
    [((375, 500), (336, 448)), ((500, 375), (448, 336)), ((333, 500), (336, 505)), ((100, 2000), (102, 2048))],
)
def test_resized_size(size, expected):
    assert Protocol().resized(*size) == expected


def test_chunks_of_rows_are_the_same_logits(monkeypatch):
    scores = scores_for(SMALL, 8, (60, 81))
    whole = stitch(scores, SMALL, (60, 81))
    monkeypatch.setattr(module, "CHUNK", 7 * 3 * 81)
    stitched = Stitched(scores, SMALL, (60, 81))
    assert [chunk.shape[1] for chunk in stitched] == [7] * 8 + [4]
    torch.testing.assert_close(torch.cat(list(stitched), dim=1), whole)


def test_str_is_a_key():
    assert str(Protocol()) == "336/224/112"
    assert str(Protocol(crop=0)) == "336/whole"
    assert str(Protocol(long_side=1024)) == "336/224/112/1024"
    assert str(Protocol.for_image_size(224)) == "336/224/112"
    assert Protocol.for_image_size(96) == Protocol(144, 96, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "short_side=0"),
        ({"crop": -1}, "crop=-1"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 112.0}, "stride=112.0"),
        ({"crop": True}, "crop=True"),
        ({"stride": 225}, "stride=225"),
        ({"long_side": 100}, "long_side=100"),
    ],
)
def test_nonsense_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Protocol(**options)
    assert "\n" not in str(error.value)


def test_what_is_stitched_in_inference_mode_leaves_gradients_to_others():
    size = (61, 79)  # of no other test
    with torch.inference_mode():
        stitch(torch.randn(6, 3, 4, 4), SMALL, size)
    scores = torch.randn(6, 3, 4, 4, requires_grad=True)
    stitch(scores, SMALL, size).sum().backward()
    assert scores.grad.isfinite().all()


def test_an_image_that_vanishes_is_refused():
    with pytest.raises(ValueError, match="1 x 9000"):
        windows(np.zeros((1, 9000, 3), np.uint8), Protocol())


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9, 3)), np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8)],
)
def test_an_image_that_was_not_read_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 \[H W 3\]"):
        windows(image, Protocol())


def test_scores_of_another_image_are_refused():
    with pytest.raises(ValueError, match="scores of 2 windows: expected 2 x 4"):
        stitch(torch.zeros(2, 3, 4, 4), SMALL, (60, 81))
