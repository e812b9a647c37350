#!/usr/bin/env python3
"""A real Slurm on one machine: to try the service with its preemptions on a laptop, and for the tests.

    eval "$(python slurm/devcluster.py up)"      # 4 nodes with 8 pretended GPUs each; as root or as an ordinary user
    sbatch -p high ...                           # `high` preempts: `low` (the default) by requeue, `cancel`, `suspend`
    sbatch -p short ...; sbatch --qos=small ...  # limits: `short` 30 min; QOS `small` 10 min and one job, `shared` one node
    python slurm/devcluster.py status            # also: kill-node n2, revive-node n2
    python slurm/devcluster.py down              # no process and no directory is left

Every process of a cluster has SLURM_CLUSTER_NAME in its environment: Slurm sets it in jobs, `up` for the daemons. A
shell (editor, test run) in which SLURM_CONF was exported lacks it. `down` and `kill-node` kill by that variable, never by the
name of a program, so they spare the user's own processes, other dev clusters and a real Slurm.
Measured with Slurm 22.05 (Debian 12). Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import devaccounting
from devmachine import DevClusterError, free_ports, has_accounting, program, require_packages, user_name, wait_until

TEMPLATE = Path(__file__).with_name("devcluster.conf")
PREFIX = "fixresdev"  # begins every ClusterName of ours
NODE_SIZE = "CPUs=16 RealMemory=1000000 Gres=gpu:8"


@dataclass(frozen=True)
class DevCluster:
    """One cluster. Its directory describes it: one process may call `up`, another `DevCluster.at(dir).down()`.

    The directory is in /tmp whatever TMPDIR says: a Unix socket's path has at most 107 bytes, Slurm appends up to 35.
    """

    nodes: int = 4
    user_signal: bool = True
    grace_s: int = 10
    accounting: bool = False  # slurmdbd with QOS, limits and wckeys (devaccounting.py), which take 6 s more to start
    dir: Path = field(default_factory=lambda: Path(f"/tmp/{PREFIX}-{secrets.token_hex(4)}"))

    @classmethod
    def at(cls, dir: Path) -> DevCluster:
        """The cluster that was started in `dir`, with its number of nodes; the other options matter to `up` alone.

        Raises DevClusterError for a directory that `up` has not made, since `down` deletes and kills.
        """
        conf = dir / "slurm.conf"
        text = conf.read_text() if conf.is_file() else ""
        cluster = cls(nodes=text.count("\nNodeName="), dir=dir)
        seen = re.search(r"(?i)\bClusterName=\S+", text)
        if not seen or seen[0] != f"ClusterName={cluster.name}":
            raise DevClusterError(f"{conf} has {seen and seen[0]}; accepted: what devcluster.py up made ({PREFIX}_...)")
        return cluster

    @property
    def name(self) -> str:
        """ClusterName, made from the directory: unique on the host, and known when the directory is gone."""
        return f"{PREFIX}_{hashlib.sha256(str(self.dir).encode()).hexdigest()[:12]}"

    @property
    def env(self) -> dict[str, str]:
        """Environment for clients, without variables of an outer job, which would change what srun and sbatch do."""
        outer = ("SLURM", "SBATCH", "SRUN", "SALLOC", "PMI")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        return kept | {"SLURM_CONF": str(self.dir / "slurm.conf")}

    def up(self) -> None:
        """Start everything and wait until an srun over all nodes works; on an error remove everything and raise it."""
        require_packages()
        if self.nodes < 1 or self.grace_s < 0:
            raise DevClusterError(f"nodes={self.nodes}, grace_s={self.grace_s}; accepted: nodes from 1, grace_s from 0")
        if not re.fullmatch(r"/[\w./-]{1,70}", str(self.dir)):
            raise DevClusterError(f"directory {self.dir}; accepted: absolute, up to 71 letters, digits, . _ - /")
        if self.dir.exists():
            raise DevClusterError(f"{self.dir} exists; accepted: a new one. Next: devcluster.py down --dir {self.dir}")
        self.dir.mkdir(mode=0o700)  # only the user who starts it may submit, and all jobs run as that user
        try:
            self._write_files()
            parts = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            # --force: munged refuses a private directory, which is right here.
            self._start("munged", "--force", *(f"--{key}={self.dir}/munge.{end}" for key, end in parts.items()))
            if self.accounting:
                self._start_accounting()
            self._start("slurmctld")
            for node in self.node_names:
                self._start("slurmd", "-N", node, node=node)
            # sinfo shows a node as idle before its slurmd has registered, so only a step on every node proves it.
            probe = ["srun", "-N", str(self.nodes), "--ntasks-per-node=1", "--immediate=1", "true"]
            if not wait_until(lambda: self._client(*probe) is not None, 30):
                raise DevClusterError(f"no srun over {self.nodes} nodes worked in 30 s:\n{self._complaints()}")
        except BaseException:
            self._remove()
            raise

    def down(self) -> None:
        """Cancel all jobs, stop the daemons, kill what ignores signals, remove the directory. May be repeated."""
        if os.environ.get("SLURM_CLUSTER_NAME") == self.name:
            raise DevClusterError("`down` in a job of the cluster would kill itself; accepted: a shell outside of it")
        # First wait for Slurm's own SIGKILL, about 7 s after scancel: it follows the process tree, so that it also
        # reaches a task that has cleared its environment.
        if self._pids() and self._client("scancel", "-u", str(self.dir.stat().st_uid)) is not None:
            wait_until(lambda: self._client("squeue", "-h") in ("", None), 12)
        self._remove()

    def kill_node(self, node: str) -> None:
        """Lose a node: SIGKILL for its slurmd, step daemons and tasks. Slurm notices after SlurmdTimeout or later."""
        self._check(node)
        self._kill(node)

    def revive_node(self, node: str) -> None:
        """Start the slurmd of a killed node and wait until Slurm uses the node again."""
        self._check(node)
        if "slurmd" not in {self._program(pid) for pid in self._pids(node)}:  # its steps may have outlived it
            self._start("slurmd", "-N", node, node=node)
        if not wait_until(lambda: self.node_states().get(node) in ("idle", "mixed", "allocated"), 30):
            raise DevClusterError(f"{node} is not back 30 s after its start:\n{self._complaints()}")

    @property
    def node_names(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.nodes)]

    def node_states(self) -> dict[str, str]:
        """State of each node in Slurm's words (a trailing *: it does not answer); empty if the cluster is down."""
        text = self._client("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T") if self._pids() else None
        return dict(line.split() for line in (text or "").splitlines())

    def __enter__(self) -> DevCluster:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _write_files(self) -> None:
        for name in ["state", "dev", *self.node_names]:
            (self.dir / name).mkdir()
        (self.dir / "munge.key").touch(mode=0o600)
        (self.dir / "munge.key").write_bytes(secrets.token_bytes(1024))
        # Slurm accepts only devices as GPUs, and an ordinary user cannot make one; a link to /dev/null is accepted.
        for i in range(8):
            (self.dir / "dev" / f"gpu{i}").symlink_to("/dev/null")
        (self.dir / "gres.conf").write_text(f"Name=gpu File={self.dir}/dev/gpu[0-7]\n")
        host, ports = socket.gethostname().split(".")[0], free_ports(self.nodes + 2)
        at = f"NodeHostname={host} NodeAddr=127.0.0.1 {NODE_SIZE}"
        nodes = [f"NodeName={node} Port={port} {at}" for node, port in zip(self.node_names, ports[2:], strict=True)]
        # Without the signal there must be no such line: Slurm does not parse an empty value.
        user_signal = "SlurmctldParameters=preempt_send_user_signal" if self.user_signal else ""
        values = vars(self) | {"name": self.name, "user": user_name(), "host": host, "port": ports[0]}
        values |= {"user_signal": user_signal, "nodes": "\n".join(nodes), "accounting": ""}
        if self.accounting:
            values["accounting"] = devaccounting.write_files(self.dir, self.name, user_name(), ports[1])
        (self.dir / "slurm.conf").write_text(TEMPLATE.read_text().format(**values))

    def _start_accounting(self) -> None:
        """Before slurmctld, which otherwise ends for want of it."""
        self._start(*devaccounting.database(self.dir))
        if not wait_until((self.dir / devaccounting.SOCKET).exists, 20):
            raise DevClusterError(f"mariadbd made no socket in 20 s:\n{self._complaints()}")
        self._start("slurmdbd", **{devaccounting.SOCKET_VARIABLE: str(self.dir / devaccounting.SOCKET)})
        if not wait_until(lambda: self._client("sacctmgr", "-n", "list", "cluster") is not None, 20):
            raise DevClusterError(f"slurmdbd does not answer after 20 s:\n{self._complaints()}")
        with (self.dir / devaccounting.FILL).open() as lines:
            subprocess.run(["sacctmgr", "-i", "-Q"], env=self.env, stdin=lines, capture_output=True, timeout=60)
        if user_name() not in (self._client("sacctmgr", "-n", "list", "associations", "format=user") or "").split():
            raise DevClusterError(f"sacctmgr made no user {user_name()}:\n{self._complaints()}")

    def _start(self, name: str, *arguments: str, node: str = "", **variables: str) -> None:
        """Start a daemon, which detaches itself. No handle is kept: `_pids` finds it by its environment."""
        command = [program(name), *arguments]
        environment = self.env | variables | {"SLURM_CLUSTER_NAME": self.name, "SLURMD_NODENAME": node}
        with (self.dir / "start.log").open("ab") as log:
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if done.returncode != 0:
            raise DevClusterError(f"{' '.join(command)} ended with {done.returncode}:\n{self._complaints()}")

    def _client(self, *command: str) -> str | None:
        """Output of a Slurm command; None if it failed, or hung, as it does without a controller."""
        with suppress(subprocess.SubprocessError):
            return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=10, check=True).stdout
        return None

    def _pids(self, node: str = "") -> list[int]:
        """Daemons and job processes of the cluster, or of one node; zombies, without an environment, are not found."""
        marks = {f"SLURM_CLUSTER_NAME={self.name}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if marks <= set((entry / "environ").read_text(errors="replace").split("\0")):
                    found.append(int(entry.name))
        return found

    @staticmethod
    def _program(pid: int) -> str:
        with suppress(OSError):
            return Path(f"/proc/{pid}/comm").read_text().strip()
        return ""

    def _signal(self, number: signal.Signals, node: str = "") -> list[int]:
        """The processes that got the signal."""
        pids = self._pids(node)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def _kill(self, node: str = "") -> None:
        # Repeated until none is found: a process may fork while the list is read.
        if not wait_until(lambda: not self._signal(signal.SIGKILL, node), 10):
            raise DevClusterError(f"processes {self._pids(node)} survive SIGKILL. Next: look at /proc/PID/stack")

    def _remove(self) -> None:
        self._signal(signal.SIGTERM)
        wait_until(lambda: not self._pids(), 3)
        self._kill()
        if self.dir.exists():
            shutil.rmtree(self.dir)

    def _check(self, node: str) -> None:
        if node not in self.node_names:
            raise DevClusterError(f"no node {node}; accepted: {', '.join(self.node_names)}")

    def _complaints(self) -> str:
        """The last errors in the daemons' logs, for the message of a failing `up`, which removes the logs."""
        lines = [f"  {log.name}: {line}" for log in self.dir.glob("*.log") for line in log.read_text().splitlines()]
        return "\n".join([line for line in lines if re.search(r"(?i)error|fatal", line) and "pmix" not in line][-20:])


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Slurm on one machine, for trials and tests.")
    parser.add_argument("command", choices=["up", "down", "status", "kill-node", "revive-node"])
    parser.add_argument("node", nargs="?", default="", help="for kill-node and revive-node, such as n2")
    parser.add_argument("--dir", type=os.path.abspath, help="default: `up` makes one, the others use SLURM_CONF")
    parser.add_argument("--nodes", type=int, default=4, help="up: how many, with 8 pretended GPUs each")
    parser.add_argument("--grace-s", type=int, default=10, help="up: GraceTime of `low`; Slurm acts up to 30 s later")
    parser.add_argument("--no-accounting", action="store_true", help="up: without slurmdbd, QOS and wckeys: 6 s faster")
    parser.add_argument("--no-user-signal", action="store_true", help="up: no SIGUSR2 to preempted jobs, only SIGTERM")
    parser.add_argument("--install", action="store_true", help="up: first install missing Debian packages, as root")
    args = parser.parse_args()
    given = [Path(args.dir)] if args.dir else []
    if args.command == "up":
        require_packages(args.install)
        accounting = not args.no_accounting and has_accounting()
        cluster = DevCluster(args.nodes, not args.no_user_signal, args.grace_s, accounting, *given)
        cluster.up()
        print(
            f"devcluster: {args.nodes} nodes are up until: python slurm/devcluster.py down --dir {cluster.dir}",
            file=sys.stderr,
        )
        print(f"export SLURM_CONF={cluster.dir}/slurm.conf")
        return 0
    if not given and not os.environ.get("SLURM_CONF"):
        known = " ".join(str(path) for path in Path("/tmp").glob(f"{PREFIX}-*")) or "none"
        raise DevClusterError(f"neither --dir nor SLURM_CONF is given; accepted: a dev cluster, in /tmp: {known}")
    directory = given[0] if given else Path(os.environ["SLURM_CONF"]).parent
    cluster = DevCluster.at(directory) if directory.exists() else DevCluster(dir=directory)
    if args.command == "status":
        states = " ".join(f"{node}={state}" for node, state in cluster.node_states().items())
        print(f"up: {states} SLURM_CONF={directory}/slurm.conf" if states else f"down: {directory}")
        return 0 if states else 1
    if args.command == "down":
        cluster.down()
        print(f"devcluster: nothing is left of {directory}. Next: unset SLURM_CONF", file=sys.stderr)
    else:
        (cluster.kill_node if args.command == "kill-node" else cluster.revive_node)(args.node)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DevClusterError, OSError, subprocess.CalledProcessError) as error:
        print(f"devcluster: {error}", file=sys.stderr)
        sys.exit(2)
