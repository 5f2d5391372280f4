"""The widgets where they are used: JupyterLab in a headless browser, driven over its DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
import websocket

from defectlib import paths, stages, study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TOKEN = "explorer"
# Run before the kernel is there, a cell asks which one it shall be.
READY = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# The pictures of the widget, its menus in order, and one choice made as a reader would make it.
PICTURE = "document.querySelector('.jupyter-widgets img')?.src ?? ''"
MENUS = "[...document.querySelectorAll('.widget-dropdown select')].map(m => [...m.options].map(o => o.text))"
CHOOSE = """(() => {{
    const menu = document.querySelectorAll('.widget-dropdown select')[{menu}];
    menu.selectedIndex = {item};
    menu.dispatchEvent(new Event('change', {{bubbles: true}}));
}})()"""


class Page:
    """One tab of a browser."""

    def __init__(self, address):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.sent = 0

    def call(self, method, **values):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": values}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass  # events that nobody asked for
        assert "error" not in answer, answer
        return answer["result"]

    def ask(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def photograph(self, file):
        paths.write_bytes(file, base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def wait_for(what, find, seconds=120):
    until = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def started(words, log, **environment):
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@contextlib.contextmanager
def lab(folder):
    """JupyterLab over a folder, with settings of its own; yields its address."""
    port = free_port()
    words = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
        f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", f"--IdentityProvider.token={TOKEN}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "RUNTIME", "DATA")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("SETTINGS", "WORKSPACES")}
    asks = folder / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    paths.write_text(asks, '{"fetchNews": "false"}')
    with started(words, folder / "lab.log", OMP_NUM_THREADS="1", **own):
        address = f"http://127.0.0.1:{port}"

        def answers():
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{address}/api?token={TOKEN}").status == 200

        wait_for("JupyterLab", answers)
        yield address


@contextlib.contextmanager
def browser(program, address, folder):
    """A headless browser at an address; yields its page."""
    words = [
        *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,900"),
        *("--remote-debugging-port=0", f"--user-data-dir={folder / 'browser'}", address),
    ]
    with started(words, folder / "browser.log"):
        mark = folder / "browser" / "DevToolsActivePort"
        port = wait_for("the browser", lambda: mark.is_file() and mark.read_text().split()[:1])[0]

        def page():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                return [tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["url"].startswith(address[:20])]

        yield Page(wait_for("a page", page)[0])


def test_a_choice_in_jupyterlab_changes_the_picture(tiny_parameters, tmp_path):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    given = tiny_parameters.model_copy(update={"methods": ["crop_paste"]})
    for category in ("brick", "gear"):
        stages.sample(study.open_category(given.model_copy(update={"category": category})), "crop_paste", 0)
    lines = [
        "from defectlib import params, study",
        "from defectlib.report import explorer",
        f"given = params.validate({given.model_dump(exclude_none=True)!r}, 'test')",
        "explorer.explore_samples(study.open_category(given))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "explore.ipynb")
    with (
        lab(tmp_path) as address,
        browser(program, f"{address}/doc/tree/explore.ipynb?token={TOKEN}", tmp_path) as page,
    ):
        wait_for("the kernel", lambda: page.ask(READY))
        page.ask("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        first = wait_for("the first picture", lambda: page.ask(PICTURE))
        page.photograph(tmp_path / "explorer.png")
        before = page.ask(MENUS)
        assert before[0] == ["brick", "gear"] and before[2:] == [["Crop-Paste"], ["0"]]
        page.ask(CHOOSE.format(menu=1, item=1))
        second = wait_for("another defect", lambda: page.ask(PICTURE) not in (first, "") and page.ask(PICTURE))
        page.ask(CHOOSE.format(menu=0, item=1))
        wait_for("another category", lambda: page.ask(PICTURE) not in (first, second, ""))
        page.photograph(tmp_path / "explorer_gear.png")
        after = page.ask(MENUS)
        assert after[1] != before[1], "a category has defects of its own"
        assert page.ask("document.querySelectorAll('.jupyter-widgets img').length") == 1, "updated in place"
