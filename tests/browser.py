"""A headless Chromium, driven through its DevTools protocol: what it loads, what it complains about, what it shows."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import websocket

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = (
    "no browser on this machine; on Debian: apt-get install --no-install-recommends chromium-headless-shell"
)


def find() -> str | None:
    """The path of a browser of Chromium's family, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(profile: Path):
    """A page of a fresh browser, closed afterwards."""
    words = [find(), "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    words += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # A group of its own: what is on the path may be a shell script around the browser.
    process = subprocess.Popen([*words, "about:blank"], start_new_session=True, **quiet)
    try:
        port = _until(lambda: (profile / "DevToolsActivePort").read_text().split("\n")[0])
        tabs = _until(lambda: json.load(urlopen(f"http://127.0.0.1:{port}/json", timeout=5)))
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        page = Page(websocket.create_connection(address, timeout=30, suppress_origin=True))
        yield page
        page.socket.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


def _until(what, seconds: float = 30):
    end = time.monotonic() + seconds
    while True:
        try:
            return what() or 1 / 0
        except (OSError, ZeroDivisionError, ValueError):
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.1)


class Page:
    """One tab. `complaints` and `requests` are those of the page that was opened last."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """Call the browser and wait for its answer; events on the way are noted."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict) -> None:
        kind, told = message.get("method"), message.get("params", {})
        if kind == "Page.loadEventFired":
            self.loaded = True
        elif kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif kind == "Network.loadingFailed":
            self.complaints.append(f"loading failed: {told['errorText']}")
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {told['exceptionDetails']['text']}")
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console: {told['args']}")
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log: {told['entry']['text']}")

    def open(self, address: str) -> None:
        """Go to an address and wait until it has loaded."""
        self.follow(lambda: self.call("Page.navigate", url=address))

    def follow(self, act) -> None:
        """Do something that leads to another page, and wait until that has loaded."""
        self.complaints, self.requests, self.loaded = [], [], False
        act()
        while not self.loaded:
            self._note(json.loads(self.socket.recv()))
        self.show("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")  # what comes late

    def show(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release one key."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "char" else {}
            if kind != "char" or text:
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)
