"""Every variant, and the tokens that `dense` makes with it, against a tower written out by hand.

The oracle is slow and knows nothing of the package, nor of torch but its random numbers: float64 vectors, loops over
images, heads and tokens. Each variant is written from the formula that its docstring opens with.

Letters as in the package: n tokens (CLS first), d width, h heads, c width of a head, e CLIP's embedding.
"""

from dataclasses import dataclass
from functools import cached_property
from math import exp, sqrt

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.numpy import save_file

import sclip_lab

ROWS, COLS, PATCH, WIDTH, HEADS, LAYERS = 3, 4, 8, 24, 2, 4
C, N = WIDTH // HEADS, 1 + ROWS * COLS


# The tower


def linear(x, weight, bias):
    """Tokens [n d], a weight [m d] and a bias [m] -> tokens [n m]."""
    return [np.array([row @ token + offset for row, offset in zip(weight, bias, strict=True)]) for token in x]


def normalised(x, weights, name):
    """LayerNorm of tokens [n d]."""
    result = []
    for token in x:
        mean = sum(token) / len(token)
        variance = sum((value - mean) ** 2 for value in token) / len(token)
        result.append((token - mean) / sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"])
    return result


def quick_gelu(value):
    return value / (1 + exp(-1.702 * value))


def in_heads(x):
    """Tokens [n d] -> [h n c]: the first c values are the first head's."""
    return [[token[head * C : (head + 1) * C] for token in x] for head in range(HEADS)]


@dataclass(frozen=True)
class Place:
    """One image [3 H W] before the last block of `streams`, which hold what entered the blocks so far."""

    weights: dict
    streams: tuple
    image: np.ndarray

    @property
    def name(self):
        return f"transformer.resblocks.{len(self.streams) - 1}"

    @cached_property
    def x(self):
        return normalised(self.streams[-1], self.weights, f"{self.name}.ln_1")

    def projected(self, part):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        weight, bias = (self.weights[f"{self.name}.attn.in_proj_{kind}"][rows] for kind in ("weight", "bias"))
        return in_heads(linear(self.x, weight, bias))

    @cached_property
    def q(self):
        return self.projected(0)

    @cached_property
    def k(self):
        return self.projected(1)

    @cached_property
    def v(self):
        return self.projected(2)

    def at(self, layer):
        return Place(self.weights, self.streams[: layer % LAYERS + 1], self.image)

    def after(self, attend, residual=True, mlp=True, gain=1):
        """The tokens [n d] behind the block, under an attention."""
        weights, name = self.weights, self.name
        attention, x = attend(self), []
        for i in range(N):
            gathered = [sum(attention[head, i, j] * self.v[head][j] for j in range(N)) for head in range(HEADS)]
            x.append(np.concatenate(gathered))
        x = linear(x, weights[f"{name}.attn.out_proj.weight"], weights[f"{name}.attn.out_proj.bias"])
        x = [gain * token + residual * before for token, before in zip(x, self.streams[-1], strict=True)]
        if not mlp:
            return x
        hidden = normalised(x, weights, f"{name}.ln_2")
        hidden = linear(hidden, weights[f"{name}.mlp.c_fc.weight"], weights[f"{name}.mlp.c_fc.bias"])
        hidden = [np.array([quick_gelu(value) for value in token]) for token in hidden]
        hidden = linear(hidden, weights[f"{name}.mlp.c_proj.weight"], weights[f"{name}.mlp.c_proj.bias"])
        return [before + added for before, added in zip(x, hidden, strict=True)]


def entrance(weights, image):
    """An image [3 H W] -> the tokens [n d] that enter the first block."""
    x = [weights["class_embedding"]]
    for row in range(ROWS):
        for col in range(COLS):
            patch = image[:, row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH].ravel()
            x.append(np.array([kernel.ravel() @ patch for kernel in weights["conv1.weight"]]))
    x = [token + place for token, place in zip(x, weights["positional_embedding"], strict=True)]
    return normalised(x, weights, "ln_pre")


def climb(weights, image, replaced):
    """The last block's place, under the attentions {layer: oracle} of the blocks below and CLIP's own elsewhere."""
    streams = (entrance(weights, image),)
    for layer in range(LAYERS - 1):
        place = Place(weights, streams, image)
        streams = (*streams, place.after(replaced.get(layer, vanilla)))
    return Place(weights, streams, image)


def embedded(weights, x):
    """Tokens [n d] behind the last block -> CLIP-space tokens [n e]."""
    return np.stack([token @ weights["proj"] for token in normalised(x, weights, "ln_post")])


def tokens(weights, image, replaced, **readout):
    """CLIP-space tokens [n e]."""
    return embedded(weights, climb(weights, image, replaced).after(replaced.get(LAYERS - 1, vanilla), **readout))


# The variants: place -> weights [h n n]


def correlate(a, b, tau=1.0):
    """softmax(tau s a bᵀ), [h n c] and [h n c] -> [h n n]."""
    weights = np.zeros((HEADS, N, N))
    for head in range(HEADS):
        for i in range(N):
            scores = [tau / sqrt(C) * sum(a[head][i] * b[head][j]) for j in range(N)]
            powers = [exp(score - max(scores)) for score in scores]
            for j in range(N):
                weights[head, i, j] = powers[j] / sum(powers)
    return weights


def vanilla(place):
    return correlate(place.q, place.k)


def identity(place):
    return np.array([[[float(i == j) for j in range(N)] for i in range(N)] for _ in range(HEADS)])


def qq(place):
    return correlate(place.q, place.q)


def kk(place):
    return correlate(place.k, place.k)


def vv(place):
    return correlate(place.v, place.v)


def csa(place):
    return qq(place) + kk(place)


def plain(place):
    """projection("identity"): x itself."""
    heads = in_heads(place.x)
    return correlate(heads, heads)


def random(n, seed):
    """The mean over n projections x W, W of variance 1 / d: torch's own draw, since no formula fixes it."""
    matrices = torch.randn(n, WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)).double().numpy()

    def attend(place):
        total = np.zeros((HEADS, N, N))
        for matrix in matrices:
            p = in_heads(linear(place.x, matrix.T / sqrt(WIDTH), np.zeros(WIDTH)))
            total += correlate(p, p)
        return total / n

    return attend


