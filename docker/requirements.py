"""Print what an image of jobkit has to install first: `python docker/requirements.py EXTRAS [ACCELERATOR]`."""

import sys
import tomllib
from pathlib import Path


def main(extras: str, accelerator: str = "") -> None:
    """Print one requirement a line.

    Args:
        extras: Names of extras of jobkit, joined by commas; may be empty.
        accelerator: An extra of jax, such as cuda12; empty for the CPU.
    """
    described = tomllib.loads(Path("pyproject.toml").read_text())
    project = described["project"]
    needs = [*described["build-system"]["requires"], "wheel", *project["dependencies"]]
    for extra in filter(None, extras.split(",")):
        needs += project["optional-dependencies"][extra]
    print(*needs, *([f"jax[{accelerator}]"] if accelerator else []), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
