"""The pretended cluster is a real Slurm: GPUs are counted, low jobs preempted, nodes lost, and nothing is left behind.

Skipped where Slurm is not installed, except under CI (variable CI): there a missing package is a failure.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "devcluster.py"
sys.path.insert(0, str(SCRIPT.parent))

import devcluster  # noqa: E402
import devmachine  # noqa: E402
from devcluster import DevCluster  # noqa: E402
from devmachine import DevClusterError, has_accounting, missing_packages, wait_until  # noqa: E402

needs_slurm = pytest.mark.skipif(
    bool(missing_packages()) and "CI" not in os.environ, reason=f"missing packages: {' '.join(missing_packages())}"
)

# Writes one line per start and per signal. On SIGUSR2 it requeues the job and ends, as a trainer that has saved would;
# it ignores SIGTERM, as one that does not listen. Short sleeps: a shell runs its trap when its child has ended, and a
# child that is started just after the signal was sent does not get it.
SPY = """\
note() { echo "$SLURM_PROCID $SLURM_RESTART_COUNT $1" >> "$SPY_LOG"; }
trap 'note TERM' TERM
trap 'note USR2; [ $SLURM_PROCID = 0 ] && scontrol requeue $SLURM_JOB_ID; exit 0' USR2
note start
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
while true; do sleep 0.3; done
"""


def client(cluster: DevCluster, *command: str, **env: str) -> str:
    done = subprocess.run(command, env=cluster.env | env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def submit_spy(cluster: DevCluster, folder: Path, nodes: int) -> tuple[str, Path]:
    """A job in `low` on whole nodes with one spy per node; its id and the file the spies write to."""
    log = folder / "spy.log"
    (folder / "spy.sh").write_text(SPY)
    whole_nodes = ["-N", str(nodes), "--gpus-per-node=8", "--ntasks-per-node=1"]
    job = ["--parsable", "--requeue", "--signal=USR2@20", "--open-mode=append", "-o", str(folder / "job.out")]
    wrapped = f"srun --kill-on-bad-exit=1 bash {folder}/spy.sh"
    return client(cluster, "sbatch", *whole_nodes, *job, "--wrap", wrapped, SPY_LOG=str(log)).strip(), log


def words(log: Path) -> list[tuple[str, str, str]]:
    """(rank, restart count, event) of each line; Slurm leaves the count unset in the first run."""
    text = log.read_text() if log.exists() else ""
    return [(line.split(" ")[0], line.split(" ")[1] or "0", line.split(" ")[2]) for line in text.splitlines()]


def starts(log: Path, restart: int) -> int:
    return sum(1 for _, count, event in words(log) if event == "start" and count == str(restart))


def job_field(cluster: DevCluster, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", client(cluster, "scontrol", "show", "job", "-o", job))
    return found[1] if found else ""


def processes_naming(text: str) -> list[str]:
    """Command lines of processes that have `text` in their arguments or environment, found without devcluster."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in arguments + environment:
            found.append(f"{entry.name} {arguments.decode(errors='replace')}")
    return found


@pytest.fixture(scope="module")
def shared() -> Iterator[DevCluster]:
    with DevCluster(nodes=4, user_signal=True) as cluster:
        yield cluster


@needs_slurm
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_commands_from_up_to_down(user: str) -> None:
    if user == "nobody" and not (os.geteuid() == 0 and shutil.which("setpriv")):
        pytest.skip("only root can become another user; an ordinary user is tested by the other case")
    account = pwd.getpwnam("nobody") if user == "nobody" else pwd.getpwuid(os.geteuid())
    become = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    prefix = ["setpriv", *become] if user == "nobody" else []

    def run(*command: str, conf: str = "") -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {"SLURM_CONF": conf}
        return subprocess.run([*prefix, *command], env=env, cwd="/tmp", capture_output=True, text=True, timeout=60)

    pythons = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
    python = next((p for p in pythons if run(p, "-c", "").returncode == 0), None)
    if python is None:
        pytest.skip(f"{user} may run none of {pythons}")
    # Not in the checkout nor in tmp_path: another user may not be allowed to read there.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    script = str(folder / SCRIPT.name)
    for file in SCRIPT.parent.glob("dev*"):
        shutil.copy(file, folder)
    less = [] if user == "nobody" else ["--no-accounting"]  # the fixture devcluster has this user's accounting
    up = run(python, script, "up", "--nodes", "2", *less)
    assert up.returncode == 0, up.stderr
    printed = re.fullmatch(r"export SLURM_CONF=(/tmp/fixresdev-\w+/slurm\.conf)\n", up.stdout)
    assert printed, up.stdout
    conf = printed[1]
    try:
        task = "echo $SLURMD_NODENAME $(id -un) $CUDA_VISIBLE_DEVICES"
        srun = run("srun", "-N2", "--ntasks-per-node=1", "--gpus-per-node=3", "sh", "-c", task, conf=conf)
        assert sorted(srun.stdout.splitlines()) == [f"n{i} {account.pw_name} 0,1,2" for i in (1, 2)], srun.stderr
        status = run(python, script, "status", conf=conf)
        assert status.returncode == 0
        assert re.fullmatch(rf"up: n1=\w+ n2=\w+ SLURM_CONF={conf}\n", status.stdout)
        stubborn = "trap '' TERM; while true; do sleep 60; done"
        wrap = f'srun --ntasks-per-node=1 bash -c "{stubborn}"'
        sbatch = run("sbatch", "-N2", "--gpus-per-node=8", "-o", "/dev/null", "--wrap", wrap, conf=conf)
        assert sbatch.returncode == 0, sbatch.stderr
        assert wait_until(lambda: sum("trap '' TERM" in line for line in processes_naming(conf)) >= 2, 20)
    finally:
        downs = [run(python, script, "down", conf=conf) for _ in range(2)]  # the second has nothing to do
        status = run(python, script, "status", conf=conf)
        shutil.rmtree(folder)
    assert [down.returncode for down in downs] == [0, 0], downs
    assert status.returncode == 1
    assert processes_naming(conf) == []
    assert not Path(conf).parent.exists()


