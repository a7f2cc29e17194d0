"""The repository itself: its declarations agree, its notebooks are executed, its text names no machine."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sclip_lab import canonical

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def by_name(lines):
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


@pytest.fixture(scope="module")
def declared():
    lines = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    return by_name(line for line in lines if not line.startswith(PROJECT["name"]))


@pytest.fixture(scope="module")
def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_environment_is_in_step_with_pyproject(declared):
    python, _, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.removeprefix("python="))
    *named, install = pip["pip"]
    constraint, *named = named
    assert (constraint, install) == ("--constraint constraints.txt", "-e .[dev]")
    owner = {"jupyterlab", "torch", "open-clip-torch", "pandas", "seaborn", "scikit-learn"}
    assert by_name(named) == {name: declared[name] for name in owner}


def test_constraints_pin_what_is_declared(declared, pinned):
    assert not declared.keys() - pinned.keys()
    assert not {name: pinned[name] for name, wanted in declared.items() if not wanted.contains(pinned[name])}


def test_constraints_are_names_and_versions_in_order(pinned):
    assert list(pinned) == sorted(canonicalize_name(name) for name in pinned)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())


def test_torch_pin_is_one_that_torchvision_works_beside(pinned):
    # torch 2.13.0 can resolve to a CPU-only build beside which torchvision cannot be imported.
    assert pinned["torch"] != "2.13.0"


def test_torch_and_torchvision_fit_each_other():
    import torch
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])
    assert nms(boxes, torch.tensor([0.5, 0.9]), iou_threshold=0.5).tolist() == [1]


def test_importing_the_package_and_its_modules_does_not_import_open_clip():
    modules = ", ".join(f"sclip_lab.{path.stem}" for path in (ROOT / "sclip_lab").glob("[!_]*.py"))
    code = f"import sys, {modules}; print('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_make_without_a_target_helps_with_every_target():
    # A `make` that runs these tests hands its flags down; this one is to run as if typed.
    typed = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    assert targets == set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True, env=typed).stdout
    assert set(re.findall(r"^  ([a-z-]+) +\S", shown, re.M)) == targets


def test_notebooks_have_numbers_of_their_own_and_figures_those_of_a_notebook():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert "00" in numbers
    assert len(set(numbers)) == len(numbers)
    assert {path.name[:2] for path in (ROOT / "figures").glob("*.png")} <= set(numbers)


def test_published_rows_name_attentions_that_exist():
    published = pd.read_csv(ROOT / "data" / "paper.csv")["attention"].dropna()
    assert len(published) > 50
    assert all(canonical(spec) == spec for spec in published.unique())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_was_executed_top_to_bottom(path):
    assert path.stat().st_size < 500_000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make refresh`"
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output.evalue for output in outputs if output.output_type == "error"]
    assert not re.search(r" at 0x[0-9a-f]{6}", path.read_text()), "an address in memory, another one in every run"


def test_no_text_in_the_repository_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the repository's files")
    folder = r"(?<![\w.~])/(home|Users|root|work|opt|tmp)/[\w.]"
    registry = r"pypi\.org|pythonhosted\.org|anaconda\.org|download\.pytorch|index[-_]url|find[-_]links"
    names_a_machine = re.compile(f"{folder}|{registry}".encode())
    contents = {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    found = {name: match[0] for name, data in contents.items() if (match := names_a_machine.search(data))}
    assert not found
