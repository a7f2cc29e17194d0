import pytest
import torch
import torch.nn.functional as F

from sclip_lab import label as module
from sclip_lab.label import Labelling
from sclip_lab.protocol import Protocol, Stitched, stitch

QUERY_CLASS = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5])


def authors_postprocess(logits, query_class, scale, prob_thd, area_thd):
    """The released code's postprocess_result on cosines [q H W], one-hot maximum over synonyms and all."""
    classes, queries = int(query_class.max()) + 1, len(query_class)
    probabilities = (logits * scale).softmax(0)
    if classes != queries:
        one_hot = F.one_hot(query_class).T.view(classes, queries, 1, 1)
        probabilities = (probabilities.unsqueeze(0) * one_hot).max(1)[0]
    if area_thd is not None:
        predictions = F.one_hot(probabilities.argmax(0), classes).to(probabilities.dtype)
        area = predictions[:, :, 1:].sum((0, 1), keepdim=True)
        area = (area > area_thd * area.sum()).to(probabilities.dtype)
        probabilities[1:] *= area.transpose(0, -1)
    labels = probabilities.argmax(0, keepdim=True)
    labels[probabilities.max(0, keepdim=True)[0] < prob_thd] = 0
    return labels[0]


def cosines(queries, seed=0):
    # Smooth enough to have regions; some words win almost nowhere.
    generator = torch.Generator().manual_seed(seed)
    coarse = (
        torch.randn(1, queries, 6, 7, generator=generator) * 0.02
        + torch.randn(1, queries, 1, 1, generator=generator) * 0.01
    )
    return F.interpolate(coarse, size=(83, 90), mode="bilinear")[0] + 0.2


@pytest.mark.parametrize("query_class", [QUERY_CLASS, torch.arange(11)], ids=["synonyms", "one-word-each"])
@pytest.mark.parametrize("scale", [40, 65])
@pytest.mark.parametrize("prob_thd", [0.0, 0.15, 0.3])
@pytest.mark.parametrize("area_thd", [None, 0.1, 0.3])
def test_labels_equal_the_authors(query_class, scale, prob_thd, area_thd):
    logits = cosines(11)
    labels = Labelling(scale, prob_thd, area_thd)(logits, query_class)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(labels, authors_postprocess(logits, query_class, scale, prob_thd, area_thd))


def test_each_threshold_decides_something_above():
    logits, plain = cosines(11), Labelling()(cosines(11), QUERY_CLASS)
    assert (Labelling(prob_thd=0.15)(logits, QUERY_CLASS) != plain).any()
    assert (Labelling(area_thd=0.1)(logits, QUERY_CLASS) != plain).any()


def test_area_is_counted_before_the_probability_threshold():
    # Class 2 wins two of ten pixels, class 1 eight, all but one of which are unsure.
    logits = torch.full((3, 1, 10), -1.0)
    logits[1, 0, :8], logits[0, 0, :7], logits[2, 0, 8:] = 0.01, 0.0, 1.0
    labels = Labelling(logit_scale=10, prob_thd=0.9, area_thd=0.3)(logits, torch.arange(3))
    assert labels.tolist() == [[0] * 7 + [1, 0, 0]]


def test_area_is_a_share_of_the_foreground_and_dropped_when_exactly_at_the_threshold():
    logits = torch.zeros(3, 1, 9)
    logits[1, 0, :3], logits[2, 0, 3], logits[0, 0, 4:] = 1.0, 1.0, 1.0
    assert Labelling(area_thd=0.25)(logits, torch.arange(3))[0, 3] == 0
    assert Labelling(area_thd=0.24)(logits, torch.arange(3))[0, 3] == 2


@pytest.mark.parametrize("labelling", [Labelling(), Labelling(65, 0.15), Labelling(65, 0.15, 0.2)], ids=str)
def test_rows_may_come_in_chunks(labelling, monkeypatch):
    protocol, size = Protocol(48, crop=32, stride=16), (70, 81)
    scores = torch.randn(6, 11, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.03
    expected = labelling(stitch(scores, protocol, size), QUERY_CLASS)
    assert labelling.area_thd is None or len(expected.unique()) < 6  # classes are dropped
    monkeypatch.setattr("sclip_lab.protocol.CHUNK", 9 * 11 * 81)
    monkeypatch.setattr(module, "ROWS", 13)
    torch.testing.assert_close(labelling(Stitched(scores, protocol, size), QUERY_CLASS), expected)


def test_str_is_a_key():
    assert str(Labelling()) == "40/0"
    assert str(Labelling(65, 0.1, 0.1)) == "65/0.1/0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0}, "logit_scale=0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"prob_thd": 1.5}, "prob_thd=1.5"),
        ({"area_thd": -0.1}, "area_thd=-0.1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Labelling(**options)
