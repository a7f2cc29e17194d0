"""ZegCLIP beside a pipeline of two stages: operations and seconds per picture, and their ratios within one run.

    python benchmarks/two_stage.py          some ten minutes, nearly all of them for ViT-B/16

Prints a table and writes data/results/two_stage.csv. ViT-B/16 sees a picture of VOC's size under the authors' protocol,
the bundled model a scene under its own; 20 classes. Time and operations depend on no weight, so that ViT-B/16's are
random unless SCLIP_MODEL names some, and no system is trained. Seconds are those of one thread: the least of five
rounds for the bundled model, of one for ViT-B/16.
"""

from functools import partial

import pandas as pd
import torch
from setting import markdown, vit_b16, words

from sclip_lab import Clip, Protocol, load, scenes, two_stage
from sclip_lab.cost import fastest, flops
from sclip_lab.files import home, replacing
from sclip_lab.splits import SPLITS
from sclip_lab.train_zegclip import PHOTOGRAPHS, RECIPES
from sclip_lab.zegclip import label, zegclip

PROPOSALS, SPLIT = (10, 50, 100), SPLITS["voc20"]


def compared(clip: Clip, size: tuple[int, int], protocol: Protocol, rounds: int) -> pd.DataFrame:
    """A row per system: operations and seconds for a picture of a size, and how many times ZegCLIP's these are."""
    image, texts = scenes.draw(1, 1, size)[0][0], words(clip, [1] * SPLIT.classes).vectors
    works = {"ZegCLIP": partial(label, zegclip(clip).requires_grad_(False), image, texts, SPLIT, protocol)}
    for number in PROPOSALS:
        works[f"two stages, {number} crops"] = partial(two_stage.label, clip, image, texts, number, protocol.short_side)
    operations = [flops(work) / 1e9 for work in works.values()]
    table = pd.DataFrame({"GFLOP": operations, "seconds": fastest(list(works.values()), rounds)}, works)
    times = (table / table.iloc[0]).add_prefix("times ")
    return table.join(times).rename_axis("system").reset_index().assign(model=clip.name, protocol=str(protocol))


@torch.no_grad()
def main() -> None:
    tables = []
    for clip, size, protocol, rounds in (
        (load("tiny"), (160, 213), RECIPES["scenes-full"].protocol, 5),
        (vit_b16(), (375, 500), PHOTOGRAPHS, 1),
    ):
        tables.append(compared(clip, size, protocol, rounds))
        print(markdown(tables[-1].round(2)), flush=True)
    with replacing(home() / "data" / "results" / "two_stage.csv") as temporary:
        pd.concat(tables).round(3).to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
