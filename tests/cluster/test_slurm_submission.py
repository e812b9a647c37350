"""What a submission gives to sbatch, and what it makes of Slurm's answers: with stand-ins for Slurm's programs."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_slurm import calls, fake_slurm
from support.folders import write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.cli import submission
from fixres_dist.cli.main import main
from fixres_dist.cluster import jobs, slurm
from fixres_dist.config import reading
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import ranks

DRAINED = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
NODES = r"""case "$*" in *-N*) printf 'n1|drained|128|gpu:h100:8(S:0-1)\nn2|idle|128|gpu:h100:8(S:0-1)\n';; *) exit 1;; esac"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "data", 8, 4)


def submit(tmp_path: Path, data: Path, *more: object) -> int:
    model = [
        "--model",
        "test_efficientnet",
        "--weights",
        "none",
        "--res",
        "64",
        "--data",
        str(data),
        "--cluster",
        "slurm",
    ]
    where = ["--runs-dir", str(tmp_path / "runs"), "--name", "r", "--gpus-per-node", "2"]
    return main(["submit", *model, *where, "tune.global_batch=16", *map(str, more)])


def text_of(*settings: str) -> str:
    return jobs.sbatch_text(reading.parse(Config, reading.overrides(list(settings))), RunDir(Path("/runs/r")))


def test_slurms_mail_is_an_option_like_any_other(tmp_path: Path) -> None:
    lines = text_of('cluster.sbatch={mail-type: "END,FAIL,ARRAY_TASKS", mail-user: you@site.org}').splitlines()
    assert {"#SBATCH --mail-type=END,FAIL,ARRAY_TASKS", "#SBATCH --mail-user=you@site.org"} <= set(lines)


def test_any_option_of_sbatch_can_be_given_and_none_is_given_unasked() -> None:
    assert "wckey" not in text_of()
    options = (
        "{reservation: maint, comment: 'two words', exclusive: true, mail-type: END, wckey: vision, licenses: 'a:1'}"
    )
    lines = text_of(f"cluster.sbatch={options}").splitlines()
    wanted = ("reservation=maint", "comment='two words'", "exclusive", "mail-type=END", "wckey=vision", "licenses=a:1")
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)


@pytest.mark.parametrize(
    ("options", "there", "gone"),
    [
        ("{gres: 'gpu:h100:8'}", "--gres=gpu:h100:8", "--gpus-per-node"),
        ("{gpus-per-node: 'h100:8'}", "--gpus-per-node=h100:8", "--gpus-per-node=8"),
        ("{gpus_per_node: none}", "--ntasks-per-node=8", "--gpus-per-node"),
        ("{gres: 'tmpdisk:100'}", "--gpus-per-node=8", "none"),
        ("{mem-per-gpu: 60G}", "--mem-per-gpu=60G", "--mem=0"),
        ("{wckey: none}", "--nodes=1", "wckey"),
        ("{export: NONE}", "--export=NONE", "none"),
    ],
)
def test_an_option_replaces_ours_that_says_the_same(options: str, there: str, gone: str) -> None:
    lines = [line for line in text_of(f"cluster.sbatch={options}").splitlines() if line.startswith("#SBATCH")]
    assert f"#SBATCH {there}" in lines
    assert not any(gone in line.split("=")[0] or line.endswith(gone) for line in lines)


def test_without_the_callers_environment_the_ranks_get_the_batch_scripts() -> None:
    assert "srun --unbuffered" in text_of("cluster.sbatch={export: NONE}")
    assert " --export=ALL " in text_of("cluster.sbatch={export: NONE}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cluster.sbatch={partition: gpu}", "Next: cluster.partition=gpu"),
        ("cluster.sbatch={gpus: 4}", "Next: cluster.gpus_per_node=4"),
        ("cluster.sbatch={requeue: false}", "a run sets --requeue itself"),
        ("cluster.sbatch={C: h100}", "accepted: long names"),
        ('cluster.sbatch={comment: "a\\n#SBATCH --uid=0"}', "accepted: one line"),
        ('cluster.partition="gpu\\nrm -r x"', "accepted: one line"),
        ('cluster.env={"A=1\\nrm -r x": 1}', "names of environment variables"),
        ("cluster.env={MY-NAME: 1}", "names of environment variables"),
        ("cluster.signal_delay_s=3600", "fewer seconds than the time limit"),
    ],
)
def test_values_that_would_break_the_batch_script_are_refused(setting: str, words: str) -> None:
    section, _, value = setting.partition("=")
    given = reading.read_yaml(value) if value.startswith('"') else value
    with pytest.raises(UserError) as refused:
        text_of(f"{section}={given}", "cluster.time=1:00:00")
    assert words in str(refused.value)


