"""A private cluster with accounting: slurmdbd before a MariaDB of its own, all below the cluster's directory."""

import subprocess
import time
from pathlib import Path

from tests.harness import slurm_packages
from tests.harness.slurm import Cluster, SlurmError, _free_ports, _user

_DBD = """\
AuthType=auth/munge
AuthInfo=socket={prefix}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={prefix}/log/slurmdbd.log
PidFile={prefix}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=accounts
PluginDir={plugins}
"""
_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={prefix}/munge/socket
MinJobAge=2
"""


class AccountedCluster(Cluster):
    """A cluster that forgets a job seconds after its end, and whose accounting does not.

    Args:
        nodes: How many nodes.
        extra_conf: Further lines of slurm.conf.
    """

    def __init__(self, nodes: int = 1, extra_conf: str = "") -> None:
        found = slurm_packages.accounting()
        if found is None:
            raise SlurmError("slurmdbd and MariaDB are not on this machine; remove .venv/slurm and run make test")
        self._found, (self._port,) = found, _free_ports(1)
        super().__init__(nodes=nodes, extra_conf=extra_conf)

    def _write_conf(self, extra_conf: str) -> None:
        super()._write_conf(_CONF.format(port=self._port, prefix=self.prefix) + extra_conf)

    def _start_munged(self) -> None:
        self.slurm = self._found
        self.environment = self._found.environment | {
            "SLURM_CONF": str(self.prefix / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.prefix / "db.sock"),
        }
        super()._start_munged()
        self._start_database()
        conf = self.prefix / "slurmdbd.conf"
        conf.write_text(_DBD.format(prefix=self.prefix, port=self._port, user=_user(), plugins=self.slurm.plugins))
        conf.chmod(0o600)
        self._start("slurmdbd", "slurmdbd", "-D")
        self._wait_port("slurmdbd", self._port)

    def _start_database(self) -> None:
        usr = Path(self.slurm.programs["mariadbd"]).resolve().parent.parent
        data = self.prefix / "data"
        data.mkdir()
        options = ["--no-defaults", f"--datadir={data}", f"--basedir={usr}", f"--lc-messages-dir={usr}/share/mysql"]
        options += ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", f"--user={_user()}"]
        tables = (usr / "share/mysql/mysql_system_tables.sql").read_text()
        made = subprocess.run(
            [self.slurm.programs["mariadbd"], *options, "--bootstrap"],
            input=f"create database if not exists mysql;\nuse mysql;\n{tables}",
            env=self._environ(),
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise SlurmError(f"the database was not made: {made.stderr[-1000:]}")
        socket = self.prefix / "db.sock"
        self._start("mariadbd", "mariadbd", *options, "--skip-grant-tables", "--skip-networking", f"--socket={socket}")
        self._wait_daemon("mariadbd", socket.exists)

    def sacct(self, job: str) -> str:
        """Return the state that the accounting has of a job, '' while it has none."""
        array = job.split("_")[0]
        told = self.run("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={array}")
        return (told.splitlines() or [""])[0]

    def wait_forgotten(self, job: str, timeout_s: float = 120.0) -> None:
        """Wait until SLURM itself knows a job no more, and the accounting has its end."""
        deadline = time.monotonic() + timeout_s
        while job in self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i").split():
            assert time.monotonic() < deadline, f"job {job} is not forgotten"
            time.sleep(0.5)
        self.wait(
            lambda: self.sacct(job) not in ("", "PENDING", "RUNNING"), f"the end of {job} is accounted", timeout_s
        )
