"""The report as a page and as a picture: looked at in a real Chromium, in light, in dark and on a phone."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.backends import registry
from launch.drill import demo
from launch.lifecycle import run_status
from launch.lifecycle.history import read_history
from launch.report import loss_curve, png
from launch.report.goodput import measure
from launch.report.html import html_of
from launch.report.png import write_png
from tests.harness import browser, ledgers
from tests.harness.jobs import ROOT, Project, until, until_stepping
from tests.training.test_goodput import no_jax


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    """Run a Chromium; without one skip, on CI fail."""
    program = browser.find()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail(f"Chromium is missing: {browser.HOW}")
        pytest.skip(f"Chromium is missing: {browser.HOW}")
    with browser.Browser(program) as running:
        yield running


def three(path: Path) -> list[ledgers.Written]:
    """Write three runs."""
    return [
        ledgers.smooth(path / "smooth"),
        ledgers.interrupted(path / "interrupted"),
        ledgers.troubled(path / "troubled"),
    ]


def html(*runs: ledgers.Written) -> str:
    """Return the page of some runs."""
    return html_of([read_history(run.store, state="done", reason="finished") for run in runs])


@pytest.mark.slow
def test_in_a_browser(chromium: browser.Browser, tmp_path: Path) -> None:
    """One run and three: no request to anywhere, no complaint, no sideways scrolling; dark where the reader's is dark.

    The screenshots stay, to be looked at.
    """
    runs = three(tmp_path)
    for name, text in (("one", html(runs[1])), ("three", html(*runs))):
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        browser.look(chromium, path)


def test_a_browser_that_sees_a_bad_page(chromium: browser.Browser, tmp_path: Path) -> None:
    """A page that asks for something, complains or is too wide is caught by the checks above."""
    path = tmp_path / "bad.html"
    path.write_text("<img src='missing.png'><script>console.error('no')</script><div style='width:2000px'>x</div>")
    chromium.open(path, width=390)
    assert [url.rpartition("/")[2] for url in chromium.requests()] == ["missing.png"]
    assert "no" in " ".join(chromium.complaints())
    assert chromium.evaluate("document.documentElement.scrollWidth") > 390


def test_page_says_the_figures(tmp_path: Path) -> None:
    """The page holds the figures of the run, its timeline, its curve and its story, and no address but its own."""
    text = html(ledgers.interrupted(tmp_path / "r"))
    assert "32.1 %" in text  # 129 of 402 s
    assert "1 of 1" in text
    assert "killed, 30 lost" in text
    assert "2.21, of it 0.92 not for training" in text
    assert text.count('class="lane"') == 3
    assert not re.search(r"https?:|src=|@import|url\(|<script", text)


def test_page_escapes(tmp_path: Path) -> None:
    """What a program or a person named is text on the page, never a part of it."""
    run = ledgers.interrupted(tmp_path / "<b>r</b>&")
    run.outcome(0, outcome="failed", reason="<script>alert(1)</script>", step=80, committed_step=50, ended=171.0)
    text = html(run)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>r</b>" not in text


def test_page_of_a_run_that_waits(tmp_path: Path) -> None:
    """A run without an attempt, and one without any event, have a page."""
    run = ledgers.Written(tmp_path / "r")
    assert "goodput" in html(run)
    run.launcher(1, "submitted")
    history = read_history(run.store, state="queued", over=False)
    history.now = 100.0
    assert "in the queue" in html_of([history])


def test_many_attempts(chromium: browser.Browser, tmp_path: Path) -> None:
    """A run of 200 attempts is a page of moderate length."""
    run = ledgers.Written(tmp_path / "r")
    for number in range(200):
        run.supervisor(number, number * 100, "started")
        run.program(number, number * 100 + 5, "restored", step=number * 10, seconds=1.0)
        run.program(number, number * 100 + 9, "first_step", step=number * 10 + 1)
        run.program(number, number * 100 + 9, "metrics", step=number * 10, values={"loss": 5 / (number + 1)})
        run.supervisor(number, number * 100 + 95, "exited", outcome="preempted", reason="stopped on SIGTERM")
        run.outcome(number, outcome="preempted", step=number * 10 + 10, committed_step=number * 10 + 10)
    path = tmp_path / "many.html"
    path.write_text(html(run))
    chromium.open(path, width=390)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 390
    assert chromium.evaluate("document.querySelector('.lanes').getBoundingClientRect().height") < 1600


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """`jobkit report` writes page and picture where it is told to, says where, and shows runs in a terminal."""
    project = Project(tmp_path)
    run = ledgers.interrupted(project.runs / "a")
    ledgers.smooth(project.runs / "b")
    out = tmp_path / "new/directory"
    done = project.cli("report", str(run.path), "--html", f"{out}/r.html", "--png", f"{out}/r.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"report: {out}/r.html\npicture: {out}/r.png\n"
    assert (out / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "<!DOCTYPE html>" in (out / "r.html").read_text()
    shown = project.cli("report", str(run.path), PYTHONPATH=f"{no_jax(tmp_path)}:{ROOT}").stdout
    assert "goodput 32.1 %  of 6 min 42 s" in shown
    assert re.search(r"■ lost +7.7 % +31 s", shown)
    assert re.search(r"0 +101 s +0 to 80 +30 +60 s +1.01 +killed by SIGKILL", shown)
    assert "1 of 1" in shown
    many = project.cli("report", str(project.runs)).stdout.splitlines()
    assert [line.split()[0] for line in many] == ["run", "a", "b"]
    live = project.cli("report", "--live", str(run.path)).stdout  # it is over: one picture, and the end
    assert "goodput 32.1 %" in live


@pytest.mark.slow
def test_live(tmp_path: Path) -> None:
    """`--live` shows a run while it is alive, until it is over."""
    project = Project(tmp_path)
    store = project.submit("commit:1,hold")
    until_stepping(store)
    with project.start("report", "--live", store.url) as view:
        assert view.stdout is not None
        until(lambda: run_status.status(store).state == "running", "it runs")
        assert project.cli("report", "--json", store.url).stdout.find('"ended": null') > 0
        assert view.poll() is None
        registry.cancel(store.url)
        assert view.wait(30) == 0
        shown = view.stdout.read()
    assert "cancelled" in shown
    assert "1 attempt" in " ".join(shown.split())  # a long path wraps it


def test_sweep(tmp_path: Path) -> None:
    """A sweep is reported point by point, each under its values, the ones that have not started too."""
    project = Project(tmp_path)
    store = project.submit("commit:{n},exit:0", sweep={"n": ("1", "2")})
    until(lambda: {point.state for point in registry.status(store).points} == {"done"}, "the sweep is done")
    told = json.loads(project.cli("report", "--json", store.url).stdout)
    assert [(one["name"], one["state"], len(one["attempts"])) for one in told] == [
        ("n=1", "done", 1),
        ("n=2", "done", 1),
    ]
    assert project.cli("report", str(tmp_path / "runs")).stdout.count(" done ") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "is not a run and holds none"),
        (["a", "--live", "--json"], "--live is a view in the terminal"),
        (["a", "--html", "a/run.json/x"], "cannot write"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], told: str) -> None:
    """A mistake is one sentence and exit code 2."""
    project = Project(tmp_path)
    shutil.copytree(ledgers.smooth(tmp_path / "a").path, project.path / "a")
    done = project.cli("report", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_picture_of_many(tmp_path: Path) -> None:
    """Many runs make one picture of their shares; one run has its lanes and its curve in it."""
    runs = [read_history(run.store) for run in three(tmp_path)]
    for name, some in (("many.png", runs), ("one.png", runs[:1]), ("troubled.png", runs[2:])):
        path = write_png(tmp_path / name, some)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 8_000


def test_no_word_lies_on_the_curve(tmp_path: Path) -> None:
    """In the picture the names of the curves and the labels of interruptions stand above the plot, side by side."""
    run = ledgers.interrupted(tmp_path / "r")
    for step in range(60, 100, 10):
        run.program(1, 150 + step, "metrics", step=step, values={"val_loss": 5 / (1 + step / 20)})
    history = read_history(run.store)

    def draw(plt: Any) -> Any:
        figure = png._one(plt, measure(history), loss_curve.curve_of(history, measure(history)))
        figure.canvas.draw()
        axes = figure.axes[2]
        labels = [one.get_window_extent() for one in axes.texts if one.get_text()]
        words = [*labels, axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()]
        assert len(labels) == 2
        assert all(one.y0 >= axes.get_window_extent().y1 for one in words)
        assert not [pair for pair in combinations(words, 2) if pair[0].overlaps(pair[1])]
        return figure

    png.write_figure(tmp_path / "one.png", draw)


def test_curve_shows_what_was_taken_back(tmp_path: Path) -> None:
    """A stretch that was trained twice is drawn on its own, and each interruption is a cut with its lost steps."""
    run = ledgers.interrupted(tmp_path / "r")
    history = read_history(run.store)
    drawn = loss_curve.curve_of(history, measure(history))
    assert drawn is not None
    assert [(cut.attempt, cut.step, cut.lost, cut.outcome) for cut in drawn.cuts] == [
        (0, 80, 30, "killed"),
        (1, 100, 0, "preempted"),
    ]
    assert [(part[0][0], part[-1][0]) for part in drawn.again] == [(55.0, 75.0)]
    assert drawn.x == (0.0, 125.0)


def test_a_long_curve_keeps_its_peaks() -> None:
    """Of 100,000 points at most 600 are drawn, the highest and the lowest among them; NaN is no point."""
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    drawn = loss_curve.thinned(points)
    assert len(drawn) <= 600
    assert {9.0, -9.0} <= {value for _, value in drawn}
    assert drawn == sorted(drawn)
    assert loss_curve._finite({1: float("nan"), 2: 3.0, 3: float("inf")}) == [(2.0, 3.0)]


def test_round_numbers_on_the_axes() -> None:
    """Ticks are multiples of 1, 2 or 5 times a power of ten."""
    assert loss_curve.nice_steps(0, 1000, 6) == [0, 200, 400, 600, 800, 1000]
    assert loss_curve.nice_steps(1.93, 5.1, 5) == [2, 3, 4, 5]
    assert json.dumps(loss_curve.nice_steps(0, 0.05, 5)) == "[0.0, 0.01, 0.02, 0.03, 0.04, 0.05]"


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(["preempted", "killed", "stalled"]), st.integers(0, 20)))
)
def test_labels_do_not_run_into_each_other(ends: list[tuple[int, str, int]]) -> None:
    """Of the labels above the curve every one that is drawn can be read, and the first always is."""
    cuts = [loss_curve.Cut(number, step, lost, how) for number, (step, how, lost) in enumerate(ends)]
    drawn = loss_curve.labelled(cuts, (0.0, 1000.0))
    assert sorted(one.attempt for one in drawn) == list(range(len(cuts)))
    end = -1e9
    for cut in drawn:
        assert cut.label in ("", cut.text)
        width = loss_curve._LETTER * len(cut.label)
        begin = cut.step / 1000 - width * cut.leftwards
        assert not cut.label or begin >= end
        end = begin + width if cut.label else end
    assert not drawn or drawn[0].label


def a_sweep(path: Path) -> list[Any]:
    """Write six points of a sweep, of which the third is the best; one has logged nothing yet."""
    histories = []
    for number, (rate, seed) in enumerate((rate, seed) for rate in ("1e-3", "0.01", "1e-1") for seed in ("0", "1")):
        run = ledgers.Written(path / "grid" / "points" / str(number))
        run.launcher(0, "submitted")
        run.supervisor(0, 1, "started", pid=1)
        run.program(0, 2, "first_step", step=1)
        for step in range(0, 60, 3) if number < 5 else ():
            values = {"loss": (2 + abs(number - 2)) / (1 + step), "val_loss": (3 + abs(number - 2)) / (1 + step)}
            run.program(0, 2 + step, "metrics", step=step, values=values)
        run.outcome(0, outcome="done", reason="finished", step=60, committed_step=60, ended=70.0)
        history = read_history(run.store, state="done", reason="finished")
        history.values, history.name = {"lr": rate, "seed": seed}, f"lr={rate} seed={seed}"
        histories.append(history)
    return histories


@pytest.mark.slow
def test_a_sweep_s_page(chromium: browser.Browser, tmp_path: Path) -> None:
    """Swept values and metrics are columns that sort by a click, the best point is marked, one plot has all curves."""
    path = tmp_path / "sweep.html"
    path.write_text(html_of(a_sweep(tmp_path)))
    browser.look(chromium, path)
    chromium.open(path, width=1100)
    assert chromium.evaluate("document.title") == "sweep grid: 6 points"
    assert chromium.evaluate("document.querySelector('.verdict').textContent").startswith(
        "best: lr=0.01 seed=0, val_loss"
    )
    assert chromium.evaluate("document.querySelectorAll('.every').length") == 5
    assert chromium.evaluate("document.querySelector('.points .best').textContent").startswith("2 ★")
    names = chromium.evaluate("[...document.querySelectorAll('.points th')].map(one => one.textContent.split(' ')[0])")
    assert names == ["point", "lr", "seed", "loss", "val_loss", "state", "step", "goodput"]
    rows = "[...document.querySelectorAll('.points tbody tr')]"
    top = "one.getBoundingClientRect().top"
    seen = (
        f"{rows}.map(one => [{top}, one.cells[0].textContent[0]]).sort((a, b) => a[0] - b[0]).map(a => a[1]).join('')"
    )
    assert chromium.evaluate(seen) == "012345"
    for label, order in (("down-0", "452301"), ("up-3", "213045"), ("down-3", "041325")):
        chromium.evaluate(f"document.querySelector('label[for={label}]').click()")
        assert chromium.evaluate(seen) == order, label


def test_runs_that_are_no_sweep(tmp_path: Path) -> None:
    """Runs side by side, and one point alone, have no columns of a sweep."""
    assert 'class="points"' not in html(*three(tmp_path))
    assert 'class="points"' not in html_of(a_sweep(tmp_path)[:1])


@pytest.mark.parametrize(("equal", "answer", "tone"), [(True, "yes", "verdict good"), (False, "no", "verdict")])
def test_the_demo_s_page(equal: bool, answer: str, tone: str, tmp_path: Path) -> None:
    """It says whether the bits are the same, and is titled after that."""
    histories = [read_history(run.store, state="done") for run in three(tmp_path)[:2]]
    text = html_of(histories, demo._page_verdict({"equal": equal}))
    assert f"<title>jobkit demo, bit-identical: {answer}</title>" in text
    assert f'<p class="{tone}">final state and every loss bit-identical: {answer}</p>' in text


@pytest.mark.slow
def test_what_a_terminal_shows(chromium: browser.Browser, tmp_path: Path) -> None:
    """`ls` and `status` fit 80 columns; pictures of them stay beside those of the pages, to be looked at."""
    three(tmp_path / "runs")
    environ = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    for name, words in (("ls", ["ls", "runs"]), ("status", ["status", "runs/interrupted"])):
        command = [sys.executable, "-m", "launch", *words]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "interrupted" in done.stdout
        # A path in a command is one word, to be copied; this one is long.
        assert max(len(line) for line in done.stdout.splitlines() if str(tmp_path) not in line) <= 80
        (tmp_path / f"{name}.html").write_text(f"<meta charset=utf-8><pre>{escape(done.stdout)}</pre>")
        chromium.open(tmp_path / f"{name}.html", width=800)
        chromium.screenshot(browser.SHOTS / f"{name}.png")
        assert (browser.SHOTS / f"{name}.png").stat().st_size > 1000
