"""The notebook runner, as a program, on small notebooks."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

RUNNER = Path(__file__).resolve().parent.parent / "notebooks" / "run.py"


def write(path, *sources, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [new_markdown_cell("A title"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


def command(*arguments):
    return [sys.executable, str(RUNNER), *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, **options)


def streams(path):
    return ["".join(o.text for o in cell.get("outputs", []) if "text" in o) for cell in nbformat.read(path, 4).cells]


def test_copies_are_executed_where_their_notebooks_lie_and_a_failure_stops_no_other(tmp_path):
    folder, build, elsewhere = tmp_path / "notebooks", tmp_path / "build", tmp_path / "elsewhere"
    elsewhere.mkdir()
    good = write(folder / "00_good.ipynb", "import sys\nprint(sys.prefix)", "print(open('beside.txt').read())")
    bad = write(folder / "01_bad.ipynb", "side = 0", "def area():\n    return 1 / side\narea()", "print('never')")
    later = write(
        folder / "02_later.ipynb", "'side' in globals()", "import matplotlib\nprint(matplotlib.get_backend())"
    )
    (folder / "beside.txt").write_text("beside the notebook")
    before = {path: path.read_bytes() for path in (good, bad, later)}
    # Installed by a user for another Python, and a start-up file of theirs: neither may take part.
    spec = {"argv": ["false", "{connection_file}"], "display_name": "Other", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("side = 1")
    user = {"JUPYTER_PATH": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "MPLBACKEND": "agg"}

    done = run("--build", build, good, bad, later, cwd=elsewhere, env=os.environ | user)

    assert done.returncode == 1, done.stderr
    assert streams(build / "00_good.ipynb") == ["", f"{sys.prefix}\n", "beside the notebook\n"]
    assert nbformat.read(build / "02_later.ipynb", 4).cells[1].outputs[0].data["text/plain"] == "False"
    assert streams(build / "02_later.ipynb")[-1] == "module://matplotlib_inline.backend_inline\n"
    assert "return 1 / side" in done.stdout
    assert "ZeroDivisionError: division by zero" in done.stdout
    table = [line.split(maxsplit=3) for line in done.stdout.splitlines()[-4:]]
    assert [(name, cells, status) for name, cells, _, status in table] == [
        ("notebook", "cells", "status"),
        ("00_good", "2", "ok"),
        ("01_bad", "1", "failed in cell 2"),
        ("02_later", "2", "ok"),
    ]
    assert "never" not in streams(build / "01_bad.ipynb")[-1]
    assert "beside the notebook" in (build / "00_good.html").read_text()
    assert {path: path.read_bytes() for path in before} == before
    assert not any(elsewhere.iterdir())


def test_refresh_writes_the_same_bytes_twice_and_leaves_a_failing_notebook(tmp_path):
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2]);"
    chatty = "import sys\nfor i in range(50):\n    print(i, flush=True)\n    print(f'\\r{i}', end='', file=sys.stderr)"
    good = write(tmp_path / "good.ipynb", draw, chatty, kernelspec={"name": "x", "display_name": "X"}, author="me")
    bad = write(tmp_path / "bad.ipynb", "print('new')", "raise RuntimeError")
    failing = bad.read_bytes()

    first = run("--refresh", bad, good)
    refreshed = good.read_bytes()
    again = run("--refresh", good)

    assert (first.returncode, again.returncode) == (1, 0), first.stderr + again.stderr
    assert good.read_bytes() == refreshed
    assert bad.read_bytes() == failing
    notebook = nbformat.read(good, 4)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[1].outputs)
    assert [output.name for output in notebook.cells[2].outputs] == ["stdout", "stderr"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert sorted(tmp_path.iterdir()) == [bad, good]


def test_of_a_widget_its_picture_is_kept_and_of_a_progress_bar_nothing(tmp_path):
    widget = """import ipywidgets
class Seen(ipywidgets.VBox):
    def _repr_mimebundle_(self, **options):
        return super()._repr_mimebundle_(**options) | {"text/plain": "Seen", "image/jpeg": "/9j/"}
Seen()"""
    bar = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    print('step')"
    path = write(tmp_path / "widgets.ipynb", widget, bar)

    done = run("--refresh", path)
    refreshed = path.read_bytes()

    assert done.returncode == 0, done.stderr
    _, first, second = nbformat.read(path, 4).cells
    assert [set(output.data) for output in first.outputs] == [{"text/plain", "image/jpeg"}]
    assert {output.get("name") for output in second.outputs} == {"stdout"}
    assert streams(path)[2] == 3 * "step\n"
    run("--refresh", path)
    assert path.read_bytes() == refreshed


def test_an_interrupted_refresh_leaves_the_old_notebook_and_nothing_beside_it(tmp_path):
    path = write(tmp_path / "slow.ipynb", "import os\nprint(os.getpid())", "import time\ntime.sleep(90)")
    before = path.read_bytes()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background have inherited deaf ears
    runner = subprocess.Popen(command("--refresh", path), **pipes, preexec_fn=heard)
    while "1/2" not in (line := runner.stdout.readline()):
        assert line, runner.communicate()
    runner.send_signal(signal.SIGINT)
    _, error = runner.communicate(timeout=120)

    assert runner.returncode == 130
    # What libraries say on their way out, now and then, comes after it.
    assert error.split("\n")[1] == "interrupted: notebooks not yet finished are as they were"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", [None, "<<<<<<< HEAD"])
def test_what_is_no_notebook_is_named_in_one_line(tmp_path, text):
    path = tmp_path / "03_missing.ipynb"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit, match=rf"^{re.escape(str(path))}: .*expected a notebook.*$") as stopped:
        runpy.run_path(str(RUNNER))["read"](path)
    assert "\n" not in stopped.value.code
