"""MVP-SEG: prompts through the text tower, losses by hand, what it trains, what it leaves alone, what it may see."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from sclip_lab import Clip, Protocol, load, load_dataset, logits
from sclip_lab.crops import Crops
from sclip_lab.datasets import Dataset
from sclip_lab.images import MEAN, STD, pixels
from sclip_lab.losses import exclusive, overlap, presence, presence_of_these, resized
from sclip_lab.mvpseg import Found, Views, inductive, mvpseg, student, taught, words
from sclip_lab.splits import HIDDEN, SPLITS
from sclip_lab.training import Schedule, train

SPLIT = SPLITS["scenes"]
VISION = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def small() -> Clip:
    """A random CLIP of two layers."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)
    return Clip("small", model.eval().requires_grad_(False), SimpleTokenizer(context_length=20), MEAN, STD)


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return load_dataset("scenes-full", split="train", limit=4)


def crops(dataset: Dataset) -> Crops:
    return Crops(dataset, SPLIT.inductive, short_side=96, crop=64)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("custom", [False, True])
def test_prompts_that_are_words_give_what_clip_makes_of_these_words(custom: bool) -> None:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval().requires_grad_(False)
    clip = Clip("small", model, SimpleTokenizer(context_length=20), MEAN, STD)
    nn.init.normal_(clip.text.token_embedding.weight)  # so that words differ
    views, templates = Views(clip, 2, 4), ("a photo of a {}", "the best of all {}")
    for view, template in zip(views.tokens.data, templates, strict=True):
        view.copy_(clip.text.token_embedding(clip.tokenizer([template])[0, 1:5]))
    found = views(words(clip, ["cat", "potted plant|fern"]))
    for view, template in zip(found, templates, strict=True):
        cat, plant, fern = clip.encode_text([template.format(word) for word in ("cat", "potted plant", "fern")])
        torch.testing.assert_close(view, torch.stack([cat, F.normalize(plant + fern, dim=0)]))
    assert not torch.allclose(found[0], found[1], atol=0.01)


def test_maps_have_a_logit_per_picture_class_and_patch(small: Clip) -> None:
    asked, shown = words(small, ["cat", "dog", "cow|ox"]), torch.randn(2, 3, 96, 150)
    found, alike = mvpseg(small, views=2)(shown, asked)
    assert (found.maps.shape, found.presence.shape, alike.shape) == ((2, 3, 6, 9), (2, 3), ())
    bare, _ = mvpseg(small, views=1, gamma=None)(shown, asked)
    assert bare.presence is None
    torch.testing.assert_close(bare.at((96, 150)).exp().sum(dim=1), torch.ones(2, 96, 150))


def test_only_prompts_and_temperatures_are_trained(small: Clip) -> None:
    sizes = {name: p.numel() for name, p in mvpseg(small, views=3, length=8).named_parameters()}
    assert sizes == {"views.tokens": 3 * 8 * 32, "log_tau": 1, "refine.view.tokens": 8 * 32, "refine.log_tau": 1}
    assert set(mvpseg(small, views=1, gamma=None).state_dict()) == {"views.tokens", "log_tau"}


def test_maps_are_the_views_added_and_g_the_patches_that_are_most_alike(clip: Clip) -> None:
    model, shown = mvpseg(clip, views=2, length=4, gamma=12.0), torch.randn(1, 3, 96, 96)
    names = model.names(words(clip, ["sky", "grass", "bee"]))
    masks, found = model.masks(shown, names)[0], model.look(shown, names)
    scale = clip.model.logit_scale.exp().item()
    for k in range(3):
        torch.testing.assert_close(found.maps[0, k], (masks[0, k] + masks[1, k]) * scale / 2)
        m = masks[2, k].flatten().tolist()
        shares = [math.exp(12 * value) for value in m]
        pooled = sum(value * share for value, share in zip(m, shares, strict=True)) / sum(shares)
        assert found.presence[0, k].item() == pytest.approx(pooled * scale, rel=1e-4)


