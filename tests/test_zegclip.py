"""ZegCLIP: its parts against slow computations of the same, what it trains, what it leaves alone, what it may see."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from sclip_lab import Clip, Protocol, dense, encode, load, load_dataset
from sclip_lab.crops import Crops
from sclip_lab.datasets import Dataset
from sclip_lab.images import MEAN, STD, pixels
from sclip_lab.losses import non_exclusive
from sclip_lab.splits import HIDDEN, SPLITS, Split
from sclip_lab.training import Schedule, train
from sclip_lab.zegclip import (
    Decoder,
    Descriptor,
    NameAlone,
    aligned,
    inductive,
    label,
    names,
    softmax,
    transductive,
    zegclip,
)

SPLIT = SPLITS["scenes"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def small() -> Clip:
    """A random CLIP of two layers."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    return Clip("small", model.eval().requires_grad_(False), open_clip.SimpleTokenizer(context_length=20), MEAN, STD)


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return load_dataset("scenes-full", split="train", limit=4)


@pytest.fixture(scope="module")
def texts(small: Clip, scenes: Dataset) -> Tensor:
    return names(small, scenes.classes)


def crops(dataset: Dataset, split: Split = SPLIT) -> Crops:
    return Crops(dataset, split.inductive, short_side=96, crop=64)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("describe", [Descriptor, NameAlone])
def test_maps_have_a_logit_per_picture_class_and_patch(
    small: Clip, texts: Tensor, prompts: int, describe: type[nn.Module]
) -> None:
    model = zegclip(small, prompts, describe)
    maps = model(torch.randn(2, 3, 96, 150), texts[:7])
    assert maps.shape == (2, 7, 6, 9)
    assert maps.isfinite().all()


def test_parameters_at_vit_b_16_are_the_published_ones_less_those_that_nothing_reads() -> None:
    with torch.device("meta"):
        tower = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512)
        inherited = [nn.TransformerDecoderLayer(512, 8, 2048) for _ in range(3)]  # the authors derive from it
        others = nn.Linear(1024, 512), nn.Linear(768, 768), nn.LayerNorm(768)  # descriptor; prompts' projection, norm

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    published = size(*inherited, *others) + 12 * 10 * 768
    assert round(published / 1e6, 1) == 13.8  # VOC; with 100 prompts a layer, COCO's 14.6
    assert int((published + 12 * 90 * 768) / 1e5) == 146
    last = inherited[-1]
    values = size(last.multihead_attn) // 2  # of q, k, v and out, the latter two
    idle = size(*(part for layer in inherited for part in (layer.self_attn, layer.norm1)))
    idle += values + size(last.linear1, last.linear2, last.norm2, last.norm3)
    model = type("Model", (), {"visual": tower})
    ours = zegclip(Clip("b16", model, None, MEAN, STD))
    assert size(ours) == published - idle == 8_039_168


def test_without_prompts_the_tower_is_clips_own(clip: Clip) -> None:
    shown = torch.randn(2, 3, 96, 96)
    cls, patches = zegclip(clip, prompts=0).tower(shown)
    tokens = F.normalize(dense(encode(clip.visual, shown), "vanilla"), dim=-1)
    torch.testing.assert_close(cls, clip.model.encode_image(shown, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, 1:], atol=1e-5, rtol=0)


