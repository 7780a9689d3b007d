"""A real Chromium without a window, spoken to over a pipe: no port, no driver, no library.

`python -m tests.harness.browser` provides it, as `make test` does: on CI it installs Debian's, elsewhere it says
what to do.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "install Chromium (Debian: apt-get install chromium)"
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip
_PATIENCE_S = 60.0
SHOTS = Path(__file__).parent.parent.parent / ".pytest_cache" / "screenshots"
"""Where the tests leave pictures of pages and terminals, for somebody to look at."""


def find() -> str | None:
    """Return this machine's Chromium, None if it has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One Chromium with one page, until closed.

    Args:
        program: See `find`.
    """

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="jobkit-chromium-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The pipe is to be at descriptors 3 and 4 over there; from above 9 none of ours is in the way.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in (theirs_in, theirs_out)]
        command = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "-", program]
        self._process = subprocess.Popen(
            [*command, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for descriptor in (theirs_in, theirs_out, *high):
            os.close(descriptor)
        self._in, self._out, self._buffer, self._count = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []
        """Everything the browser told unasked, oldest first."""
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        """Do nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the browser and remove what it wrote."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._count:
                assert "error" not in told, f"{method}: {told['error']}"
                return dict(told["result"])
            self.events.append(told)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._buffer:
            ready = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, "Chromium does not answer"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "Chromium is gone"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Load a file at a width, in light or dark, and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def requests(self) -> list[str]:
        """Return what the page asked the network for since it was opened, itself left out."""
        sent = [
            told["params"]["request"]["url"]
            for told in self.events
            if told.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """Return what the console showed since the page was opened."""
        names = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(told["params"]) for told in self.events if told.get("method") in names]


def inspect(page: Path, kept: Path | None = None) -> None:
    """Check that a report looks right to its readers: in light, in dark, and on a phone; keep a screenshot of each.

    Args:
        page: The report.
        kept: Where the screenshots go; beside it by default. Without a Chromium there are none, which CI refuses.
    """
    program = find()
    if program is None:
        assert not os.environ.get("CI"), f"Chromium is missing: {HOW}"
        return
    with Browser(program) as running:
        look(running, page, kept or page.parent)


def look(browser: Browser, page: Path) -> None:
    """Open a report in light, dark and at 390 pixels: no request, no complaint, nothing sticks out; keep pictures."""
    colors = {}
    for name, width, dark in (("light", 1100, False), ("dark", 1100, True), ("phone", 390, False)):
        browser.open(page, width=width, dark=dark)
        assert browser.requests() == []
        assert browser.complaints() == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(_STICKS_OUT) == []
        assert browser.evaluate(_BROKEN) == []
        assert browser.evaluate("document.querySelectorAll('.lane rect').length") > 3
        colors[name] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.screenshot(SHOTS / f"{page.stem}-{name}.png")
        assert (SHOTS / f"{page.stem}-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert colors["light"] == colors["phone"] != colors["dark"]


_STICKS_OUT = """[...document.querySelectorAll('main *')].filter(element => {
    const box = element.getBoundingClientRect();
    return box.right > innerWidth + 1 || box.left < -1;
}).map(element => element.outerHTML.slice(0, 200))"""


_BROKEN = """[...document.querySelectorAll('table.runs td:nth-child(2)')].filter(cell => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return range.getClientRects().length > 1;
}).map(cell => cell.textContent)"""
"""States of runs that are broken in the middle of a word."""


def main(stamp: str | None = None) -> int:
    """Provide Chromium and say so in one line; where it cannot be had, only CI fails."""
    on_ci = bool(os.environ.get("CI"))
    try:
        if find() is None and on_ci and os.geteuid() == 0 and shutil.which("apt-get"):
            quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
            subprocess.run(["apt-get", "update", "-qq"], **quiet)
            packages = ["--no-install-recommends", "chromium", "fonts-dejavu-core"]
            subprocess.run(["apt-get", "install", "-qq", "-y", *packages], **quiet)
        if (program := find()) is None:
            raise OSError("it is not on this machine")
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        print(f"{' '.join(done.stdout.split()[:2])} for the tests: found in {os.path.dirname(program)}")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the report is not looked at in a browser: {error}; {HOW}", file=sys.stderr)
        return int(on_ci)
    if stamp is not None:
        Path(stamp).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