def test_patch_features_are_maskclips(clip: Clip, scenes: Dataset) -> None:
    model, image = mvpseg(clip, views=1, gamma=None), scenes.read("0")[0][:96, :96]
    names = model.names(words(clip, scenes.classes)).detach()
    whole = Protocol(96, crop=0)
    expected = logits(clip.visual, image, names[0], "identity", whole, "full", clip.mean, clip.std)
    shown = pixels(torch.from_numpy(image)[None], clip.mean, clip.std)
    ours = F.interpolate(model.masks(shown, names)[:, 0], (96, 96), mode="bilinear")
    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=0)


def test_the_final_map_is_the_fused_one_times_g() -> None:
    torch.manual_seed(0)
    found = Found(torch.randn(2, 3, 4, 4), torch.randn(2, 3))
    shares = F.interpolate(found.maps, (8, 8), mode="bilinear").softmax(dim=1)
    expected = shares * found.presence.sigmoid()[..., None, None]
    torch.testing.assert_close(found.at((8, 8)).exp(), expected)


def test_losses_are_those_computed_by_hand(small: Clip) -> None:
    torch.manual_seed(0)
    logit, truth = torch.randn(2, 4), torch.tensor([[[0, 0], [255, 2]], [[1, 1], [1, 255]]])
    there = {(0, 0), (0, 2), (1, 1)}
    g = {(b, k): 1 / (1 + math.exp(-logit[b, k].item())) for b in range(2) for k in range(4)}
    positive = -sum(math.log(g[at]) for at in there) / 2
    negative = -sum(math.log(1 - g[at]) for at in g if at not in there) / 2
    assert presence_of_these(logit, truth).item() == pytest.approx(positive, rel=1e-5)
    assert presence(logit, truth).item() == pytest.approx(positive + negative, rel=1e-5)
    a, b, c = vectors = torch.randn(3, 5)
    cosines = [(x @ y / (x.norm() * y.norm())).abs().item() for x, y in ((a, b), (a, c), (b, c))]
    assert overlap(vectors).item() == pytest.approx(sum(cosines), rel=1e-5)
    assert overlap(vectors[:1]).item() == 0


def test_the_objective_is_the_paper_s_sum(small: Clip, scenes: Dataset) -> None:
    model = mvpseg(small, views=2)
    images = torch.from_numpy(np.stack([scenes.read(key)[0][:64, :64] for key in "01"]))
    truth = torch.from_numpy(SPLIT.inductive(np.stack([scenes.read(key)[1][:64, :64] for key in "01"])))
    seen = words(small, [scenes.classes[k] for k in SPLIT.seen])
    with torch.no_grad():
        found, alike = model(pixels(images, MEAN, STD), seen)
        shares, g = found.at((64, 64)).exp().tolist(), found.presence.sigmoid().tolist()
    pixel = [(b, y, x) for b in range(2) for y in range(64) for x in range(64) if truth[b, y, x] != 255]
    listed = [math.log(shares[b][int(truth[b, y, x])][y][x]) for b, y, x in pixel]
    segmentation = -sum(listed) / len(listed)
    there = [set(t.unique().tolist()) for t in truth]
    listed = [math.log(g[b][k] if k in there[b] else 1 - g[b][k]) for b in range(2) for k in range(15)]
    expected = segmentation - 0.3 * sum(listed) / 2 + 0.7 * alike.item()
    objective = inductive(small, scenes.classes, SPLIT, presence_weight=0.3, overlap_weight=0.7)
    assert objective(model, images, truth).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("other", [7, 255])