def test_a_refusal_says_what_was_asked(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, "echo 'sbatch: error: Invalid wckey specification' >&2; exit 1")
    assert submit(tmp_path, data, "cluster.account=vision") == 2
    said = capsys.readouterr().err
    assert "cluster.sbatch={wckey: NAME}" in said
    assert "Asked: --account=vision" in said
    assert "--gpus-per-node=2" in said
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_a_refusal_that_comes_with_the_submission_ends_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = (
        f'case "$*" in *--test-only*) {":"};; *) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; esac'
    )
    fake_slurm(tmp_path / "bin", monkeypatch, sbatch=late)
    assert submit(tmp_path, data) == 2
    assert "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert RunDir(tmp_path / "runs" / "r").state().state == "failed"


def test_variables_of_the_shell_that_sbatch_does_not_get_are_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "interactive")
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert submit(tmp_path, data) == 0
    assert "sbatch does not get SBATCH_PARTITION=interactive" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["submit", "resume"])
def test_drained_nodes_are_waited_for(
    command: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fake_slurm(tmp_path / "bin", monkeypatch, DRAINED, sinfo=NODES)
    assert submit(tmp_path, data, "--nodes", 2) == 0
    if command == "resume":
        capsys.readouterr()
        assert main(["resume", "r", "--gpus-per-node", "4", "--runs-dir", str(tmp_path / "runs")]) == 0
        assert "#SBATCH --gpus-per-node=4" in (folder / "sbatch.text").read_text()
    said = capsys.readouterr()
    assert "Requested node configuration is not available; out of service: n1. The job is queued" in said.err
    assert "submitted r as job 7" in said.out
    assert "#SBATCH --nodes=2" in (folder / "sbatch.text").read_text()


def test_what_no_node_could_give_is_still_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, DRAINED, sinfo=NODES)
    assert submit(tmp_path, data, "--nodes", 4) == 2
    assert "change --nodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gres", "enough"),
    [
        ("gpu:8", True),
        ("gpu:h100:8(S:0-1)", True),
        ("gpu:a100:4,gpu:h100:4", True),
        ("gpu:4", False),
        ("(null)", False),
    ],
)
def test_gpus_of_a_node(gres: str, enough: bool) -> None:
    assert slurm.fits("64+", gres, slurm.Need(1, 8, 64)) is enough


def test_a_queued_run_is_recognised_before_slurm_is_asked_for_room(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = "echo 'allocation failure: Job violates accounting policy' >&2; exit 1"
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert submit(tmp_path, data) == 0
    fake_slurm(tmp_path / "bin", monkeypatch, refuses, squeue="echo '7|PENDING|Resources|'")
    for again in (lambda: submit(tmp_path, data), lambda: main(["resume", "r", "--runs-dir", str(tmp_path / "runs")])):
        assert again() == 0
        assert "r is in the queue already, as job 7" in capsys.readouterr().out


LIMITED = """case "$*" in *partition*) echo 'PartitionName=gpu Default=YES MaxTime=1-00:00:00';; *) echo 'KillWait = 300 sec';; esac"""


def test_a_time_above_the_partitions_limit_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, scontrol=LIMITED)
    assert submit(tmp_path, data, "cluster.time=2-0") == 2
    assert "above the limit of partition gpu, 1-00:00:00. Next: cluster.time=1-00:00:00" in capsys.readouterr().err
    assert submit(tmp_path, data) == 0
    assert "below this cluster's KillWait of 300 s" in capsys.readouterr().err


def test_runs_with_other_resources_are_jobs_of_their_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_slurm(tmp_path / "bin", monkeypatch)
    assert submit(tmp_path, data, "--grid", "cluster.nodes=1,2", "--grid", "tune.epochs=1,2") == 0
    submitted = [call for call in calls(folder, "sbatch") if "--test-only" not in call]
    texts = [file.read_text() for file in (tmp_path / "runs").glob("*/submission.sh")]
    assert len(submitted) == 2
    for nodes in (1, 2):
        mine = [text for text in texts if f"#SBATCH --nodes={nodes}\n" in text]
        assert len(mine) == 2
        assert all(f"nodes={nodes}-epochs" in text and "--array=0-1%2" in text for text in mine)


