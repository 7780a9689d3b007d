"""SLURM for the tests: found on this machine, or unpacked from the distribution's packages without being installed.

`python -m tests.slurm_packages` provides it once, as `make test` does; it needs no root and changes nothing outside
its cache directory ($JOBKIT_SLURM, by default .venv/slurm).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
ACCOUNTING = ("slurmdbd", "mariadbd", "sacct")
ACCOUNTING_PACKAGES = ["slurmdbd", "mariadb-server-core"]
USUAL = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/opt/slurm/sbin", "/opt/slurm/bin"]
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
    return Path(os.environ.get("JOBKIT_SLURM") or Path(__file__).parent.parent / ".venv" / "slurm").absolute()


def find() -> Slurm | None:
    """Return the SLURM of this machine, else the unpacked one, else nothing."""
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
    more = root / "lib" / plugins.parent.name
    libraries = [str(plugins.parent), str(plugins), str(more), os.environ.get("LD_LIBRARY_PATH", "")]
    path = os.pathsep.join([str(root / "bin"), os.environ.get("PATH", os.defpath)])
    return Slurm(programs, {"PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}, str(plugins))


def unpack(root: Path) -> None:
    """Download SLURM's packages, and those of their dependencies that this machine lacks, and unpack them."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=root.parent) as made:
        work = Path(made)
        new = work / "root"
        try:
            download(work / "packages", [])
        except OSError:  # the machine's package lists are missing or old: take fresh ones, for this once
            lists = work / "lists"
            (lists / "partial").mkdir(parents=True)
            options = [f"-oDir::State::lists={lists}", f"-oDir::Cache={work}", "-oAPT::Sandbox::User="]
            apt(work, *options, "update")
            download(work / "packages", options)
        for package in sorted((work / "packages").glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, new], check=True)
        link(new)
        shutil.rmtree(root, ignore_errors=True)
        new.rename(root)


def download(directory: Path, options: list[str]) -> None:
    """Download the packages that installing SLURM would bring."""
    directory.mkdir(exist_ok=True)
    wanted = [*PACKAGES, *ACCOUNTING_PACKAGES]
    plan = apt(directory, *options, "install", "--simulate", "--no-install-recommends", *wanted)
    names = {*wanted, *re.findall(r"^Inst (\S+)", plan, re.MULTILINE)}
    apt(directory, *options, "-oAPT::Sandbox::User=", "download", *sorted(names))


def apt(cwd: Path, *arguments: str) -> str:
    """Run apt-get and return its output."""
    done = subprocess.run(["apt-get", "-q", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"apt-get {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def link(root: Path) -> None:
    """Put the programs into one directory, under the names without Debian's suffix."""
    (root / "bin").mkdir()
    for directory in ("usr/sbin", "usr/bin"):
        for program in sorted((root / directory).iterdir()):
            name = program.name.removesuffix("-wlm")
            if re.fullmatch(r"munged?|unmunge|mariadbd|s[a-z]+", name) and not (root / "bin" / name).is_symlink():
                real = program if program.exists() else program.with_name(f"{name}-wlm")
                (root / "bin" / name).symlink_to(Path("..") / directory / real.name)


def main(stamp: str | None = None) -> int:
    """Provide SLURM and say so in one line; where it cannot be had, only CI fails."""
    try:
        done = "found"
        if find() is None or (installed() is None and accounting() is None):
            if not (shutil.which("apt-get") and shutil.which("dpkg")):
                raise OSError("it is not on this machine, and only Debian's and Ubuntu's packages are unpacked")
            unpack(cache())
            done = "unpacked"
        if (slurm := find()) is None:
            raise OSError("the packages lack some of its programs")
        print(f"{slurm.version()} for the tests: {done} in {os.path.dirname(slurm.programs['slurmctld'])}")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the SLURM tests are left out: {error}; {HOW}", file=sys.stderr)
        return int(bool(os.environ.get("CI")))
    if stamp is not None:
        Path(stamp).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
