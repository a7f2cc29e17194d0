"""One variant and twenty, beside the field's way: ratios within one run, on a ViT-B/16.

    python benchmarks/speed.py             on the processor, or on the GPU where there is one; some minutes

Prints Markdown and writes data/results/speed-DEVICE.csv. Pictures are photographs where SCLIP_PHOTOS names a folder of
them, scenes of VOC's size otherwise; weights are random unless SCLIP_MODEL names some. The plain loop runs once per
variant; between its variants the lab's two sweeps are timed again and again, and the median is taken.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter

import pandas as pd
import torch
from plain_loop import plain_loop
from setting import STUFF, VARIANTS, VOC, pictures, vit_b16, words

from sclip_lab import Clip, Labelling, Protocol, Readout, attention
from sclip_lab.cost import flops
from sclip_lab.datasets import Dataset
from sclip_lab.files import home, replacing
from sclip_lab.measure import Measurement
from sclip_lab.protocol import Stitched
from sclip_lab.segment import scores, trunk_of
from sclip_lab.text import Queries

PICTURES, PLAIN_BETWEEN = 1, 4
KINDS = {"VOC-like, 56 words": (VOC, Labelling(65, 0.1, 0.1)), "COCO-Stuff-like, 171 words": (STUFF, Labelling())}
PROTOCOL = Protocol()


def seconds(work: Callable[[], object]) -> float:
    begin = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def swept(clip: Clip, dataset: Dataset, vocabulary: Queries, variants: tuple[str, ...]) -> Measurement:
    """What `sweep` does with the pictures, words being known."""
    wanted = ((attention(spec), Readout(), (-1,), None) for spec in variants)
    return Measurement.of(clip, clip.name, PROTOCOL, product(wanted, [(dataset, vocabulary)]), strict=True)


@torch.no_grad()
def labels(clip: Clip, dataset: Dataset, vocabulary: Queries, spec: str, key: str) -> torch.Tensor:
    picture, _ = dataset.read(key)
    trunk = trunk_of(clip.visual, picture, PROTOCOL, clip.mean, clip.std)
    stitched = Stitched(scores(trunk, vocabulary.vectors, spec), PROTOCOL, picture.shape[:2])
    return dataset.labelling(stitched, vocabulary.query_class)


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The machine's operations per second in the largest product of the tower, the windows of a picture at once."""
    left, right = (torch.randn(size, dtype=dtype, device=device) for size in ((6 * 197, 768), (768, 3072)))
    return 2 * 6 * 197 * 768 * 3072 / median(seconds(lambda: left @ right) for _ in range(50))


def timed(clip: Clip, dataset: Dataset, vocabulary: Queries) -> dict[str, float]:
    """Seconds of one variant and of twenty, and the share of the machine's rate that the trunk of a picture reaches."""
    image, _ = dataset.read(dataset.keys[0])
    trunk = torch.no_grad()(partial(trunk_of, clip.visual, image, PROTOCOL, clip.mean, clip.std))
    rate = flops(trunk) / seconds(trunk)
    one, twenty = (swept(clip, dataset, vocabulary, VARIANTS[:number]) for number in (1, len(VARIANTS)))
    return {
        "one": seconds(lambda: one.shard(dataset.keys)),
        "twenty": seconds(lambda: twenty.shard(dataset.keys)),
        "trunk_share": rate / product_rate(clip.visual.conv1.weight.dtype, clip.device),
    }


def compared(kind: str) -> pd.DataFrame:
    """One row per precision, seconds for all pictures."""
    synonyms, labelling = KINDS[kind]
    exact, dataset = vit_b16(), pictures(PICTURES, labelling)
    clips, vocabulary = {"float32": exact, "bfloat16": vit_b16(torch.bfloat16)}, words(exact, synonyms)
    spent, rounds, same = 0.0, [], []
    for number, spec in enumerate(VARIANTS, start=1):
        for key in dataset.keys:
            image, begin = dataset.read(key)[0], perf_counter()
            plain = plain_loop(exact, image, vocabulary, spec, PROTOCOL, labelling).cpu()
            spent += perf_counter() - begin
            for name, clip in clips.items():
                own = labels(clip, dataset, vocabulary, spec, key).cpu()
                same.append({"precision": name, "same_labels": (own == plain).float().mean().item()})
        if number % PLAIN_BETWEEN == 0:
            rounds += [{"precision": name, **timed(clip, dataset, vocabulary)} for name, clip in clips.items()]
    table = pd.DataFrame(rounds).groupby("precision", sort=False).median()
    table = table.join(pd.DataFrame(same).groupby("precision").mean())
    table["twenty_over_one"] = table["twenty"] / table["one"]
    table["plain_over_twenty"] = spent / table["twenty"]
    return table.assign(vocabulary=kind, pictures=f"{PICTURES} {dataset.name}", model=exact.name, plain=spent)


def main() -> None:
    table = pd.concat(map(compared, KINDS)).reset_index()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with replacing(home() / "data" / "results" / f"speed-{device.replace(' ', '-')}.csv") as temporary:
        table.round(4).to_csv(temporary, index=False)
    shown = ["vocabulary", "precision", "twenty_over_one", "plain_over_twenty", "trunk_share", "same_labels"]
    print(
        f"{table['model'][0]}, {table['pictures'][0]}, protocol {PROTOCOL}, {device}, {torch.get_num_threads()} threads"
    )
    print(table[shown].round(4).to_string(index=False))


if __name__ == "__main__":
    main()