def test_prompts_are_replaced_layer_by_layer(small: Clip) -> None:
    model, visual, shown = zegclip(small, prompts=3), small.visual, torch.randn(2, 3, 64, 64)
    stream = encode(visual, shown).stream[0]
    cls, patches = stream[:, :1], stream[:, 1:]
    for tokens, block in zip(model.prompts.tokens, visual.transformer.resblocks, strict=True):
        own = tokens @ model.prompts.proj.weight.T + model.prompts.proj.bias
        x = block(torch.cat([cls, torch.stack([own, own]), patches], dim=1))
        cls, _, patches = x.split([1, 3, 16], dim=1)
    x = torch.cat([cls, patches], dim=1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    x = visual.ln_post(x) @ visual.proj
    found = model.tower(shown)
    for ours, theirs in zip(found, (x[:, 0], x[:, 1:].unflatten(1, (4, 4))), strict=True):
        torch.testing.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_the_beginning_is_the_authors(clip: Clip) -> None:
    model = zegclip(clip)
    bound, width = (6 / (3 * clip.patch**2 + clip.visual.proj.shape[0])) ** 0.5, clip.visual.proj.shape[0]
    assert 0.98 * bound < model.prompts.tokens.abs().max() <= bound
    assert model.prompts.proj.weight.std().item() == pytest.approx((2 / width) ** 0.5, rel=0.05)  # kaiming, fan out
    linear = [layer for layer in [*model.describe.modules(), *model.decoder.modules()] if isinstance(layer, nn.Linear)]
    assert [layer.weight.std().item() for layer in linear] == pytest.approx([0.02] * len(linear), rel=0.05)
    assert not any(layer.bias.any() for layer in linear)


def test_training_drops_tokens_and_whole_blocks(small: Clip, texts: Tensor) -> None:
    model, images = zegclip(small).train(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    stream = torch.ones(1, 6, small.visual.proj.shape[0])
    assert not torch.equal(model.prompts.into(stream, 0), model.prompts.into(stream, 0))
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    _, times = torch.stack([model(images, texts).detach() for _ in range(60)]).unique(dim=0, return_counts=True)
    assert len(times) == 2  # with the last block, or, one time in ten, without
    assert 1 <= times.min() <= 15


def test_positions_are_resized_bilinearly(small: Clip) -> None:
    flat = dataclasses.replace(small)
    shown = torch.zeros(1, 3, 128, 64)
    native = small.visual.positional_embedding[1:].unflatten(0, (4, 4))  # i j d
    between = torch.empty(8, 4, 64)
    for row in range(8):
        at = min(max((row + 0.5) / 2 - 0.5, 0), 3)
        low = min(int(at), 2)
        between[row] = native[low] * (1 - at + low) + native[low + 1] * (at - low)
    expected = small.visual.ln_pre(between.flatten(0, 1))
    seen: list[Tensor] = []
    handle = small.visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    zegclip(flat, prompts=0).tower(shown)
    handle.remove()
    torch.testing.assert_close(seen[0][0, 1:], expected)


def test_a_query_is_the_name_times_cls_beside_the_name() -> None:
    torch.manual_seed(0)
    describe, t, g = Descriptor(4), torch.randn(3, 4), torch.randn(2, 4)
    weight, bias = describe.linear.weight, describe.linear.bias
    for image in range(2):
        for name in range(3):
            joined = torch.tensor([*(t[name] * g[image]), *t[name]])
            torch.testing.assert_close(describe(t, g)[image, name], weight @ joined + bias)
    assert torch.equal(NameAlone(4)(t, g)[1], t)


def test_decoder_is_torchs_attention_and_its_last_logits() -> None:
    torch.manual_seed(0)
    decoder, queries, patches = Decoder(128).eval(), torch.randn(2, 5, 128), torch.randn(2, 7, 128)
    q = queries
    for layer in decoder.layers:
        attention = nn.MultiheadAttention(128, 2, batch_first=True)
        parts = layer.match.q, layer.match.k, layer.v
        attention.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
        attention.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
        attention.out_proj.load_state_dict(layer.out.state_dict())
        q = F.layer_norm(q + attention(q, patches, patches)[0], [128])
        hidden = (q @ layer.mlp[0].weight.T + layer.mlp[0].bias).clamp(min=0)
        q = F.layer_norm(q + hidden @ layer.mlp[3].weight.T + layer.mlp[3].bias, [128])
    maps, match = decoder(queries, patches), decoder.match
    assert len(decoder.layers) == 2  # the third is the one whose logits are the maps
    for image, name, patch in [(0, 0, 0), (1, 4, 6), (1, 2, 3)]:
        own = match.q.weight @ q[image, name] + match.q.bias
        key = match.k.weight @ patches[image, patch] + match.k.bias
        logits = [(own[part] * key[part]).sum() / math.sqrt(64) for part in (slice(0, 64), slice(64, 128))]
        torch.testing.assert_close(maps[image, name, patch], sum(logits) / 2, atol=1e-4, rtol=1e-4)


def test_the_maps_of_a_class_do_not_depend_on_which_others_are_asked_for(small: Clip, texts: Tensor) -> None:
    model, shown = zegclip(small), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(shown, texts)[:, 3:5], model(shown, texts[3:5]))


@pytest.mark.parametrize("other", [7, 255])
def test_relabelled_unseen_pixels_change_no_weight(small: Clip, scenes: Dataset, texts: Tensor, other: int) -> None:
    def read(key: str) -> tuple[np.ndarray, np.ndarray]:
        image, truth = scenes.read(key)
        return image, np.where(np.isin(truth, SPLIT.unseen), other, truth).astype(np.uint8)

    runs = []
    for dataset in (scenes, dataclasses.replace(scenes, read=read)):
        model = zegclip(small, 2)
        losses = train(model, inductive(small, texts, SPLIT), crops(dataset), Schedule(3, 4, 1e-3, warm_up=0))
        runs.append((losses, weights(model)))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_clip_stays_as_it_is_and_all_else_learns(small: Clip, scenes: Dataset, texts: Tensor) -> None:
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    model = zegclip(small, 2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, inductive(small, texts, SPLIT), crops(scenes), Schedule(3, 4, 1e-3, warm_up=0))
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in small.model.parameters())
    assert not small.model.training
    assert all(p.grad is not None and not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_killed_run_resumed_ends_in_the_same_weights(
    small: Clip, scenes: Dataset, texts: Tensor, tmp_path: Path
) -> None:
    schedule, objective = Schedule(5, 2, 1e-3, warm_up=2), inductive(small, texts, SPLIT)
    whole, broken, resumed = (zegclip(small, 2) for _ in range(3))
    expected = train(whole, objective, crops(scenes), schedule)

    def killed(losses: list[float]) -> None:
        if len(losses) == 4:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(broken, objective, crops(scenes), schedule, checkpoint=path, every=3, watch=killed)
    assert np.array_equal(train(resumed, objective, crops(scenes), schedule, checkpoint=path), expected)
    assert torch.equal(weights(resumed), weights(whole))


def test_two_pictures_are_learned_by_heart(clip: Clip) -> None:
    dataset = load_dataset("scenes-full", split="train")
    model, every = zegclip(clip, begin=aligned), Split("scenes-full", 20, (18,))
    shown = [(image[:96, :96], truth[:96, :96]) for image, truth in map(dataset.read, ("21", "34"))]  # hard ones
    images, truths = (torch.from_numpy(np.stack(parts)) for parts in zip(*shown, strict=True))
    assert not (truths == 18).any()
    texts, optimiser = names(clip, dataset.classes), torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(70):
        loss = non_exclusive(model(pixels(images, clip.mean, clip.std), texts), truths)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = [label(model, image, texts, every, Protocol(96, 96, 48)) for image, _ in shown]
    assert (torch.stack(found) == truths).float().mean() > 0.95


def test_self_training_takes_the_best_unseen_class_for_hidden_pixels_only(small: Clip, texts: Tensor) -> None:
    model, images = zegclip(small), torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    for p in model.decoder.parameters():
        p.data *= 5  # so that maps differ
    labels = np.random.RandomState(0).choice([0, 3, 8, 17, 19, 255], (2, 64, 64)).astype(np.uint8)
    truth = torch.from_numpy(SPLIT.transductive(labels))
    seen: list[Tensor] = []

    def watched(maps: Tensor, completed: Tensor) -> Tensor:
        seen.append(completed)
        return non_exclusive(maps, completed)

    value = transductive(small, texts, SPLIT, watched)(model, images, truth)
    maps = F.interpolate(model(pixels(images, MEAN, STD), texts), (64, 64), mode="bilinear")
    share = maps.sigmoid()
    share[:, list(SPLIT.seen)] = -1
    expected = torch.where(truth == HIDDEN, share.argmax(dim=1).to(torch.uint8), torch.from_numpy(labels))
    assert torch.equal(seen[0], expected)
    assert value.item() == pytest.approx(non_exclusive(maps, expected).item())


@pytest.mark.parametrize(("offset", "probability"), [(0.0, torch.sigmoid), (0.2, torch.sigmoid), (0.1, softmax)])
def test_labels_are_those_of_the_best_class_after_the_offset(
    small: Clip, texts: Tensor, offset: float, probability: partial
) -> None:
    model, image = zegclip(small, seed=1), np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    for p in model.decoder.parameters():
        p.data *= 5  # so that maps differ
    maps = model(pixels(torch.from_numpy(image)[None], MEAN, STD), texts)
    shares = probability(F.interpolate(maps, (64, 64), mode="bilinear"))[0]
    for k in SPLIT.seen:
        shares[k] -= offset
    found = label(model, image, texts, SPLIT, Protocol(64, 64, 32), offset, probability)
    assert torch.equal(found, shares.argmax(dim=0))


def test_an_aligned_beginning_is_clips_own_cosines_but_for_a_factor(clip: Clip) -> None:
    texts, shown = names(clip, load_dataset("scenes-full").classes), torch.randn(2, 3, 96, 96)
    model = zegclip(clip, prompts=0, begin=partial(aligned, gain=2.0))
    patches = model.tower(shown)[1]
    cosines = torch.einsum("ke,bije->bkij", texts, patches)
    found = torch.stack([model(shown, texts).flatten(), cosines.flatten()])
    assert torch.corrcoef(found)[0, 1] > 0.99


def test_one_vector_per_class_is_the_mean_of_its_words(small: Clip) -> None:
    found = names(small, ["cat", "dog|hound"], ["a photo of a {}."])
    cat, dog, hound = small.encode_text([f"a photo of a {word}." for word in ("cat", "dog", "hound")])
    torch.testing.assert_close(found, torch.stack([cat, F.normalize(dog + hound, dim=0)]))


def test_a_tower_in_half_precision_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model 'tiny@bfloat16': expected open_clip's own ViT, in float32, .*$"):
        zegclip(load("tiny@bfloat16", device="cpu"))
