"""Execute notebooks top to bottom, each in a fresh kernel of the interpreter that runs this file.

    python notebooks/run.py NOTEBOOK...              execute copies: build/NAME.ipynb and build/NAME.html
    python notebooks/run.py --refresh NOTEBOOK...    renew the notebooks themselves, unless a cell fails

One line of progress per cell, a table at the end. A cell that fails ends its notebook and shows its source and
traceback; the other notebooks still run, and the exit code is 1. Two runs write the same bytes, as far as the cells do.
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.exporters import HTMLExporter
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode

from sclip_lab.files import replacing

BUILD = Path(__file__).resolve().parent.parent / "build"
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Outcome(NamedTuple):
    """One row of the closing table; `cells` counts those that succeeded."""

    notebook: str
    cells: int
    seconds: float
    failed: bool

    def __str__(self) -> str:
        status = f"failed in cell {self.cells + 1}" if self.failed else "ok"
        return f"{self.notebook:<30}{self.cells:>6}{self.seconds:>10.1f}  {status}"


def read(path: Path) -> NotebookNode:
    """The notebook at `path` without outputs, its metadata the same whoever saved it last."""
    if not path.is_file():
        sys.exit(f"{path}: no such file, expected a notebook (ONLY=00 selects those whose name begins with 00)")
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError as error:
        sys.exit(f"{path}: {str(error).splitlines()[0][:80]}, expected a notebook; is it left over from a merge?")
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def client(notebook: NotebookNode, folder: Path) -> NotebookClient:
    # With no folder to search, the kernel left to find is this interpreter's, whatever kernels the user has installed.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    return NotebookClient(
        notebook,
        km=manager,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=CRITICAL"],  # hide its remarks about sockets; failing cells are no log lines
    )


def execute(notebook: NotebookNode, name: str, folder: Path) -> Outcome:
    """Run the cells in `folder` up to the first that fails; outputs go into `notebook`, progress to the terminal."""
    cells = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    runner = client(notebook, folder)
    begin = perf_counter()
    with TemporaryDirectory() as profile:  # an empty one: no start-up file of the user takes part
        environment = os.environ | {
            "IPYTHONDIR": profile,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONHASHSEED": "0",
        }
        with runner.setup_kernel(cleanup_kc=True, env=environment):
            for count, (index, cell) in enumerate(cells, start=1):
                print(f"  {count:>3}/{len(cells):<3} {cell.source.splitlines()[0]:70.70}", end=" ", flush=True)
                start = perf_counter()
                try:
                    runner.execute_cell(cell, index, execution_count=count)
                except (CellExecutionError, DeadKernelError) as error:
                    reason = str(error) if isinstance(error, CellExecutionError) else f"{cell.source}\n\n{error}"
                    print(f"failed\n\n{strip_ansi(reason)}", flush=True)
                    return Outcome(name, count - 1, perf_counter() - begin, failed=True)
                print(f"{perf_counter() - start:7.1f} s", flush=True)
    return Outcome(name, len(cells), perf_counter() - begin, failed=False)


def still(notebook: NotebookNode) -> None:
    """Keep of a widget the picture that it brings along, and nothing of one that brings none, as a progress bar.

    Without a kernel a widget cannot be drawn, and its id is another one in every run.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) or "image/jpeg" in o.data]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)


def write_html(notebook: NotebookNode, path: Path) -> None:
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def run(path: Path, notebook: NotebookNode, build: Path | None) -> Outcome:
    """Execute `notebook` where `path` lies; write it into `build`, or back to `path` where `build` is None."""
    print(path.stem, flush=True)
    outcome = execute(notebook, path.stem, path.resolve().parent)
    still(notebook)
    if build:
        write_notebook(notebook, build / path.name)
        write_html(notebook, build / f"{path.stem}.html")
    elif not outcome.failed:
        write_notebook(notebook, path)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--refresh", action="store_true", help="renew the notebooks themselves")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for the executed copies (default: build/)")
    arguments = parser.parse_args()
    build = None if arguments.refresh else arguments.build
    notebooks = [(path, read(path)) for path in arguments.notebooks]
    try:
        outcomes = [run(path, notebook, build) for path, notebook in notebooks]
    except KeyboardInterrupt:
        print("\ninterrupted: notebooks not yet finished are as they were", file=sys.stderr)
        return 130
    print(f"\n{'notebook':<30}{'cells':>6}{'seconds':>10}  status", *outcomes, sep="\n")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
