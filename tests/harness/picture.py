"""The picture of a report that the README shows, drawn anew from a real run: `python -m tests.harness.picture RUN`."""

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from launch.lifecycle.history import read_history
from launch.lifecycle.submission import open_run
from launch.report.html import write_html
from tests.harness import browser

PICTURE = Path(__file__).parent.parent.parent / "launch/static/report.png"
WIDTH = 980
UNTIL = (
    "[...document.querySelectorAll('.card')].find(card => card.querySelector('.plot')).getBoundingClientRect().bottom"
)
"""The picture ends below the loss curve."""


def draw(run: str) -> None:
    """Look at a run's report and keep its upper part, in few colours."""
    program = browser.find()
    assert program is not None, browser.HOW
    with tempfile.TemporaryDirectory() as directory, browser.Browser(program) as chromium:
        history = read_history(open_run(run), state="done")
        history.run = f"runs/{history.name}"
        chromium.open(write_html(Path(directory) / "report.html", [history]), width=WIDTH)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": chromium.evaluate(UNTIL) + 16, "scale": 1.5}
        told = chromium.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    image = Image.open(io.BytesIO(base64.b64decode(told["data"]))).convert("RGB")
    PICTURE.parent.mkdir(exist_ok=True)
    image.quantize(96, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    draw(*sys.argv[1:])
