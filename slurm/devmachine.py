"""What slurm/devcluster.py needs of its machine: Debian packages, ports, the user's name. Standard library only."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

# An ordinary user of Debian has no sbin in PATH, yet may run the daemons.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
SLURM = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core"}  # the core: no service that starts by itself


class DevClusterError(RuntimeError):
    """Its message names the value, what is accepted and the next command."""


def program(name: str) -> str:
    return shutil.which(name, path=SEARCH_PATH) or name


def missing_packages(package_of: dict[str, str] = SLURM) -> list[str]:
    """Debian packages whose programs are missing; empty if a cluster, or its accounting, can be started."""
    return [package for name, package in package_of.items() if not shutil.which(name, path=SEARCH_PATH)]


def install_command(packages: list[str]) -> str:
    return f"apt-get update -q && apt-get install -q -y --no-install-recommends {' '.join(packages)}"


def require_packages(install: bool = False) -> None:
    """Raises DevClusterError where programs are missing; `install` installs them first, accounting's too: it needs root."""
    packages = missing_packages()
    if install and os.geteuid() == 0 and shutil.which("apt-get"):
        if packages := [*packages, *missing_packages(ACCOUNTING)]:
            print(f"devcluster: {install_command(packages)}", file=sys.stderr)
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(install_command(packages), shell=True, env=environment, stdout=sys.stderr, check=True)
    elif packages:
        raise DevClusterError(
            f"missing: {', '.join(packages)}. Next, as root: {install_command(packages)}  (`up --install` does it)"
        )


def has_accounting() -> bool:
    """Whether accounting's programs are installed; says what is missing."""
    if packages := missing_packages(ACCOUNTING):
        print(
            f"devcluster: no accounting, so no QOS, limits and wckeys: missing {', '.join(packages)}. "
            f"Next, as root: {install_command(packages)}",
            file=sys.stderr,
        )
    return not packages


def free_ports(count: int) -> list[int]:
    """Ports below 20000: no outgoing connection takes one of them, so a killed node can come back on its own port."""
    ports: set[int] = set()
    while len(ports) < count:
        # Not the global generator: two test processes with one seed would pick the same ports.
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            ports.add(port)
    return list(ports)


def user_name() -> str:
    """Raises DevClusterError for a user without a passwd entry, as in some containers."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise DevClusterError(
            f"uid {os.geteuid()} has no name, which Slurm insists on; accepted: a user with an entry in /etc/passwd"
        ) from None


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether `condition` became true in time."""
    deadline = time.monotonic() + timeout_s
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done
