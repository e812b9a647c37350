"""Accounting for slurm/devcluster.py: slurmdbd on a MariaDB of its own, with QOS limits and wckeys that Slurm enforces.

MariaDB has no users and no port here (a socket in the cluster's directory, which is private), so none of its system tables
is needed, but that of stored procedures, which slurmdbd makes. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from devmachine import program

SYSTEM_TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")  # of mariadb-server-core
SOCKET, FILL = "db.sock", "sacctmgr.txt"
SOCKET_VARIABLE = "MYSQL_UNIX_PORT"  # by which slurmdbd's client library finds the database

# Of slurm.conf.
SLURM_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
# Not a password: the socket of munged.
AccountingStoragePass={dir}/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=limits,qos,wckeys
TrackWCKey=yes
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
TrackWCKey=yes
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
"""
# For sacctmgr. `small` refuses what is above its limits; a job above `shared` waits.
ACCOUNTS = """\
add cluster {name}
add qos small set MaxWall=10 MaxSubmitJobsPerUser=1 Flags=DenyOnLimit
add qos shared set GrpTRES=node=1
add account dev
add user {user} account=dev defaultaccount=dev qos=normal,small,shared wckey=dev defaultwckey=dev
add user {user} account=dev wckey=paper
"""


def database(folder: Path) -> list[str]:
    """The command of a MariaDB in `folder`, which makes its files there: it need not survive a loss of power."""
    (folder / "db").mkdir()
    # A file of one statement a line, as MariaDB ships that table.
    lines = [
        line for line in SYSTEM_TABLES.read_text().splitlines() if line.startswith("CREATE TABLE IF NOT EXISTS proc ")
    ]
    (folder / "db.sql").write_text("\n".join(["CREATE DATABASE IF NOT EXISTS mysql;", "USE mysql;", *lines, ""]))
    options = {
        "datadir": folder / "db",
        "socket": folder / SOCKET,
        "pid-file": folder / "db.pid",
        "log-error": folder / "db.log",
        "init-file": folder / "db.sql",
        "innodb-buffer-pool-size": "16M",
        "innodb-log-file-size": "8M",
        "aria-log-file-size": "8M",
        "innodb-flush-method": "nosync",
        "innodb-flush-log-at-trx-commit": 0,
        "innodb-doublewrite": 0,
        "sync-frm": 0,
    } | ({"user": "root"} if os.geteuid() == 0 else {})
    switches = ["--no-defaults", "--skip-networking", "--skip-grant-tables"]
    # setsid: unlike Slurm's daemons this one does not detach itself.
    return [
        "setsid",
        "--fork",
        program("mariadbd"),
        *switches,
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def write_files(folder: Path, name: str, user: str, port: int) -> str:
    """slurmdbd.conf and sacctmgr's lines; returns the lines of slurm.conf."""
    values = {"dir": folder, "name": name, "user": user, "port": port}
    (folder / "slurmdbd.conf").touch(mode=0o600)
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
    (folder / FILL).write_text(ACCOUNTS.format(**values))
    return SLURM_CONF.format(**values)
