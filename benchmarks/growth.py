"""How time and memory grow with images, variants, queries, the protocol's short side and the pictures' own side.

    python benchmarks/growth.py            on the processor; some minutes

Prints Markdown and writes data/results/growth.csv and figures/benchmarks/growth.png. The model is a ViT-B/16 of random
weights, or SCLIP_MODEL. Time is the least of some rounds in which all cases take turns, on one thread, and is told as a
multiple of the smallest case of its kind; memory is the most that tensors hold, weights left out, and is the same in
every run. An exponent is the slope of a line through the logarithms, its interval the 95 % one of the residuals: it
says how well a power describes the sizes that were tried.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t
from setting import VARIANTS, markdown, measurement, vit_b16, words

from sclip_lab import Clip, Labelling, Protocol, scenes
from sclip_lab.cost import Work, fastest, peak
from sclip_lab.datasets import Dataset
from sclip_lab.files import home, replacing
from sclip_lab.measure import Measurement
from sclip_lab.plots import save
from sclip_lab.protocol import Stitched

LABELLING = Labelling(50, 0.1)
GRID = 14  # patches along a side of a window, as in a ViT-B/16
SIZES = {
    "images": (1, 2, 4, 8),
    "variants": (1, 2, 5, 10, 20),
    "queries": (32, 64, 128, 256, 512),
    "short_side": (224, 336, 448, 560),
    "side": (240, 480, 960, 1920),
}
NAMES = {"short_side": "short side of the protocol", "side": "short side of the picture"}
MEASURES = {"time": "time, in smallest cases", "memory": "memory, MB"}
LOOKS = {"sweep": ("#000000", "s"), "labelling": ("#d55e00", "o")}


def sweep(
    clip: Clip, images: int = 1, variants: int = 1, queries: int = 64, short_side: int = 224, side: int = 480
) -> Work:
    """All that a sweep does with scenes of `side` x 4/3 `side` pixels, one after the other."""
    drawn, keys = [_scene(side, number) for number in range(images)], tuple(map(str, range(images)))
    dataset = Dataset("scenes", "scenes", (), keys, lambda key: drawn[int(key)], LABELLING)
    vocabulary, protocol = words(clip, [1] * queries), Protocol(short_side)
    return partial(one_by_one, measurement(clip, dataset, vocabulary, VARIANTS[:variants], protocol), keys)


def labelling(queries: int = 64, short_side: int = 224, side: int = 480) -> Work:
    """What follows the scores of a picture: stitching and labelling, once."""
    protocol, size = Protocol(short_side), (side, side * 4 // 3)
    windows = prod(len(protocol.starts(length)) for length in protocol.resized(*size))
    scores = 0.03 * torch.randn(windows, queries, GRID, GRID, generator=torch.Generator().manual_seed(0))
    return lambda: LABELLING(Stitched(scores, protocol, size), torch.arange(queries))


def one_by_one(asked: Measurement, keys: Sequence[str]) -> None:
    """Measure pictures on this thread, the only one on which `peak` sees tensors."""
    for key in keys:
        asked.count([asked.read(key)])


def _scene(side: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = scenes.draw(1, 1, (side, side * 4 // 3), start=number)
    return images[0], labels[0]


def measured(clip: Clip, rounds: int = 3) -> pd.DataFrame:
    """One row per part, quantity and size: `time`, a multiple of the smallest size's, and `memory` in MB."""
    asked = [("sweep", *each) for each in SIZES.items()]
    asked += [("labelling", *each) for each in SIZES.items() if each[0] not in ("images", "variants")]
    cases = [(part, quantity, size) for part, quantity, sizes in asked for size in sizes]
    parts: dict[str, Callable[..., Work]] = {"sweep": partial(sweep, clip), "labelling": labelling}
    works = [parts[part](**{quantity: size}) for part, quantity, size in cases]
    table = pd.DataFrame(cases, columns=["part", "quantity", "size"])
    table["memory"] = [peak(work) / 1e6 for work in works]
    table["time"] = fastest(works, rounds)
    table["time"] /= table.groupby(["part", "quantity"])["time"].transform("first")
    return table


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """The `exponent` of each measure in the size, from `low` to `high`."""
    rows = [
        {"part": part, "quantity": quantity, "measure": measure, **exponent(rows["size"], rows[measure])}
        for (part, quantity), rows in table.groupby(["part", "quantity"], sort=False)
        for measure in MEASURES
    ]
    return pd.DataFrame(rows)


def exponent(sizes: pd.Series, values: pd.Series) -> dict[str, float]:
    """The least squares slope of log values in log sizes, and the 95 % interval of its residuals."""
    x, y = np.log(sizes), np.log(values)
    slope, level = np.polyfit(x, y, 1)
    error = np.sqrt(((y - slope * x - level) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    margin = t.ppf(0.975, len(x) - 2) * error
    return {"exponent": slope, "low": slope - margin, "high": slope + margin}


def drawn(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """A column per quantity, a row per measure, both axes logarithmic."""
    figure, grid = plt.subplots(2, len(SIZES), figsize=(14, 5.5), sharex="col", sharey="row", layout="constrained")
    for axes, measure in zip(grid, MEASURES, strict=True):
        for ax, quantity in zip(axes, SIZES, strict=True):
            for part, points in table[table["quantity"] == quantity].groupby("part", sort=False):
                fit = fits[(fits["quantity"] == quantity) & (fits["part"] == part) & (fits["measure"] == measure)]
                _line(ax, str(part), points["size"], points[measure], fit["exponent"].item())
            ax.legend(frameon=False, fontsize=8, loc="upper left")
        axes[0].set_ylabel(MEASURES[measure])
    for ax, quantity in zip(grid[1], SIZES, strict=True):
        ax.set_xlabel(NAMES.get(quantity, quantity))
        ax.set_xticks(SIZES[quantity], SIZES[quantity])
        ax.minorticks_off()
    sns.despine(figure)
    return figure


def _line(ax: Axes, part: str, sizes: pd.Series, values: pd.Series, power: float) -> None:
    colour, marker = LOOKS[part]
    ax.loglog(sizes, values, marker, color=colour, label=f"{part}: {power:z.2f}")
    middle = np.exp(np.log(values).mean() - power * np.log(sizes).mean())
    ax.loglog(sizes, middle * sizes**power, color=colour, linewidth=1)


def main() -> None:
    clip = vit_b16()
    table = measured(clip)
    fits = exponents(table)
    with replacing(home() / "data" / "results" / "growth.csv") as temporary:
        table.round(3).to_csv(temporary, index=False)
    save(drawn(table, fits), "benchmarks/growth")
    print(f"{clip.name}, pictures are scenes of 3 : 4, {LABELLING}, one thread\n")
    print(markdown(table.round(2)), "\n")
    print(markdown(fits.round(2).replace(-0.0, 0.0)))


if __name__ == "__main__":
    main()
