"""Apptainer's `exec` for the tests: no package of Debian 12's has the real one.

`apptainer exec [--nv] --bind=SOURCE:TARGET,... --pwd=DIRECTORY IMAGE COMMAND...` enters an unpacked image (Apptainer
calls it a sandbox) in a mount namespace of its own, which takes root. As with the real one the image is read-only, its
PATH counts, the environment comes along, and pids are the host's; unlike it, nothing of the host is seen but /proc,
/sys, /dev and what is bound, not even /tmp and the home.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path

_CLONE_NEWNS = 0x20000  # linux/sched.h


def main(arguments: list[str]) -> None:
    """Run a command in an image."""
    parser = argparse.ArgumentParser(prog="apptainer", allow_abbrev=False)
    parser.add_argument("verb", choices=["exec"])
    parser.add_argument("--nv", action="store_true")
    parser.add_argument("--bind", required=True)
    parser.add_argument("--pwd", required=True)
    parser.add_argument("image", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args(arguments)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        sys.exit("apptainer: no mount namespace of one's own here")
    mount("--make-rprivate", "/")
    mount("--bind", str(told.image), str(told.image))
    for system in ("/proc", "/sys", "/dev"):
        mount("--rbind", system, f"{told.image}{system}")
    mount("-t", "tmpfs", "tmpfs", f"{told.image}/tmp")
    for bind in told.bind.split(","):
        source, target = bind.split(":")[:2]
        place = Path(f"{told.image}{target}")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        mount("--bind", source, str(place))
    mount("-o", "remount,ro,bind", str(told.image))
    os.chroot(told.image)
    os.chdir(told.pwd)
    os.environ["PATH"] = "/opt/jobkit/bin:/usr/local/bin:/usr/bin:/bin"
    os.execvp(told.command[0], told.command)


def mount(*arguments: str) -> None:
    """Mount something."""
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
