"""Where a run runs, and on what: what the command line asks for, before it is checked."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.spec.cloud_options import Cloud
    from launch.spec.container import Container


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run runs, and on what.

    Args:
        backend: Its name.
        sbatch, cloud, container, price_per_hour: As in `JobSpec`.
        given: Which fields of `cloud` were given.
    """

    backend: str
    sbatch: dict[str, str]
    cloud: "Cloud | None"
    container: "Container | None"
    price_per_hour: float | None
    given: tuple[str, ...] = ()