LEARNED = {
    "weight": np.random.RandomState(2).randn(WIDTH, WIDTH) / sqrt(WIDTH),
    "bias": np.random.RandomState(3).randn(WIDTH) / 4,
}


def learned(place):
    p = in_heads(linear(place.x, LEARNED["weight"], LEARNED["bias"]))
    return correlate(p, p)


def brought_to(rows, totals):
    """Every row of [h n n] brought to the sum of the same row of the other."""
    for head in range(HEADS):
        for i in range(N):
            rows[head, i] *= sum(totals[head, i]) / sum(rows[head, i])
    return rows


def sharpen(tau, of):
    def attend(place):
        weights = of(place)
        powers = np.zeros((HEADS, N, N))
        for head in range(HEADS):
            for i in range(N):
                for j in range(N):
                    powers[head, i, j] = weights[head, i, j] ** tau
        return brought_to(powers, weights)

    return attend


def window(size, of):
    def attend(place):
        weights = of(place)
        near = np.zeros((HEADS, N, N))
        for head in range(HEADS):
            near[head, 0, 0] = weights[head, 0, 0]
            for i in range(1, N):
                (row, col), reach = divmod(i - 1, COLS), (size - 1) / 2
                for j in range(1, N):
                    other_row, other_col = divmod(j - 1, COLS)
                    if abs(row - other_row) <= reach and abs(col - other_col) <= reach:
                        near[head, i, j] = weights[head, i, j]
        return brought_to(near, weights)

    return attend


def borrow(layer, of):
    return lambda place: of(place.at(layer))


def blend(a, b, weight):
    return lambda place: (1 - weight) * a(place) + weight * b(place)


def heads(keep, of):
    def attend(place):
        weights = of(place)
        for head in range(HEADS):
            if head not in keep:
                weights[head] = 0
        return weights

    return attend


def softmax(logits):
    """Rows of [h n n] exponentiated and brought to sum 1; -inf is no weight."""
    weights = np.zeros((HEADS, N, N))
    for head in range(HEADS):
        for i in range(N):
            powers = [exp(logit - max(logits[head][i])) for logit in logits[head][i]]
            for j in range(N):
                weights[head, i, j] = powers[j] / sum(powers)
    return weights


