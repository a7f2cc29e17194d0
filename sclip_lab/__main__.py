"""Commands for people who only want a picture, or the data: `python -m sclip_lab --help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import sclip_lab
from sclip_lab.recipes import command
from sclip_lab.train_mvpseg import MVPSEG
from sclip_lab.train_zegclip import ZEGCLIP

OPENAI = "ViT-B-16-quickgelu:openai"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 1 failed or something is missing, 2 not understood. Errors are one line."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sclip_lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sclip_lab", description=sclip_lab.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="name every pixel of a picture, and write an overlay with a legend")
    segment.add_argument("picture", type=Path)
    segment.add_argument("--classes", required=True, help='"sheep, grass, sky|clouds", or a .txt file of such lines')
    segment.add_argument("--model", default=os.environ.get("SCLIP_MODEL") or OPENAI, help="%(default)s")
    segment.add_argument("--attention", default="csa", help="%(default)s; vanilla is CLIP, identity MaskCLIP")
    segment.add_argument("--readout", default="full", help="%(default)s")
    segment.add_argument("-o", "--output", type=Path, help="a PNG; PICTURE_overlay.png, here, unless given")
    segment.set_defaults(run=_segment)

    data = commands.add_parser("data", help="the benchmarks' data").add_subparsers(required=True, metavar="COMMAND")
    data.add_parser("list", help="the datasets and how the paper evaluates on them").set_defaults(run=_list)
    check = data.add_parser("check", help="say what is there, what is missing and where to get it")
    check.add_argument("root", type=Path, nargs="?", help="the folder of all data; SCLIP_DATA unless given")
    check.add_argument("--only", nargs="+", default=(), metavar="NAME", help="of these datasets")
    check.set_defaults(run=_check)
    get = data.add_parser("get", help="download and unpack a dataset whose owner lets anyone")
    get.add_argument("name")
    get.add_argument("--root", type=Path, help="the folder of all data; SCLIP_DATA unless given")
    get.set_defaults(run=_get)

    train = commands.add_parser("train", help="train a system on the seen classes of a split")
    systems = train.add_subparsers(required=True, metavar="SYSTEM")
    command(systems.add_parser("zegclip", help="ZegCLIP (Zhou et al., CVPR 2023)"), ZEGCLIP)
    command(systems.add_parser("mvpseg", help="MVP-SEG (Guo et al., PRCV 2023)"), MVPSEG)
    return parser


def _segment(options: argparse.Namespace) -> int:
    classes = options.classes if options.classes.endswith(".txt") else _split(options.classes)
    found = sclip_lab.segment(options.picture, classes, options.model, options.attention, options.readout)
    output = options.output or Path(f"{options.picture.stem}_overlay.png")
    found.save(output)
    shares = np.bincount(found.labels.ravel(), minlength=len(found.names)) / found.labels.size
    named = ", ".join(f"{found.names[label]} {shares[label]:.0%}" for label in np.argsort(-shares) if shares[label])
    print(f"{output}: {named} (model {options.model}, attention {options.attention})")
    return 0


def _split(classes: str) -> list[str]:
    return [line.strip() for line in classes.split(",")]


def _list(options: argparse.Namespace) -> int:
    print(sclip_lab.datasets().to_string())
    return 0


def _check(options: argparse.Namespace) -> int:
    from sclip_lab.fetch import check

    found = check(_root(options.root), options.only)
    print("\n".join(map(str, found)))
    return int(any(one.incomplete for one in found))


def _get(options: argparse.Namespace) -> int:
    from sclip_lab.fetch import get

    get(options.name, _root(options.root))
    return 0


def _root(given: Path | None) -> Path:
    folder = given or os.environ.get("SCLIP_DATA")
    if not folder:
        raise ValueError("no folder of data: expected one on the command line, or in SCLIP_DATA")
    return Path(folder).expanduser()


if __name__ == "__main__":
    sys.exit(main())