@needs_slurm
def test_high_preempts_low_with_user_signal(shared: DevCluster, tmp_path: Path) -> None:
    job, log = submit_spy(shared, tmp_path, nodes=4)
    assert wait_until(lambda: starts(log, restart=0) == 4, 20)
    client(shared, "srun", "-p", "high", "-N4", "--ntasks-per-node=1", "--gpus-per-node=8", "true")
    assert wait_until(lambda: starts(log, restart=1) == 4, 60), words(log)
    for rank in "0123":
        assert [event for r, _, event in words(log) if r == rank][:2] == ["start", "USR2"], "warned by SIGUSR2 first"
    assert wait_until(lambda: job_field(shared, job, "JobState") == "COMPLETED", 20)
    assert job_field(shared, job, "Restarts") == "1"


@needs_slurm
def test_high_preempts_low_without_user_signal(tmp_path: Path) -> None:
    """The spy ignores SIGTERM, so Slurm itself requeues the job when it sees the grace time is over (every 30 s)."""
    with DevCluster(nodes=2, user_signal=False, grace_s=1) as cluster:
        job, log = submit_spy(cluster, tmp_path, nodes=2)
        assert wait_until(lambda: starts(log, restart=0) == 2, 20)
        client(cluster, "srun", "-p", "high", "-N2", "--ntasks-per-node=1", "--gpus-per-node=8", "true")
        assert wait_until(lambda: starts(log, restart=1) == 2, 60), words(log)
        assert "USR2" not in {event for _, _, event in words(log)}
        assert ("0", "0", "TERM") in words(log)
        assert wait_until(lambda: job_field(cluster, job, "JobState") == "COMPLETED", 20)
        assert job_field(cluster, job, "Restarts") == "1"


@needs_slurm
def test_a_lost_node_moves_the_job_and_can_come_back(shared: DevCluster, tmp_path: Path) -> None:
    job, log = submit_spy(shared, tmp_path, nodes=2)
    assert wait_until(lambda: starts(log, restart=0) == 2, 20)
    lost = job_field(shared, job, "NodeList")
    assert lost == "n[1-2]"
    shared.kill_node("n2")
    assert wait_until(lambda: starts(log, restart=1) == 2, 100), words(log)
    assert wait_until(lambda: job_field(shared, job, "JobState") == "COMPLETED", 20)
    assert "n2" not in client(shared, "scontrol", "show", "hostnames", job_field(shared, job, "NodeList")).split()
    assert shared.node_states()["n2"].startswith("down")
    shared.revive_node("n2")
    assert client(shared, "srun", "-w", "n2", "sh", "-c", "echo $SLURMD_NODENAME") == "n2\n"


@needs_slurm
def test_clusters_do_not_clash_and_the_users_processes_survive(shared: DevCluster) -> None:
    with DevCluster(nodes=1) as other:
        editor = subprocess.Popen(["sleep", "60"], env=other.env)  # started in a shell where SLURM_CONF is exported
        assert client(other, "scontrol", "show", "config") != client(shared, "scontrol", "show", "config")
    try:
        assert editor.poll() is None
    finally:
        editor.kill()
        editor.wait()
    assert not other.dir.exists()
    other.down()  # once more: nothing to do
    assert "idle" in shared.node_states()["n1"]
    assert DevCluster.at(shared.dir).node_names == ["n1", "n2", "n3", "n4"]


@needs_slurm
def test_up_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devcluster, "NODE_SIZE", "CPUs=sixteen")
    cluster = DevCluster(nodes=1)
    with pytest.raises(DevClusterError, match=r"slurmctld ended with 1:(.|\n)*sixteen"):
        cluster.up()
    assert not cluster.dir.exists()
    assert processes_naming(str(cluster.dir)) == []


@needs_slurm
def test_unknown_nodes_and_existing_directories_are_refused(shared: DevCluster) -> None:
    with pytest.raises(DevClusterError, match="no node n9; accepted: n1, n2, n3, n4"):
        shared.kill_node("n9")
    with pytest.raises(DevClusterError, match="exists; accepted: a new one"):
        shared.up()
    assert client(shared, "srun", "true") == ""


@pytest.mark.parametrize("text", ["ClusterName=production\n", "ClusterName=fixresdev_0123\n", ""])
def test_down_refuses_another_slurm(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    done = subprocess.run([sys.executable, str(SCRIPT), "down"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "accepted: what devcluster.py up made" in done.stderr
    assert conf.exists()


def test_missing_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devmachine, "SEARCH_PATH", "")
    assert missing_packages() == ["munge", "slurmctld", "slurmd", "slurm-client"]
    with pytest.raises(DevClusterError, match=r"apt-get install .*munge slurmctld slurmd slurm-client"):
        DevCluster().up()
    assert not has_accounting(), "a cluster starts without it"
    assert "missing slurmdbd, mariadb-server-core. Next, as root: apt-get update" in capsys.readouterr().err


def test_without_slurm_up_ends_with_2_and_one_line() -> None:
    hidden = "import runpy, shutil, sys; shutil.which = lambda *a, **k: None; sys.argv = ['devcluster.py', 'up']; "
    hidden += f"sys.path.insert(0, {str(SCRIPT.parent)!r}); "  # as for a script
    code = hidden + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
