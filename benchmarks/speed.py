"""One variant and twenty, beside the field's way: ratios within one run, on a ViT-B/16.

    python benchmarks/speed.py             on the processor, or on the GPU where there is one; some minutes

Prints tables and writes data/results/speed-DEVICE.csv. Pictures are photographs where SCLIP_PHOTOS names a folder of
them, scenes of VOC's size otherwise; weights are random unless SCLIP_MODEL names some. The plain loop labels the same
pictures once for each of PLAIN, a quarter of the variants, and its seconds are multiplied by four. After each of these
the lab's sweeps and the products of the tower are timed once more. Ratios are taken within such a round, which a
machine's neighbours disturb alike, and medians of the rounds are kept.
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
Setting = tuple[Clip, Dataset, Queries]


def seconds(work: Callable[[], object]) -> float:
    begin = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def sweeps(clip: Clip, dataset: Dataset, vocabulary: Queries) -> dict[str, Callable[[], object]]:
    """What `sweep` does with the pictures for each of the GRIDS."""
    work = partial(measurement, clip, dataset, vocabulary, protocol=PROTOCOL)
    return {name: partial(work(specs, readouts=keys).shard, dataset.keys) for name, (specs, keys) in GRIDS.items()}


@torch.no_grad()
def labels(clip: Clip, dataset: Dataset, vocabulary: Queries, key: str) -> dict[str, torch.Tensor]:
    """Label maps of a picture, by variant."""
    picture, _ = dataset.read(key)
    trunk = trunk_of(clip.visual, picture, PROTOCOL, clip.mean, clip.std)
    stitched = {spec: Stitched(scores(trunk, vocabulary.vectors, spec), PROTOCOL, picture.shape[:2]) for spec in PLAIN}
    return {spec: dataset.labelling(logits, vocabulary.query_class).cpu() for spec, logits in stitched.items()}


def trunk_share(clip: Clip, dataset: Dataset) -> Callable[[], float]:
    """The share of the machine's rate, in the tower's largest product, that the trunk of a picture reaches."""
    picture, device, dtype = dataset.read(dataset.keys[0])[0], clip.device, clip.visual.conv1.weight.dtype
    trunk = torch.no_grad()(partial(trunk_of, clip.visual, picture, PROTOCOL, clip.mean, clip.std))
    operations, rows = flops(trunk), 6 * 197  # the windows of a picture at once
    left, right = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, 768), (768, 3072)))

    def share() -> float:
        rate = 2 * rows * 768 * 3072 / median(seconds(lambda: left @ right) for _ in range(30))
        return operations / median(seconds(trunk) for _ in range(3)) / rate

    return share


def compared(kind: str) -> pd.DataFrame:
    """One row per precision: medians of seconds for all pictures and of ratios, and the share of labels in common."""
    synonyms, labelling = KINDS[kind]
    clips, dataset = {name: vit_b16(dtype) for name, dtype in PRECISIONS.items()}, pictures(PICTURES, labelling)
    exact = clips["float32"]
    vocabulary = words(exact, synonyms)
    works = {name: sweeps(clip, dataset, vocabulary) for name, clip in clips.items()}
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
            took = {grid: seconds(work) for grid, work in works[name].items()}
            rows.append({"precision": name, "plain": spent, **took, "trunk_share": shares[name]()})
    rounds = pd.DataFrame(rows)
    for name, (grid, one) in RATIOS.items():
        rounds[name] = rounds[grid] / rounds[one]
    rounds["plain x 20/twenty"] = len(VARIANTS) * rounds["plain"] / rounds["twenty"]
    table = rounds.groupby("precision", sort=False).median()
    table = table.join(pd.DataFrame(same, columns=["precision", "same_labels"]).groupby("precision").mean())
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
