import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import confusion_matrix

from sclip_lab import metrics

CLASSES = 6


def maps(seed=0, size=(40, 33)):
    random = np.random.default_rng(seed)
    truth = random.integers(0, CLASSES - 1, size)  # the last class is never true
    labels = np.where(random.random(size) < 0.6, truth, random.integers(0, CLASSES, size))
    truth[random.random(size) < 0.1] = 255
    return labels, truth


def image_counts(images=40, seed=0):
    return np.stack([metrics.counts(*maps(seed + index, (5, 5)), CLASSES) for index in range(images)])


@pytest.mark.parametrize(
    "kind", [np.asarray, torch.from_numpy, lambda map_: map_.astype(np.uint8)], ids=["int64", "torch", "uint8"]
)
def test_counts_equal_scikit_learns_confusion_matrix(kind):
    labels, truth = maps()
    seen = truth != 255
    confusion = confusion_matrix(truth[seen], labels[seen], labels=range(CLASSES))
    expected = np.stack([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)], axis=1)
    counts = metrics.counts(kind(labels), kind(truth), CLASSES)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)


def test_counts_of_an_image_without_truth_are_zero():
    assert not metrics.counts(np.zeros((3, 3), int), np.full((3, 3), 255), CLASSES).any()


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], "expected the same shape"),
        ([[0, 6]], [[0, 1]], "labels from 0 to 6: expected 0 to 5"),
        ([[0, 1]], [[0, 6]], "truth from 0 to 6"),
        ([[-1, 1]], [[0, 1]], "labels from -1"),
    ],
)
def test_counts_refuse_what_cannot_be_counted(labels, truth, message):
    with pytest.raises(ValueError, match=message):
        metrics.counts(labels, truth, CLASSES)


def test_iou_is_of_the_data_set_with_absent_classes_left_out():
    # class 0: 3 of 5; class 1: predicted but nowhere true; class 2: absent
    counts = np.array([[[2, 2, 3], [0, 1, 0], [0, 0, 0]], [[1, 1, 2], [0, 0, 0], [0, 0, 0]]]).sum(axis=0)
    np.testing.assert_allclose(metrics.iou(counts), [3 / 5, 0, np.nan])
    assert metrics.miou(counts) == pytest.approx(0.3)
    assert np.isnan(metrics.miou(np.zeros((3, 3))))


@pytest.mark.parametrize("within", [1, 2, 4.3])
def test_borders_are_what_lies_near_another_label_by_scipys_distances(within):
    truth = np.repeat(np.repeat(maps(size=(5, 4))[1], 9, axis=0), 11, axis=1)  # blocks, some of them 255
    apart = np.max([distance_transform_edt(truth == label) for label in np.unique(truth)], axis=0)
    near = metrics.borders(truth, within)
    np.testing.assert_array_equal(near, apart <= within)
    assert 0 < near.mean() < 1


def test_a_picture_of_one_label_has_no_borders():
    assert not metrics.borders(np.full((6, 5), 3), 2).any()


def test_bootstrap_agrees_with_scipys():
    counts = image_counts()

    def statistic(index, axis):
        return metrics.miou(counts[index].sum(axis=axis % index.ndim))

    expected = scipy_bootstrap(
        (np.arange(len(counts)),), statistic, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert metrics.bootstrap(counts, samples=4000) == pytest.approx(expected, abs=0.004)


def test_paired_bootstrap_agrees_with_a_loop():
    counts, other = image_counts(seed=0), image_counts(seed=0)
    other[:, :, 0] = (other[:, :, 0] * 0.8).astype(int)  # fewer hits on the same images
    random, differences = np.random.default_rng(2), []
    for _ in range(4000):
        drawn = random.integers(0, len(counts), len(counts))
        differences.append(metrics.miou(counts[drawn].sum(axis=0)) - metrics.miou(other[drawn].sum(axis=0)))
    low, high = metrics.bootstrap(counts, other, samples=4000)
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.002)
    unpaired = metrics.bootstrap(counts, samples=4000)
    assert high - low < 0.5 * (unpaired[1] - unpaired[0])


def test_bootstrap_is_seeded_and_its_level_counts():
    counts = image_counts()
    assert metrics.bootstrap(counts) == metrics.bootstrap(counts)
    assert metrics.bootstrap(counts) != metrics.bootstrap(counts, seed=1)
    wide, narrow = metrics.bootstrap(counts, level=0.99), metrics.bootstrap(counts, level=0.5)
    assert wide[0] < narrow[0] < metrics.miou(counts.sum(axis=0)) < narrow[1] < wide[1]