def omega(std):
    """[n n]: the Gaussian of the distance between patches, 0 for CLS."""
    window = np.zeros((N, N))
    for i in range(1, N):
        for j in range(1, N):
            (row, col), (other_row, other_col) = divmod(i - 1, COLS), divmod(j - 1, COLS)
            window[i, j] = exp(-((row - other_row) ** 2 + (col - other_col) ** 2) / (2 * std**2))
    return window


def naclip(std):
    def attend(place):
        k = place.k
        products = [[[sum(k[h][i] * k[h][j]) for j in range(N)] for i in range(N)] for h in range(HEADS)]
        return softmax(np.array(products) / sqrt(C) + omega(std))

    return attend


def nonly(std):
    def attend(place):
        lengths = [
            sqrt(sum(place.q[head][i] ** 2)) * sqrt(sum(place.k[head][j] ** 2))
            for head in range(HEADS)
            for i in range(N)
            for j in range(N)
        ]
        strength = sum(lengths) / len(lengths) / sqrt(C)
        return softmax([strength * omega(std)] * HEADS)

    return attend


def gem(iterations, tau=None):
    def attend(place):
        lengths = [sqrt(sum(token**2)) for token in place.x]
        factor = tau or sum(lengths) / N / sqrt(C)
        total = np.zeros((HEADS, N, N))
        for projected in (place.q, place.k, place.v):
            p = [[value / sqrt(sum(value**2)) for value in head] for head in projected]
            for _ in range(iterations):
                alike = correlate(p, p, tau=factor * sqrt(C))
                p = [[sum(alike[head, i, j] * p[head][j] for j in range(N)) for i in range(N)] for head in range(HEADS)]
                p = [[value / sqrt(sum(value**2)) for value in head] for head in p]
            total += correlate(p, p, tau=factor * sqrt(C))
        return total / 3

    return attend


def cross(of, weight, tau, layers):
    def attend(place):
        crossed = sum(vanilla(place.at(layer)) for layer in layers) / len(layers)
        return tau * ((1 - weight) * of(place) + weight * crossed)

    return attend


def proxy(beta, gamma):
    """By the mean colours of patches."""

    def attend(place):
        colours = []
        for row in range(ROWS):
            for col in range(COLS):
                patch = place.image[:, row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH]
                colours.append(np.array([channel.sum() / PATCH**2 for channel in patch]))
        cosines = np.array([[a @ b / sqrt(a @ a) / sqrt(b @ b) for b in colours] for a in colours])
        logits = np.full((N, N), -np.inf)
        logits[0, 0] = 0
        for i in range(1, N):
            for j in range(1, N):
                logit = gamma * (cosines[i - 1, j - 1] - beta * cosines.mean())
                if logit >= 0 or i == j:
                    logits[i, j] = logit
        return softmax([logits] * HEADS)

    return attend


ORACLES = {
    "vanilla": vanilla,
    "identity": identity,
    "csa": csa,
    "qq": qq,
    "kk": kk,
    "vv": vv,
    "projection": plain,
    "projection(by='q')": qq,
    "projection(by='k')": kk,
    "projection(by='v')": vv,
    "random": random(1, 0),
    "random(n=3, seed=5)": random(3, 5),
    "learned": qq,
    "learned(path='learned.safetensors')": learned,
    "sharpen": lambda place: correlate(place.q, place.k, tau=2),
    "sharpen(tau=0.4, of='kk')": lambda place: correlate(place.k, place.k, tau=0.4),
    "sharpen(tau=3, of='csa')": sharpen(3, csa),
    "window": window(3, vanilla),
    "window(size=1)": identity,
    "window(size=5, of='csa')": window(5, csa),
    "borrow": borrow(2, vanilla),
    "borrow(layer=0, of='csa')": borrow(0, csa),
    "borrow(layer=-2, of='projection')": borrow(-2, plain),
    "blend": blend(qq, kk, 0.5),
    "blend(a='csa', b='borrow(layer=1)', weight=0.3)": blend(csa, borrow(1, vanilla), 0.3),
    "heads": csa,
    "heads(keep=1)": heads([1], csa),
    "heads(keep=(0,), of='sharpen(tau=0.5)')": heads([0], sharpen(0.5, vanilla)),
    "window(size=3, of='sharpen(tau=2, of=\"random(n=2, seed=1)\")')": window(3, sharpen(2, random(2, 1))),
    "naclip": naclip(5),
    "naclip(std=0.8)": naclip(0.8),
    "nonly": nonly(5),
    "nonly(std=2)": nonly(2),
    "gem": gem(1),
    "gem(iterations=2, tau=7)": gem(2, 7),
    "cross": cross(naclip(5), 0.3, 2, [1, 2]),
    "cross(of='qq', weight=0.6, tau=1, layers=(0,))": cross(qq, 0.6, 1, [0]),
    "proxy": proxy(1.2, 3),
    "proxy(beta=0.5, gamma=1)": proxy(0.5, 1),
}