@pytest.mark.parametrize("where", ["local", "slurm"])
def test_a_dry_run_of_a_table_sums_its_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["submit", "--table", "2", "--dry-run", "--cluster", where, "--gpus-per-node", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    each = [line for line in lines if line.startswith("run        runs/")]
    (total,) = [line for line in lines if line.startswith("all ")]
    assert f"{len(each) - 1} runs: about" in total  # the first line is the plan's
    here = "one after another on the "
    assert (here in total, "hours of one H200" in total) == (where == "local", where == "slurm")
    assert ("without decoding, start-up, compiling and the wait in a queue" in total) == (where == "slurm")
    assert all(line.endswith("in 8 process(es)" if where == "local" else "on 8") for line in each[1:])


@pytest.mark.parametrize("in_image", [False, True])
def test_the_printed_sbatch_command_carries_all_settings_and_works_in_any_folder(
    in_image: bool, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.sbatch is run as the shell script that it is, with an srun that shows what it got."""
    shows = 'echo "$NCCL_IB_TIMEOUT|$GREETING|$FIXRES_JOB|$LOADED" > "$0.env"; for a in "$@"; do echo "$a"; done > "$0.args"'
    folder = fake_slurm(tmp_path / "bin", monkeypatch, srun=shows)
    home = tmp_path / "with space"
    home.mkdir()
    keys = ["cluster.env={NCCL_IB_TIMEOUT: 22, GREETING: it's here}", "cluster.setup=[export LOADED=cuda]"]
    keys += ["cluster.srun_args=[--container-image=/images/a b.sqsh]", "cluster.sbatch={comment: two words}"]
    keys += ["cluster.python=apptainer exec 'a b.sif' $GREETING python3"] * in_image
    assert submit(home, data, "--nodes", "1-2", "--prepare", *keys) == 0
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("Next: "))
    assert {"--comment=two words", "--nodes=1-2", "--cpus-per-task=16", "--signal=USR2@120"} <= set(words)
    assert not any(word.startswith("--ntasks-per-node") for word in words), "srun gets the tasks of a job that may grow"
    script, root = words[-2:]
    (home / "runs" / "r" / "code" / "fixres_dist" / "cluster" / "requeue.py").write_text("")
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": ""}
    done = subprocess.run(["bash", script, root], cwd="/", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "srun.env").read_text() == "22|it's here|5|cuda\n"
    passed = (folder / "srun.args").read_text().splitlines()
    assert {"--kill-on-bad-exit=1", "--container-image=/images/a b.sqsh", "--ntasks-per-node=2"} <= set(passed)
    started = ["apptainer", "exec", "a b.sif", "it's", "here", "python3"] if in_image else [sys.executable]
    assert passed[passed.index(started[0]) :][: len(started) + 1] == [*started, "-m"]


# Two values of each setting of the cluster.
UNUSUAL: dict[str, tuple[object, object]] = {
    "nodes": ("3", "2-5"),
    "gpus_per_node": (3, 5),
    "cpus_per_task": (7, 9),
    "mem": ("70G", "0"),
    "time": ("1:23:00", "2-0"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude"), ("an odd one", "another")),
    "signal_delay_s": (77, 78),
    "max_restarts": (3, 4),
    "env": ({"A": "it's"}, {"A": "it's", "B": "2"}),
    "setup": (("module load x",), ("module load 'y z'", "ulimit -n 9")),
    "python": ("", "apptainer exec --nv a.sif python3"),
    "srun_args": (("--container-image=/a b",), ("--mpi=none",)),
    "sbatch": ({"comment": "two words"}, {"wckey": "paper", "gres": "gpu:h100:3", "mem-per-gpu": "9G"}),
    "on_change": ("echo $FIXRES_RUN", "true"),
}
READ_FROM_CONFIG = {"max_restarts", "on_change"}  # by the last line of either batch script


def test_a_prepared_run_carries_every_setting_of_the_cluster(tmp_path: Path) -> None:
    """What changes the script of `submit` changes the printed command or prepared.sh too."""
    names = {field.name for field in dataclasses.fields(Cluster)}
    assert names == set(UNUSUAL), "a setting that this test does not know"
    run = RunDir(tmp_path / "r")
    run.root.mkdir()

    def scripts(**changed: object) -> tuple[str, str]:
        config = Config(cluster=Cluster(**{name: values[0] for name, values in UNUSUAL.items()} | changed))
        jobs.write_prepared(run, config)
        return jobs.sbatch_text(config, run), jobs.sbatch_command(run, config, Path("x")) + run.prepared.read_text()

    first = scripts()
    for name, (_, other) in UNUSUAL.items():
        changed = [before != after for before, after in zip(first, scripts(**{name: other}), strict=True)]
        assert changed == [name not in READ_FROM_CONFIG] * 2, name


def test_a_job_of_another_purpose_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's job, and a job that was submitted from one of ours with its environment."""
    assert slurm.own_job({"SLURM_JOB_ID": "7"}) is None
    assert slurm.own_job({"SLURM_JOB_ID": "8", "FIXRES_JOB": "7"}) is None
    assert slurm.own_job({"SLURM_JOB_ID": "7", "FIXRES_JOB": "7"}) == "7"
    assert "export FIXRES_JOB=$SLURM_JOB_ID" in text_of()


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_a_run_of_this_machine_takes_no_rank_from_the_job_around_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `srun -n2 --pty` it waited for a second rank, and Ctrl-C requeued the job that it was typed in."""
    around = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    for name, value in {**around, **torchrun, "SLURM_NNODES": "1", "FIXRES_JOB": "5"}.items():
        monkeypatch.setenv(name, value)
    seen: list[object] = []

    def work(*_: object) -> int:
        seen.extend((ranks.launched(os.environ).world_size, slurm.own_job()))
        return 0

    monkeypatch.setattr("fixres_dist.training.worker.train", work)
    monkeypatch.setattr("fixres_dist.cluster.local.run_local", work)
    run = RunDir(tmp_path / "r")
    run.root.mkdir()
    assert submission.start_here(run, Config(), kind) == 0
    assert seen == [1, None]
    assert os.environ["SLURM_JOB_ID"] == "5"
