"""`jobkit emulate`: the bucket, the variables that lead to it, and its end. docs/offline.md trains a run in it."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

WORDS = (sys.executable, "-m", "launch", "emulate")
LOOKS = "import os, sys, urllib.request as r; r.urlopen(os.environ['STORAGE_EMULATOR_HOST'] + sys.argv[1]); sys.exit(7)"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([*WORDS, *words], capture_output=True, text=True, timeout=60, check=False)


def test_a_command_finds_the_bucket() -> None:
    """It has the variables, its exit code is the command's, and the variables are printed for programs."""
    done = run("--bucket", "runs-1", "--json", "--", sys.executable, "-c", LOOKS, "/storage/v1/b/runs-1")
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert told["buckets"] == ["runs-1"]
    assert told["environment"]["STORAGE_EMULATOR_HOST"] == told["url"]


def test_until_ctrl_c(tmp_path: Path) -> None:
    """Without a command a shell can read what is printed; Ctrl-C is no error, and nothing listens afterwards."""
    server = subprocess.Popen([*WORDS], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    lines = [server.stdout.readline()]
    while "FSSPEC_GS" not in lines[-1]:
        lines.append(server.stdout.readline())
    script = "".join(lines) + "echo $STORAGE_EMULATOR_HOST $FSSPEC_GS"
    host, _, options = subprocess.check_output(["sh", "-c", script], text=True).strip().partition(" ")
    assert json.loads(options) == {"use_listings_cache": False, "token": "anon"}
    urllib.request.urlopen(f"{host}/storage/v1/b/bucket").close()
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{host}/storage/v1/b/bucket")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bucket", "Runs"), "Invalid bucket name: 'Runs': 3 to 63 lower-case letters"),
        (("--port", "{taken}"), "Address already in use; leave it out for a free one"),
        (("--", "no-such-program"), "cannot start no-such-program: No such file or directory"),
    ],
)
def test_mistakes(words: tuple[str, ...], said: str) -> None:
    """One sentence with the value, exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(*(word.format(taken=taken.getsockname()[1]) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
