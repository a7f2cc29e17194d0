"""Two stages: proposals that are a clustering's, crops of them as they are, labels that sum up what CLIP says."""

import cv2
import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.image import grid_to_graph

from sclip_lab import Clip, load, load_dataset
from sclip_lab.images import pixels
from sclip_lab.two_stage import crops, features, label, proposals
from sclip_lab.zegclip import names

GREY = (0.5, 0.25, 0.75)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return load_dataset("scenes-full", limit=1).read("0")[0]


@pytest.mark.parametrize("number", [1, 2, 7, 10, 30])
def test_proposals_are_the_segments_of_a_clustering_and_their_unions(number: int) -> None:
    found = np.random.default_rng(0).normal(size=(6, 8, 5)).astype(np.float32)
    masks = proposals(found, number)
    assert masks.shape == (number, 6, 8)
    assert len({mask.tobytes() for mask in masks}) == number
    assert all(cv2.connectedComponents(mask, connectivity=4)[0] == 2 for mask in masks)  # and what is outside
    assert masks.any(axis=0).all()
    inside = np.einsum("nij,mij->nm", *2 * [masks.astype(int)])
    size = np.diag(inside)
    assert ((inside == 0) | (inside == np.minimum(size[:, None], size))).all()

    clustering = AgglomerativeClustering(number // 2 + 1, connectivity=grid_to_graph(6, 8))
    segments = clustering.fit_predict(found.reshape(48, 5)).reshape(6, 8)
    assert all((masks == (segments == each)).all(axis=(1, 2)).any() for each in range(number // 2 + 1))
    assert any(mask.all() for mask in masks) == (number % 2 == 1)


@pytest.mark.parametrize("number", [0, 96])
def test_a_number_of_proposals_that_there_is_none_of_is_refused_in_one_line(number: int) -> None:
    with pytest.raises(ValueError, match=rf"number={number} of proposals for 48 patches: expected 1 to 95") as error:
        proposals(np.zeros((6, 8, 5), np.float32), number)
    assert "\n" not in str(error.value)


def test_a_crop_is_the_box_of_its_mask_with_grey_outside_the_mask() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3)).astype(np.uint8)
    mask = np.zeros((12, 15), np.uint8)
    mask[2:6, 7:11] = 1
    mask[2, 7] = 0
    (found,) = crops(image, mask[None], 4, GREY)
    expected = image[2:6, 7:11].copy()
    expected[0, 0] = [128, 64, 191]
    np.testing.assert_array_equal(found, expected)
    (large,) = crops(image, mask[None], 8, GREY)
    np.testing.assert_array_equal(large, cv2.resize(expected, (8, 8)))


def test_the_whole_picture_as_its_only_proposal_is_named_as_clip_names_it(clip: Clip, picture: np.ndarray) -> None:
    texts = names(clip, load_dataset("scenes-full", limit=1).classes)
    shown = torch.from_numpy(cv2.resize(picture, (96, 96)))[None]
    vector = clip.model.encode_image(pixels(shown, clip.mean, clip.std))
    expected = torch.nn.functional.cosine_similarity(vector, texts).argmax()
    assert (label(clip, picture, texts, 1, short_side=144) == expected).all()


def test_a_pixels_name_has_the_largest_sum_of_probabilities(clip: Clip, picture: np.ndarray) -> None:
    texts = names(clip, load_dataset("scenes-full", limit=1).classes)
    found = label(clip, picture, texts, 5, short_side=144)
    assert found.shape == picture.shape[:2]
    sums = torch.zeros(len(texts), *picture.shape[:2])
    for small in proposals(features(clip, picture, 144), 5):
        mask = cv2.resize(small, (213, 160), interpolation=cv2.INTER_NEAREST)
        shown = torch.from_numpy(crops(picture, mask[None], 96, clip.mean))
        vector = torch.nn.functional.normalize(clip.model.encode_image(pixels(shown, clip.mean, clip.std)), dim=-1)
        sums[:, mask > 0] += (clip.model.logit_scale.exp() * texts @ vector[0]).softmax(dim=0)[:, None]
    assert torch.equal(found, sums.argmax(dim=0))
    assert len(found.unique()) > 1
