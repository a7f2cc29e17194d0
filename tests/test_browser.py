"""The explorer in JupyterLab, in a real browser: what only a browser can show. `make test-browser` installs one."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import cv2
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.browser

ARTEFACTS = Path(__file__).resolve().parent.parent / "build" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["gpu", "quic", "background-networking", "component-update", "sync"]
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
CELL = """
from sclip_lab import load, scenes
from sclip_lab.explorer import explore
explore(load("tiny"), scenes.draw(3, seed=2, size=(160, 213))[0])
"""
NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: `make test-browser`")
    if not CHROMIUM:
        pytest.skip("no Chromium is installed: `make test-browser`")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        yield page
        page.screenshot(path=ARTEFACTS / "end.png")
        browser.close()


@pytest.fixture
def lab(page, tmp_path):
    """JupyterLab on a notebook of one cell, with none of the user's settings; its address."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks for one
    nbformat.write(new_notebook(cells=[new_code_cell(CELL.strip())], metadata=kernel), tmp_path / "explorer.ipynb")
    own = {f"JUPYTER_{name}_DIR": tmp_path / name for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": tmp_path / name for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": tmp_path / "ipython"}
    settings = tmp_path / "SETTINGS" / NEWS
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with (ARTEFACTS / "jupyterlab.log").open("w") as log:
        environment = os.environ | {name: str(folder) for name, folder in own.items()}
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for _ in range(600):
        assert server.poll() is None, f"JupyterLab ended, see {ARTEFACTS}"
        with socket.socket() as attempt:
            attempt.settimeout(1)
            if not attempt.connect_ex(("127.0.0.1", port)):
                break
        page.wait_for_timeout(100)
    yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb"
    server.terminate()
    server.wait(timeout=30)


def test_a_click_and_an_arrow_key_change_what_is_seen(page, lab, tmp_path):
    page.goto(lab)
    page.get_by_text("| Idle").wait_for()  # the kernel is there, and nothing moves any more
    page.locator(".jp-CodeCell .cm-content").click()
    page.keyboard.press("Shift+Enter")
    picker, panels = page.locator(".sclip-picker [role=application]"), page.locator(".sclip-explorer td img")
    page.wait_for_function("document.querySelectorAll('.sclip-explorer td img').length == 12", timeout=120_000)

    def shown():
        return panels.evaluate_all("images => images.map(image => image.src)")

    def after(act, what="td img", attribute="src"):
        """The panels once `act` has changed what there is to see."""
        state = f"[...document.querySelectorAll('.sclip-explorer {what}')].map(e => e.{attribute}).join()"
        before, begin = page.evaluate(state), perf_counter()
        act()
        page.wait_for_function(f"before => {state} != before", arg=before, polling=10)
        times.append(round(1000 * (perf_counter() - begin)))
        return shown()

    assert panels.evaluate_all("images => images.every(image => image.naturalWidth > 100 && image.alt)")
    before, times = shown(), []
    box = picker.bounding_box()
    clicked = after(lambda: page.mouse.click(box["x"] + box["width"] * 2.5 / 24, box["y"] + box["height"] * 3.5 / 18))
    assert "row 3, column 2 of 18 x 24" in picker.get_attribute("aria-label")
    told = page.get_by_text("Patch in row 3, column 2 of 18 x 24").inner_text()
    print(f"\nclick: {times[-1]} ms until it is seen; the kernel's part: {told}")
    changed = [old != new for old, new in zip(before, clicked, strict=True)]
    assert changed == 3 * [True, True, True, False]  # each attention's layers, and its segmentation

    assert picker.evaluate("box => box == document.activeElement")
    moved = after(lambda: page.keyboard.press("ArrowRight"))
    assert "row 3, column 3 of" in picker.get_attribute("aria-label")
    after(lambda: page.keyboard.press("ArrowLeft"))
    print(f"arrow keys: {times[-2]} and {times[-1]} ms until it is seen")
    assert shown() == clicked != moved
    page.screenshot(path=ARTEFACTS / "explorer.png")

    # everything else by keyboard: tab order, the picture, the attentions, the layers
    page.locator(".sclip-explorer .widget-dropdown select").focus()
    other = after(lambda: page.keyboard.press("ArrowDown"))
    assert not set(other) & set(clicked)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText").startswith("Your own picture")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("csa; window(size=3)")
    assert len(after(lambda: page.keyboard.press("Enter"))) == 8
    page.keyboard.press("Control+A")
    page.keyboard.type("cas")
    after(lambda: page.keyboard.press("Enter"), "p[role]", "innerText")
    assert page.locator(".sclip-explorer [role=alert]").inner_text().startswith("unknown attention 'cas'")
    page.locator(".sclip-explorer .widget-select-multiple select").focus()
    assert len(after(lambda: page.keyboard.press("ArrowDown"))) == 4  # one layer is selected now

    # a file of one's own, and one that is no picture
    def upload(path):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Your own picture").press("Enter")
        chooser.value.set_files(path)

    own, bad = tmp_path / "own.png", tmp_path / "bad.png"
    cv2.imwrite(str(own), np.random.RandomState(0).randint(0, 256, (100, 100, 3), np.uint8))
    bad.write_bytes(b"no picture")
    after(lambda: upload(own))
    assert "of 18 x 18" in picker.get_attribute("aria-label")
    after(lambda: upload(bad), "p[role]", "innerText")
    assert page.locator(".sclip-explorer [role=alert]").inner_text() == (
        "image 'bad.png' cannot be decoded: expected a whole JPEG, PNG or other picture"
    )
