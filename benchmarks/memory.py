"""What labelling holds in memory beside the released code's one-hot maximum, and whether pictures add up.

    python benchmarks/memory.py            on the processor; two minutes

Prints Markdown and writes data/results/memory.csv, in MB of 10^6 bytes. `tensors`: the most that tensors held at once,
on one thread, pictures and weights left out; the same in every run. `process`: the largest resident set of a process of
its own that does nothing else, with Python, torch, pictures and weights; "nothing" only imports the libraries. There
pictures go side by side, as many as there are threads: one picture holds less than two. It differs from run to run.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage

import pandas as pd
import torch
from growth import one_by_one
from plain_loop import postprocess
from setting import OBJECT, VOC, markdown, measurement, pictures, vit_b16, words

from sclip_lab import Labelling, Protocol
from sclip_lab.cost import peak
from sclip_lab.files import home, replacing
from sclip_lab.measure import Measurement
from sclip_lab.protocol import Stitched

PROTOCOL, SIZE = Protocol(), (480, 640)
QUERY_CLASS = torch.arange(len(OBJECT)).repeat_interleave(torch.tensor(OBJECT))  # 113 queries, 81 classes
LABELLINGS = Labelling(50, 0.1), Labelling()
PICTURES = 1, 4, 16


def lab(labelling: Labelling) -> torch.Tensor:
    """Labels from the patch scores of six windows, stitching included."""
    scores = 0.03 * torch.randn(6, len(QUERY_CLASS), 14, 14, generator=torch.Generator().manual_seed(0))
    return labelling(Stitched(scores, PROTOCOL, SIZE), QUERY_CLASS)


def one_hot(labelling: Labelling, size: tuple[int, int] = SIZE) -> float:
    """Bytes at the peak of the released code's way, from logits that are stitched already.

    What it holds is a constant and a multiple of the pixels, so that two small pictures tell it for any size, and the
    11 GB need not be there.
    """
    (few, less), (many, more) = (
        (h * w, peak(partial(postprocess, torch.rand(len(QUERY_CLASS), h, w), QUERY_CLASS, labelling)))
        for h, w in ((24, 32), (48, 64))
    )
    return less + (more - less) * (size[0] * size[1] - few) / (many - few)


def sweep(number: int) -> None:
    """One variant on so many pictures, as a sweep does it."""
    asked, keys = _asked(number)
    asked.shard(keys)


def _asked(number: int) -> tuple[Measurement, Sequence[str]]:
    clip, dataset = vit_b16(), pictures(number, Labelling(65, 0.1, 0.1))
    return measurement(clip, dataset, words(clip, VOC), ("csa",), PROTOCOL), dataset.keys


def nothing() -> None:
    """What is there before anything is done."""


def of_a_process(work: Callable[[], object]) -> int:
    """Bytes of the largest resident set of a new process that does the work."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_resident, work).result()


def _resident(work: Callable[[], object]) -> int:
    work()
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    # A new process begins with the largest set of the one that starts it: those come first.
    works: dict[str, Callable[[], object]] = {"nothing": nothing}
    works |= {f"lab {each}": partial(lab, each) for each in LABELLINGS}
    works |= {f"sweep {number}": partial(sweep, number) for number in PICTURES}
    process = {name: of_a_process(work) for name, work in works.items()}

    tensors: dict[str, float] = {}
    for each in LABELLINGS:
        tensors |= {f"one-hot {each}": one_hot(each), f"lab {each}": peak(partial(lab, each))}
    for number in PICTURES:
        asked, keys = _asked(number)
        list(map(asked.read, keys))  # scenes keep the textures that they draw for the first time
        tensors[f"sweep {number}"] = peak(partial(one_by_one, asked, keys))
    table = (pd.DataFrame({"tensors": tensors, "process": process}) / 1e6).rename_axis("what")
    with replacing(home() / "data" / "results" / "memory.csv") as temporary:
        table.round(1).to_csv(temporary)
    print(markdown(table.round(1).astype(object).fillna("").reset_index()))


if __name__ == "__main__":
    main()
