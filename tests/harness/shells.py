"""zsh and fish for the tests: Debian's, unpacked beside the virtual environment, without root and not installed.

Each runs as a person has it: it reads its own file of settings in an empty home.
"""

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness import debian

ROOT = Path(__file__).parent.parent.parent / ".venv" / "shells"
_ANSWER_S = 60.0


def provide() -> Path:
    """Unpack the shells, once for all test processes, and return where they are.

    Raises:
        OSError: If Debian's packages cannot be had.
    """
    debian.check()
    ROOT.parent.mkdir(exist_ok=True)
    with open(f"{ROOT}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ROOT.exists():
            with tempfile.TemporaryDirectory(prefix="shells-", dir=ROOT.parent) as made:
                work = Path(made)
                debian.download_afresh(work / "packages", ["zsh", "fish"])
                debian.extract(work / "packages", work / "root")
                (work / "root/usr/etc").symlink_to("../etc")  # fish finds its files from where it lies
                (work / "root").rename(ROOT)
    return ROOT


def environment(home: Path) -> dict[str, str]:
    """Return what a shell has: `jobkit` on its PATH, an empty home, and its libraries."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    libraries = os.pathsep.join(map(str, ROOT.glob("usr/lib/*-linux-gnu")))
    return os.environ | {"PATH": path, "HOME": str(home), "LD_LIBRARY_PATH": libraries, "TERM": "dumb"}


def fish(words: str, *, cwd: Path, home: Path) -> dict[str, str]:
    """Have fish complete the last of some words; return what it offers, with the description of each."""
    script = 'jobkit completion fish | source; complete --do-complete "$argv[1]"'
    done = subprocess.run(
        [ROOT / "usr/bin/fish", "-c", script, words], cwd=cwd, env=environment(home), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return {line.partition("\t")[0]: line.partition("\t")[2] for line in done.stdout.splitlines()}


def zsh(words: str, *, cwd: Path, home: Path) -> str:
    """Type words and a tab at a zsh in a terminal; return what stands there then, without the space at its end."""
    program = shutil.which("zsh", path=f"{ROOT / 'bin'}{os.pathsep}{ROOT / 'usr/bin'}")
    assert program
    modules = next(ROOT.glob("usr/lib/*/zsh/*"))
    functions = f"{ROOT}/usr/share/zsh/functions"
    (home / ".zshenv").write_text(f"module_path=({modules})\nfpath=({functions} {functions}/**/*(/))\n")
    settings = 'autoload -U compinit && compinit -u -D\neval "$(jobkit completion zsh)"\nPS1="ready> "\n'
    (home / ".zshrc").write_text(settings)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execve(program, ["zsh", "-i"], environment(home))
    try:
        _read_until(terminal, r"ready> ")
        os.write(terminal, f"{words}\t".encode())
        _read_until(terminal, re.escape(words))
        os.write(terminal, b"#end")  # it is taken when the completion is there
        line = _read_until(terminal, "#end")
        return re.sub(r"\s*\x08", "", f"{words}{line.partition('#end')[0]}").rstrip()  # it may move back and forth
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _read_until(terminal: int, pattern: str) -> str:
    """Read what is printed until it has a pattern; return what was read."""
    text, deadline = "", time.monotonic() + _ANSWER_S
    while not re.search(pattern, text):
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], f"no {pattern}: {text!r}"
        text += os.read(terminal, 4096).decode()
    return text
