"""What the bundled model can do, on 300 held-out scenes: README's table and the figures of the model card.

Prints Markdown and writes data/results/bundled.csv. Takes about a minute on two cores.
"""

import pandas as pd
import torch
from setting import markdown

from sclip_lab import Clip, Protocol, attention, compare, dense, encode, load, scenes, summarise, sweep
from sclip_lab.datasets import HELD_OUT, SCENES
from sclip_lab.files import home, replacing
from sclip_lab.images import pixels
from sclip_lab.metrics import invariance, mean, retrieved
from sclip_lab.summary import written

ATTENTIONS = ["vanilla", "identity", "csa", "qq", "kk", "vv"]


@torch.no_grad()
def of_whole_pictures(clip: Clip) -> pd.DataFrame:
    """Recall at 1 of the captions, and invariance of the last layer's attention, on pictures of the training size."""
    side = clip.image_size
    images, _, captions = scenes.draw(SCENES, HELD_OUT, (side, side))
    trunk = encode(clip.visual, pixels(torch.from_numpy(images), clip.mean, clip.std))
    cls = torch.nn.functional.normalize(dense(trunk, "vanilla")[:, 0], dim=-1)
    rows: dict = {f"caption retrieved among {SCENES}": retrieved(cls, clip.encode_text(captions), captions)}
    for name in ("vanilla", "csa"):
        rows[f"invariance of {name}, last layer, heads averaged"] = invariance(attention(name)(trunk.site()).mean(1))
    return pd.DataFrame({name: mean(values) for name, values in rows.items()}, index=["mean", "low", "high"]).T


def main() -> None:
    clip = load("tiny")
    frame = sweep(clip, [f"scenes-{v}" for v in scenes.VOCABULARIES], ATTENTIONS, readouts=["full", "full*2", "bare"])
    parts = {"": frame}
    for part, names in (("things", scenes.THINGS), ("stuff", scenes.STUFF)):
        parts[part] = frame[(frame["dataset"] == "scenes-full") & frame["class"].isin(names)]
    table = pd.concat([summarise(rows).assign(classes=part or "all") for part, rows in parts.items()])
    with replacing(home() / "data" / "results" / "bundled.csv") as temporary:
        table.round(2).to_csv(temporary, index=False)

    print(f"\nBundled model, {SCENES} held-out scenes, protocol {Protocol.for_image_size(clip.image_size)}, ", end="")
    print("mIoU in % with 95 % bootstrap interval over images.\n")
    table["miou"] = written(table)
    table["of"] = table["dataset"].str.removeprefix("scenes-") + table["classes"].map(
        lambda c: "" if c == "all" else f": {c}"
    )
    wide = table.pivot_table(index=["readout", "attention"], columns="of", values="miou", aggfunc="first", sort=False)
    print(markdown(wide.reset_index()), "\n")
    full = frame[frame["dataset"] == "scenes-full"]
    for other in ("vanilla", "identity"):
        print(
            markdown(
                compare(full, "csa", other)[["readout", "a", "b", "difference", "low", "high", "images"]].round(2)
            ),
            "\n",
        )
    print(markdown(of_whole_pictures(clip).round(3).reset_index(names="on 96 x 96 pictures")))


if __name__ == "__main__":
    main()
