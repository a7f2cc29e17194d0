"""One variant and twenty, beside the field's way: ratios within one run, on a ViT-B/16.

    python benchmarks/speed.py             on the processor, or on the GPU where there is one; some minutes

Prints tables and writes data/results/speed-DEVICE.csv. Pictures are photographs where SCLIP_PHOTOS names a folder of
them, scenes of VOC's size otherwise; weights are random unless SCLIP_MODEL names some. The plain loop labels the same
pictures once for each of PLAIN, a quarter of the variants; what it takes for one of these, twenty times, stands for
twenty, and labels are compared under these. After each of them the lab's sweeps and the products of the tower are timed
once more. Ratios are taken within such a round, which a machine's neighbours disturb alike, and medians of the rounds
are kept. Operations are torch's count: what nothing but products would cost.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from plain_loop import plain_loop
from setting import STUFF, VARIANTS, VOC, measurement, pictures, vit_b16, words

from sclip_lab import Clip, Labelling, Protocol
from sclip_lab.cost import flops
from sclip_lab.datasets import Dataset
from sclip_lab.files import home, replacing
from sclip_lab.measure import Measurement
from sclip_lab.protocol import Stitched
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import Queries

PICTURES, PROTOCOL, PLAIN = 2, Protocol(), VARIANTS[::4]
KINDS = {"VOC-like, 56 words": (VOC, Labelling(65, 0.1, 0.1)), "COCO-Stuff-like, 171 words": (STUFF, Labelling())}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READOUTS = ("full", "no_mlp", "no_residual", "bare")
GRIDS = {  # attentions, read-outs
    "one": (VARIANTS[:1], READOUTS[:1]),
    "twenty": (VARIANTS, READOUTS[:1]),
    "one_bare": (VARIANTS[:1], READOUTS[-1:]),
    "twenty_bare": (VARIANTS, READOUTS[-1:]),
    "five_by_four": (VARIANTS[:5], READOUTS),
}
RATIOS = {
    "twenty/one": ("twenty", "one"),
    "twenty/one, bare": ("twenty_bare", "one_bare"),
    "five x four/one": ("five_by_four", "one"),
}


def seconds(work: Callable[[], object]) -> float:
    begin = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def measurements(clip: Clip, dataset: Dataset, vocabulary: Queries) -> dict[str, Measurement]:
    """What `sweep` does with pictures for each of the GRIDS."""
    work = partial(measurement, clip, dataset, vocabulary, protocol=PROTOCOL)
    return {name: work(specs, readouts=keys) for name, (specs, keys) in GRIDS.items()}


def operations(works: dict[str, Measurement], key: str) -> dict[str, float]:
    """What each of the GRIDS costs in operations for a picture, over one variant."""
    counted = {name: flops(partial(work.count, [work.read(key)])) for name, work in works.items()}
    return {f"operations, {name}": counted[grid] / counted[one] for name, (grid, one) in RATIOS.items()}


@torch.no_grad()
def labels(clip: Clip, dataset: Dataset, vocabulary: Queries, key: str) -> dict[str, torch.Tensor]:
    """Label maps of a picture, by variant."""
    picture, _ = dataset.read(key)
    trunk = trunk_of(clip.visual, picture, PROTOCOL, clip.mean, clip.std)
    stitched = {spec: Stitched(scores(trunk, vocabulary.vectors, spec), PROTOCOL, picture.shape[:2]) for spec in PLAIN}
    return {spec: dataset.labelling(logits, vocabulary.query_class).cpu() for spec, logits in stitched.items()}


def trunk_share(clip: Clip, dataset: Dataset) -> Callable[[], float]:
    """The share of the machine's rate, in the tower's largest product or a square one, that a trunk reaches."""
    picture, device, dtype = dataset.read(dataset.keys[0])[0], clip.device, clip.visual.conv1.weight.dtype
    trunk = torch.no_grad()(partial(trunk_of, clip.visual, picture, PROTOCOL, clip.mean, clip.std))
    counted, windows = flops(trunk), 6 * 197  # of a picture at once
    products = [
        tuple(torch.randn(size, dtype=dtype, device=device) for size in ((n, k), (k, m)))
        for n, k, m in ((windows, 768, 3072), (2048, 2048, 2048))
    ]

    def rate(left: torch.Tensor, right: torch.Tensor) -> float:
        return 2 * left.numel() * right.shape[1] / median(seconds(lambda: left @ right) for _ in range(30))

    def share() -> float:
        best = max(rate(left, right) for left, right in products)
        return counted / median(seconds(trunk) for _ in range(3)) / best

    return share


def compared(kind: str) -> pd.DataFrame:
    """One row per precision: medians of seconds for all pictures and of ratios, and the share of labels in common."""
    synonyms, labelling = KINDS[kind]
    clips, dataset = {name: vit_b16(dtype) for name, dtype in PRECISIONS.items()}, pictures(PICTURES, labelling)
    exact = clips["float32"]
    vocabulary = words(exact, synonyms)
    works = {name: measurements(clip, dataset, vocabulary) for name, clip in clips.items()}
    shares = {name: trunk_share(clip, dataset) for name, clip in clips.items()}
    own = {(name, key): labels(clip, dataset, vocabulary, key) for name, clip in clips.items() for key in dataset.keys}
    rows, same = [], []
    for spec in PLAIN:
        spent = 0.0
        for key in dataset.keys:
            picture, begin = dataset.read(key)[0], perf_counter()
            plain = plain_loop(exact, picture, vocabulary, spec, PROTOCOL, labelling).cpu()
            spent += perf_counter() - begin
            same += [(name, (own[name, key][spec] == plain).float().mean().item()) for name in clips]
        for name in clips:
            took = {grid: seconds(partial(work.shard, dataset.keys)) for grid, work in works[name].items()}
            rows.append({"precision": name, "plain": spent, **took, "trunk_share": shares[name]()})
    rounds = pd.DataFrame(rows)
    for name, (grid, one) in RATIOS.items():
        rounds[name] = rounds[grid] / rounds[one]
    rounds["plain x 20/twenty"] = len(VARIANTS) * rounds["plain"] / rounds["twenty"]
    table = rounds.groupby("precision", sort=False).median()
    table = table.join(pd.DataFrame(same, columns=["precision", "same_labels"]).groupby("precision").mean())
    table = table.assign(**operations(works["float32"], dataset.keys[0]))
    return table.assign(vocabulary=kind, pictures=f"{PICTURES} {dataset.name}", model=exact.name)


def main() -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"protocol {PROTOCOL}, {device}, {torch.get_num_threads()} threads")
    tables = []
    for kind in KINDS:
        tables.append(compared(kind))
        print(tables[-1].round(4).T.to_string(), flush=True)
    with replacing(home() / "data" / "results" / f"speed-{device.replace(' ', '-')}.csv") as temporary:
        pd.concat(tables).round(4).to_csv(temporary)


if __name__ == "__main__":
    main()