@pytest.fixture(scope="module")
def tower():
    """A random tower in double precision, and its weights as numpy arrays."""
    torch.manual_seed(0)
    size = {"image_size": (ROWS * PATCH, COLS * PATCH), "patch_size": PATCH, "output_dim": 10, "mlp_ratio": 2.0}
    tower = VisionTransformer(**size, width=WIDTH, layers=LAYERS, heads=HEADS, act_layer=QuickGELU)
    for weight in tower.parameters():  # attention and biases that matter
        weight.data += 0.2 * torch.randn_like(weight)
    tower = tower.double().eval().requires_grad_(False)
    return tower, {name: value.numpy() for name, value in tower.state_dict().items()}


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(1).randn(2, 3, ROWS * PATCH, COLS * PATCH)


@pytest.fixture(autouse=True)
def learned_file(tmp_path, monkeypatch):
    save_file(LEARNED, tmp_path / "learned.safetensors")
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path))


def test_every_variant_has_an_oracle():
    assert {spec.partition("(")[0] for spec in ORACLES} == set(sclip_lab.variants())


@pytest.mark.parametrize("spec", ORACLES)
def test_weights(spec, tower, images):
    visual, weights = tower
    trunk = sclip_lab.encode(visual, torch.from_numpy(images))
    found = sclip_lab.attention(spec)(trunk.site()).expand(len(images), HEADS, N, N)
    expected = np.stack([ORACLES[spec](climb(weights, image, {})) for image in images])
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [(-1,), (2, 3)], ids=["last", "last two"])
@pytest.mark.parametrize("spec", ORACLES)
def test_tokens(spec, layers, tower, images):
    visual, weights = tower
    trunk = sclip_lab.encode(visual, torch.from_numpy(images))
    replaced = {layer % LAYERS: ORACLES[spec] for layer in layers}
    expected = np.stack([tokens(weights, image, replaced) for image in images])
    np.testing.assert_allclose(sclip_lab.dense(trunk, spec, layers=layers), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("readout", "kept"),
    {
        "full*2": {"gain": 2},
        "no_mlp": {"mlp": False},
        "no_residual*0.5": {"residual": False, "gain": 0.5},
        "bare": {"residual": False, "mlp": False},
    }.items(),
)
def test_tokens_under_other_readouts(readout, kept, tower, images):
    visual, weights = tower
    trunk = sclip_lab.encode(visual, torch.from_numpy(images))
    expected = np.stack([tokens(weights, image, {LAYERS - 1: csa}, **kept) for image in images])
    np.testing.assert_allclose(sclip_lab.dense(trunk, "csa", readout), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("readout", "gain"), [("beside", 1), ("beside*0.5", 0.5)])
@pytest.mark.parametrize("spec", ["vv", "gem"])
def test_tokens_of_a_path_beside_the_tower(spec, readout, gain, tower, images):
    visual, weights = tower
    trunk, expected = sclip_lab.encode(visual, torch.from_numpy(images)), []
    for image in images:
        place = climb(weights, image, {})
        x = np.array(place.streams[1])
        for layer in (1, 2, 3):
            x = x + place.at(layer).after(ORACLES[spec], residual=False, mlp=False, gain=gain)
        expected.append(embedded(weights, x))
    found = sclip_lab.dense(trunk, spec, readout, layers=(1, 2, 3))
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5, rtol=0)