def test_relabelled_unseen_pixels_change_neither_loss_nor_gradient(small: Clip, scenes: Dataset, other: int) -> None:
    images = torch.from_numpy(np.stack([scenes.read(key)[0] for key in scenes.keys]))
    labels = np.stack([scenes.read(key)[1] for key in scenes.keys])
    assert np.isin(labels, SPLIT.unseen).any()
    relabelled = np.where(np.isin(labels, SPLIT.unseen), other, labels).astype(np.uint8)
    model, objective = mvpseg(small), inductive(small, scenes.classes, SPLIT)
    found = []
    for truth in (labels, relabelled):
        loss = objective(model, images, torch.from_numpy(SPLIT.inductive(truth)))
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_clip_stays_as_it_is_and_all_else_learns(small: Clip, scenes: Dataset) -> None:
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    model = mvpseg(small)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, inductive(small, scenes.classes, SPLIT), crops(scenes), Schedule(3, 4, 1e-3, warm_up=0))
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in small.model.parameters())
    assert not small.model.training
    assert all(p.grad is not None and not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_killed_run_resumed_ends_in_the_same_weights(small: Clip, scenes: Dataset, tmp_path: Path) -> None:
    schedule, objective = Schedule(5, 2, 1e-3, warm_up=2), inductive(small, scenes.classes, SPLIT)
    whole, broken, resumed = (mvpseg(small) for _ in range(3))
    expected = train(whole, objective, crops(scenes), schedule)

    def killed(losses: list[float]) -> None:
        if len(losses) == 4:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(broken, objective, crops(scenes), schedule, checkpoint=path, every=3, watch=killed)
    assert np.array_equal(train(resumed, objective, crops(scenes), schedule, checkpoint=path), expected)
    assert torch.equal(weights(resumed), weights(whole))


def test_prompts_must_fit_and_need_a_tower_that_reads_forwards(small: Clip) -> None:
    with pytest.raises(ValueError, match="prompts of 18 tokens before texts of 3: expected 20 in all"):
        mvpseg(small, length=18).names(words(small, ["cat"]))
    text = {**TEXT, "no_causal_mask": True}
    model = open_clip.CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=text)
    with pytest.raises(ValueError, match="model 'other': expected a text tower that reads forwards"):
        mvpseg(dataclasses.replace(small, name="other", model=model))


def test_a_student_begins_as_clip_with_the_views_for_names(clip: Clip) -> None:
    teacher, shown = mvpseg(clip, views=2), torch.randn(2, 3, 96, 96)
    asked = words(clip, ["sky", "grass", "bee"])
    learner = student(clip, prompts=2)
    patches = learner.tower(shown)[1]
    own = teacher.names(asked)[:2].sum(dim=0)
    cosines = torch.einsum("ke,bije->bkij", own / own.norm(dim=-1, keepdim=True), patches)
    maps = learner(shown, teacher.classifier(asked))
    torch.testing.assert_close(maps, clip.model.logit_scale.exp() * cosines, atol=1e-3, rtol=1e-3)


def test_a_student_is_taught_what_its_teacher_makes_of_hidden_pixels_only(clip: Clip, scenes: Dataset) -> None:
    teacher, learner = mvpseg(clip), student(clip)
    images, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*map(scenes.read, scenes.keys), strict=True))
    truth = torch.from_numpy(SPLIT.transductive(labels.numpy()))
    assert (truth == HIDDEN).any()
    seen: list[Tensor] = []

    def watched(maps: Tensor, completed: Tensor) -> Tensor:
        seen.append(completed)
        return exclusive(maps, completed)

    taught(teacher, scenes.classes, SPLIT, watched)(learner, images, truth)
    with torch.no_grad():
        shown = pixels(images, clip.mean, clip.std)
        shares = teacher(shown, words(clip, scenes.classes))[0].at(truth.shape[-2:]).exp()
    shares[:, list(SPLIT.seen)] = -1
    assert torch.equal(seen[0], torch.where(truth == HIDDEN, shares.argmax(dim=1).to(torch.uint8), labels))
    assert all(p.grad is None for p in teacher.parameters())


def test_two_pictures_are_learned_by_heart(clip: Clip, scenes: Dataset) -> None:
    images, truths = (torch.from_numpy(np.stack(parts)) for parts in zip(*map(scenes.read, ("21", "34")), strict=True))
    shown, truth = pixels(images[:, :96, :96], clip.mean, clip.std), truths[:, :96, :96]
    asked, teacher, learner = words(clip, scenes.classes), mvpseg(clip), student(clip)
    texts = teacher.classifier(asked)
    runs = {
        1e-2: (teacher, lambda: teacher(shown, asked)[0].maps),
        2e-3: (learner, lambda: learner(shown, texts)),
    }
    for rate, (model, maps) in runs.items():
        optimiser, right = torch.optim.AdamW(model.parameters(), rate, weight_decay=0), []
        for _ in range(61):
            found = maps()
            loss = exclusive(found, truth)
            right.append((resized(found, (96, 96)).argmax(dim=1) == truth).float().mean().item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert right[0] < 0.5
        assert right[-1] > 0.95
