"""SLURM for the tests: found on this machine, or unpacked from the distribution's packages without being installed.

`python -m tests.harness.slurm_packages` provides it once, as `make test` does; it needs no root and changes nothing
outside its cache directory ($JOBKIT_SLURM, by default .venv/slurm). `python -m tests.harness.slurm_packages STAMP
VERSION` unpacks a newer one of `SUITES` beside it, from a later Debian; tests run on it where $JOBKIT_SLURM names its
directory.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.harness import debian

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
ACCOUNTING = ("slurmdbd", "mariadbd", "sacct")
ACCOUNTING_PACKAGES = ["slurmdbd", "mariadb-server-core"]
USUAL = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/opt/slurm/sbin", "/opt/slurm/bin"]
SUITES = {"24.11": "trixie", "26.05": "forky"}
"""Which Debian has which newer SLURM; a suite may move on to a later one, which is then said."""
LEFT_OUT = (
    "systemd|perl-base|passwd|procps|adduser|debconf|init-system-helpers|login.defs|sensible-utils|ucf|libtext-|mount"
    "|base-passwd|readline-common|libsystemd-shared|openssl-provider|libc-gconv|libx|ocl-icd|libze1|libhwloc-plugins|gcc-"
)
"""What SLURM's packages depend on and its daemons do without."""
HOW = "install SLURM with munge (Debian, Ubuntu: apt-get install slurm-wlm munge) or set JOBKIT_SLURM"


@dataclass(frozen=True)
class Slurm:
    """Where SLURM's programs are, and what they need to be told when they were unpacked rather than installed."""

    programs: dict[str, str]
    environment: dict[str, str]
    plugins: str | None = None

    def version(self) -> str:
        """Return what slurmd says of itself, as 'slurm-wlm 22.05.8'."""
        command = [self.programs["slurmd"], "-V"]
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{self.programs['slurmd']} does not start: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()


def cache() -> Path:
    """Return the directory into which the packages are unpacked."""
    return Path(os.environ.get("JOBKIT_SLURM") or Path(__file__).parent.parent.parent / ".venv" / "slurm").absolute()


def find() -> Slurm | None:
    """Return the SLURM of this machine, else the unpacked one, else nothing; $JOBKIT_SLURM comes before both."""
    if "JOBKIT_SLURM" in os.environ:
        return unpacked(cache()) or installed()
    return installed() or unpacked(cache())


def accounting() -> Slurm | None:
    """Return an unpacked SLURM that comes with its accounting and a database for it, None if there is none."""
    root = cache()
    found = unpacked(root)
    programs = {name: str(root / "bin" / name) for name in ACCOUNTING}
    if found is None or not all(os.access(program, os.X_OK) for program in programs.values()):
        return None
    return Slurm(found.programs | programs, found.environment, found.plugins)


def installed() -> Slurm | None:
    """Return the SLURM that is installed on this machine, if all of it is."""
    path = os.pathsep.join([*os.environ.get("PATH", "").split(os.pathsep), *USUAL])
    programs = {
        name: program for name in PROGRAMS if name != "slurmstepd" and (program := shutil.which(name, path=path))
    }
    if len(programs) < len(PROGRAMS) - 1:
        return None  # slurmd itself knows where its slurmstepd is
    directories = dict.fromkeys(os.path.dirname(program) for program in programs.values())
    return Slurm(programs, {"PATH": os.pathsep.join(dict.fromkeys([*directories, *path.split(os.pathsep)]))})


def unpacked(root: Path) -> Slurm | None:
    """Return the SLURM that was unpacked below a directory, if there is one."""
    programs = {name: str(root / "bin" / name) for name in PROGRAMS}
    plugins = next(iter(sorted(root.glob("usr/lib/*/slurm-wlm"))), None)
    if plugins is None or not all(os.access(program, os.X_OK) for program in programs.values()):
        return None
    path = os.pathsep.join([str(root / "bin"), os.environ.get("PATH", os.defpath)])
    if (root / debian.OWN_LIBC).exists():
        return Slurm(programs, {"PATH": path}, str(plugins))
    more = root / "lib" / plugins.parent.name
    libraries = [str(plugins.parent), str(plugins), str(more), os.environ.get("LD_LIBRARY_PATH", "")]
    return Slurm(programs, {"PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}, str(plugins))


def unpack(root: Path) -> None:
    """Download SLURM's packages, and those of their dependencies that this machine lacks, and unpack them."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=root.parent) as made:
        work = Path(made)
        new = work / "root"
        debian.download_afresh(work / "packages", [*PACKAGES, *ACCOUNTING_PACKAGES])
        debian.extract(work / "packages", new)
        link(new)
        shutil.rmtree(root, ignore_errors=True)
        new.rename(root)


def unpack_newer(version: str, root: Path) -> None:
    """Unpack the SLURM of a later Debian.

    Args:
        version: One of `SUITES`.
        root: The directory to make.
    """

    def programs(new: Path) -> list[Path]:
        link(new)
        return [new / "bin" / name for name in PROGRAMS]

    try:
        debian.unpack_suite(SUITES[version], PACKAGES, LEFT_OUT, root, programs, "slurm-wlm")
    except OSError as error:
        raise OSError(f"{error}; the suite with SLURM {version} is named in SUITES") from None


def link(root: Path) -> None:
    """Put the programs into one directory, under the names without Debian's suffix."""
    (root / "bin").mkdir()
    for directory in ("usr/sbin", "usr/bin"):
        for program in sorted((root / directory).iterdir()):
            name = program.name.removesuffix("-wlm")
            if re.fullmatch(r"munged?|unmunge|mariadbd|s[a-z]+", name) and not (root / "bin" / name).is_symlink():
                real = program if program.exists() else program.with_name(f"{name}-wlm")
                (root / "bin" / name).symlink_to(Path("..") / directory / real.name)


def main(stamp: str | None = None, version: str | None = None) -> int:
    """Provide SLURM and say so in one line; where it cannot be had, only CI fails.

    Args:
        stamp: A file that is made where it is there.
        version: A newer one of `SUITES`, beside the other; that of this machine if not given.
    """
    try:
        slurm = _provide() if version is None else _provide_newer(version)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the SLURM tests are left out: {error}; {HOW}", file=sys.stderr)
        return int(bool(os.environ.get("CI")))
    print(f"{slurm.version()} for the tests in {os.path.dirname(slurm.programs['slurmctld'])}")
    if stamp is not None:
        Path(stamp).touch()
    return 0


def _provide() -> Slurm:
    if find() is None or (installed() is None and accounting() is None):
        debian.check()
        unpack(cache())
    if (slurm := find()) is None:
        raise OSError("the packages lack some of its programs")
    return slurm


def _provide_newer(version: str) -> Slurm:
    root = cache().with_name(f"slurm-{version}")
    if unpacked(root) is None:
        unpack_newer(version, root)
    if (slurm := unpacked(root)) is None:
        raise OSError(f"the packages of SLURM {version} lack some of its programs")
    if version not in slurm.version():
        print(
            f"Debian's {SUITES[version]} has moved on from {version}: tests run on what it has now, {slurm.version()}"
        )
    return slurm


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