def test_bootstrap_refuses_other_images():
    with pytest.raises(ValueError, match="expected the same images"):
        metrics.bootstrap(image_counts(40), image_counts(39))
    with pytest.raises(ValueError, match="at least one image"):
        metrics.bootstrap(np.zeros((0, 3, 3)))


GRID = (3, 4)


def attention(seed=0, heads=2):
    weights = torch.rand(heads, 13, 13, generator=torch.Generator().manual_seed(seed)) ** 3
    return 2 * weights / weights.sum(dim=-1, keepdim=True)  # rows that sum to 2, as CSA's do


def patch_rows(map_):
    """The map between patches as nested lists, rows summing to 1."""
    rows = [row[1:] for row in map_.tolist()[1:]]
    return [[value / sum(row) for value in row] for row in rows]


def by_brute_force(measure):
    return torch.tensor([measure(patch_rows(map_)) for map_ in attention()])


def test_entropy():
    expected = by_brute_force(lambda rows: sum(-value * math.log(value) for row in rows for value in row) / 12)
    torch.testing.assert_close(metrics.entropy(attention()), expected)
    torch.testing.assert_close(metrics.entropy(torch.ones(13, 13)), torch.tensor(math.log(12)))
    assert metrics.entropy(torch.eye(13)) == 0


def test_distance():
    places = [(row, column) for row in range(3) for column in range(4)]

    def mean_distance(rows):
        pairs = [
            (value, math.dist(a, b))
            for a, row in zip(places, rows, strict=True)
            for b, value in zip(places, row, strict=True)
        ]
        return sum(value * apart for value, apart in pairs) / 12

    torch.testing.assert_close(metrics.distance(attention(), GRID), by_brute_force(mean_distance))
    assert metrics.distance(torch.eye(13), GRID) == 0
    with pytest.raises(ValueError, match="for 12 patches"):
        metrics.distance(attention(), (3, 3))


def test_invariance():
    def mean_cosine(rows):
        pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        cosines = [sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) for a, b in pairs]
        return sum(cosines) / len(cosines)

    torch.testing.assert_close(metrics.invariance(attention()), by_brute_force(mean_cosine))
    torch.testing.assert_close(metrics.invariance(torch.ones(13, 13)), torch.tensor(1.0))
    assert metrics.invariance(torch.eye(13)) == 0


def test_alignment():
    labels = [0, 0, 1, 1, 0, 255, 1, 1, 2, 2, 255, 1]

    def share(rows):
        shares = [
            sum(value for value, label in zip(row, labels, strict=True) if label == own)
            for row, own in zip(rows, labels, strict=True)
            if own != 255
        ]
        return sum(shares) / len(shares)

    torch.testing.assert_close(metrics.alignment(attention(), torch.tensor(labels)), by_brute_force(share))
    assert metrics.alignment(torch.eye(13), torch.tensor(labels)) == 1
    assert metrics.alignment(attention(), torch.full((12,), 255)).isnan().all()
    with pytest.raises(ValueError, match="labels of 3 patches for maps of 12"):
        metrics.alignment(attention(), torch.zeros(3))


def test_alignment_of_a_batch_takes_each_images_own_labels():
    weights = torch.stack([attention(0), attention(1)])  # b h n n
    labels = torch.tensor([[0, 0, 1, 1, 0, 2, 1, 1, 2, 2, 2, 1], [1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 255, 0]])
    expected = torch.stack([metrics.alignment(weights[index], labels[index]) for index in range(2)])
    torch.testing.assert_close(metrics.alignment(weights, labels[:, None]), expected)


@pytest.mark.parametrize("shape", [(13, 12), (13,), (2, 2)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected .* n n"):
        metrics.entropy(torch.ones(shape))


@pytest.mark.parametrize("size", [(12, 16), (13, 19), (3, 4)])
def test_patch_labels_are_the_majority(size):
    labels = np.random.default_rng(0).choice([0, 3, 255], size)
    expected = []
    for row in range(3):
        for column in range(4):
            inside = [
                labels[y, x]
                for y in range(size[0])
                for x in range(size[1])
                if y * 3 // size[0] == row and x * 4 // size[1] == column
            ]
            expected.append(min(set(inside), key=lambda label: (-inside.count(label), label)))
    assert metrics.patch_labels(labels, GRID).tolist() == expected


def test_patch_labels_need_a_pixel_a_patch():
    with pytest.raises(ValueError, match=r"shape \[2, 9\]"):
        metrics.patch_labels(np.zeros((2, 9), int), GRID)
