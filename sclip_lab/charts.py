"""Charts of what was measured: tidy tables in, Axes out, and one look per variant in all of them.

Axes-level functions: a DataFrame in, `ax` where there is one (else the current axes), the Axes out. Tables are those of
`summarise` and `compare`, or such columns of them as are named.
"""

from typing import Any
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from sclip_lab.registry import base

BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "frameon": False}
METHODS = {"CLIP": "vanilla", "MaskCLIP": "identity", "SCLIP": "csa"}  # attentions that have names of their own

_LOOKS = {
    "vanilla": ("#000000", "s"),
    "identity": ("#0047ab", "o"),
    "csa": ("#d55e00", "D"),
    "blend": ("#ee9f78", "d"),
    "qq": ("#e69f00", "<"),
    "kk": ("#56b4e9", ">"),
    "vv": ("#009e73", "^"),
    "projection": ("#6b3d1e", "P"),
    "random": ("#cc78bc", "X"),
    "learned": ("#f0e442", "*"),
    "naclip": ("#7446ff", "v"),
    "nonly": ("#3a2a80", "8"),
    "gem": ("#7d0f3c", "H"),
    "proxy": ("#4a6b00", "h"),
    "uniform": ("#bbbbbb", "p"),
}
_OTHERS = sns.color_palette("husl", 12)


def colour(attention: str) -> Any:
    """The colour of an attention (or a method of that name) in every chart; what is `of` another has its colour."""
    name = base(METHODS.get(attention, attention))
    return _LOOKS[name][0] if name in _LOOKS else _OTHERS[crc32(name.encode()) % len(_OTHERS)]


def marker(attention: str) -> str:
    """Its marker, so that colours need not be told apart."""
    return _LOOKS.get(base(METHODS.get(attention, attention)), ("", "h"))[1]


def layers(frame: pd.DataFrame, measure: str, ax: Axes | None = None, legend: bool = True) -> Axes:
    """A measure against `layer`, a line per `attention`: mean over images (rows) and its 95 % bootstrap interval."""
    ax = ax or plt.gca()
    names = list(frame["attention"].unique())
    style: dict[str, Any] = {"palette": {n: colour(n) for n in names}, "markers": {n: marker(n) for n in names}}
    style |= {"hue": "attention", "style": "attention", "dashes": False, "n_boot": 500, "seed": 0}
    sns.lineplot(frame, x="layer", y=measure, legend=legend, ax=ax, **style)
    ax.set_xticks(sorted(frame["layer"].unique()))
    sns.despine(ax=ax)
    if legend:
        sns.move_legend(ax, title=None, **BESIDE)
    return ax


def intervals(frame: pd.DataFrame, ax: Axes | None = None, x: str = "miou", row: str = "dataset") -> Axes:
    """`x` of each `dataset` (a row) and `method` (a colour), and its interval from `low` to `high`, where known."""
    ax = ax or plt.gca()
    frame = frame.reindex(columns=[row, "method", x, "low", "high"])
    rows, methods = list(frame[row].unique()), list(frame["method"].unique())
    for place, method in enumerate(methods):
        part = frame[frame["method"] == method]
        height = part[row].map(rows.index).astype(float) + 0.7 * ((place + 0.5) / len(methods) - 0.5)
        ends = [part[x] - part["low"], part["high"] - part[x]]
        ax.errorbar(part[x], height, xerr=ends, fmt=marker(method), color=colour(method), label=method)
    ax.set(xlabel="mIoU, %", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(axis="x", alpha=0.4)
    sns.despine(ax=ax, left=True)
    ax.legend(**BESIDE)
    return ax


def curve(table: pd.DataFrame, x: str, ax: Axes | None = None, label: str | None = None, **line: Any) -> Axes:
    """`miou` against a parameter `x` (a column of numbers), with its interval as a band, in its attention's look.

    `line`: more options for the line, such as linestyle="--".
    """
    ax = ax or plt.gca()
    table = table.sort_values(x)
    name = table["attention"].iloc[0]
    look: dict[str, Any] = {"color": colour(name), "marker": marker(name), "label": label or base(name)}
    ax.plot(table[x], table["miou"], **look, **line)
    ax.fill_between(table[x], table["low"], table["high"], color=look["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel=x, ylabel="mIoU, %")
    sns.despine(ax=ax)
    return ax


def levels(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """`miou` of each attention as a horizontal line with its name at the right end, its interval as a band."""
    ax = ax or plt.gca()
    for row in table.itertuples():
        ax.axhspan(row.low, row.high, color=colour(row.attention), alpha=0.12, linewidth=0)
        ax.axhline(row.miou, color=colour(row.attention), linestyle="--", linewidth=1)
        right = ax.get_yaxis_transform()  # x in the axes' width, y in mIoU
        ax.text(1.01, row.miou, row.attention, color=colour(row.attention), va="center", fontsize=8, transform=right)
    return ax


def seeds(table: pd.DataFrame, x: str, ax: Axes | None = None) -> Axes:
    """`miou` of every seed (a row) at each value of `x`, side by side in a strip, and the mean over seeds as a line."""
    ax = ax or plt.gca()
    values, name = sorted(table[x].unique()), table["attention"].iloc[0]
    for place, value in enumerate(values):
        mious = table.loc[table[x] == value, "miou"]
        beside = place + np.linspace(-0.2, 0.2, len(mious))
        ax.scatter(beside, mious, color=colour(name), marker=marker(name), linewidths=0, zorder=3)
    ax.plot(range(len(values)), table.groupby(x)["miou"].mean().reindex(values), color=colour(name), linewidth=1)
    ax.set_xticks(range(len(values)), values)
    ax.set(xlabel=x, ylabel="mIoU, %")
    sns.despine(ax=ax)
    return ax


def heat(table: pd.DataFrame, ax: Axes | None = None, centre: float | None = None) -> Axes:
    """A table of numbers as a heat map, each written in its cell. `centre`: a value to diverge from, such as 0."""
    ax = ax or plt.gca()
    ramp: dict[str, Any] = {"cmap": "cividis"} if centre is None else {"cmap": "PuOr_r", "center": centre}
    sns.heatmap(table, annot=True, fmt=".1f", cbar=False, linewidths=0.5, annot_kws={"size": 8}, ax=ax, **ramp)
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    return ax


def against(table: pd.DataFrame, measure: str, ax: Axes | None = None, legend: bool = True) -> Axes:
    """`miou` against a measure, a point per row: its look is the attention's, its size says the `layer`."""
    ax = ax or plt.gca()
    top = max(int(table["layer"].max()), 1)
    for name, part in table.groupby("attention", sort=False, observed=True):
        size = 15 + 75 * (part["layer"] / top) ** 2
        look = {"color": colour(str(name)), "marker": marker(str(name)), "alpha": 0.75, "linewidths": 0}
        ax.scatter(part[measure], part["miou"], s=np.asarray(size), label=name, **look)
    ax.set(xlabel=measure, ylabel="mIoU, %")
    sns.despine(ax=ax)
    if legend:
        ax.legend(**BESIDE)
    return ax
