"""What counts as a secret, and where it stays: in the run's own files, for their owner alone."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from support.fake_slurm import fake_slurm

from fixres_dist.base.errors import UserError
from fixres_dist.base.secrets import REDACTED, redacted
from fixres_dist.cli.main import main
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation
from fixres_dist.runs.rundir import RunDir

HEX40 = "0123456789abcdef0123456789abcdef01234567"
TOKENS = (
    *("hf_QwErTyUiOpAsDfGhJkLzXcVbNm12345678", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "AKIAIOSFODNN7EXAMPLE"),
    *(
        HEX40,
        "glpat-abcdefghij0123456789",
        "github_pat_11ABCDEFG0abcdefghij_klmnopqrstuv",
        "xoxb-1234567890-abcdefghij",
    ),
    *("sk-proj-abcdefghijklmnopqrstuvwxyz", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLW9mLWl0"),
)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("around", ["{}", "login {} now", '"{}"', "x={};y", "--opt={}", "a:{}, b"])
def test_texts_in_the_form_of_tokens(token: str, around: str) -> None:
    assert redacted(around.format(token)) == around.format(REDACTED)


@pytest.mark.parametrize(
    "text",
    [
        "export WANDB_API_KEY={}",
        "cluster.env={{WANDB_API_KEY: {}, NCCL_DEBUG: INFO}}",
        '"MY_SECRET": "{}"',
        "AWS_SECRET_ACCESS_KEY = '{}'",
        "--container-env=REGISTRY_TOKEN={}",
        "docker login --password {} -u me",
        "curl -H 'Authorization: Bearer {}' x",
        "https://me:{}@host.example/data",
        "s3://bucket/f?X-Amz-Signature={}&x=1",
        "password: {}",
        "PGPASSWORD={}",
        "mysql --auth-token={}",
    ],
)
def test_values_given_to_names(text: str) -> None:
    assert "canary-12x" not in redacted(text.format("canary-12x"))
    assert REDACTED in redacted(text.format("canary-12x"))


@pytest.mark.parametrize(
    "text",
    [
        "fixres submit --model b0 --res 320 --data /data/imagenet model.checkpoint_key=state_dict",
        "TOKENIZERS_PARALLELISM=false NCCL_DEBUG=INFO",
        "file lacks cls_token: shape [1, 1, 192], pos_embed",
        f"/ci/builds/{HEX40}/runs",
        "the key=value form; tokens: 12; hf_transfer and hf_hub_download",
        "git@github.com:me/x https://host:8080/path?page=2 ssh://git@host/x",
        "MONKEY=1 KEYBOARD=us AUTHOR=me PATH=/bin COMPASS=north",
        "section.key=value, such as tune.epochs=3",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_values_of_the_environment_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", "canary7x")
    assert (
        redacted("its log ends: refused canary7x", {"DB_PASSWORD": "canary8x"}) == f"its log ends: refused {REDACTED}"
    )
    assert redacted("canary8x", {"DB_PASSWORD": "canary8x"}) == REDACTED
    assert "canary7x" not in str(UserError("no file canary7x"))


def test_a_submission_keeps_secrets_for_its_owner(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every place where one can stand: files that the job needs are its owner's, all others and stdout have none."""
    fake_slurm(tmp_path / "bin", monkeypatch)
    words = ["--model", "test_efficientnet", "--weights", "none", "--res", "64", "--data", str(photos)]
    words += ["--cluster", "slurm", "--runs-dir", str(tmp_path / "runs"), "--name", "r", "tune.global_batch=8"]
    settings = (  # `@`: environment.json has the checkout's diff, and may have these lines
        'cluster.env={LAB_KEY: "it\'s can@ry-a", WANDB_API_KEY: can@ry-b, PLAIN: hf_can@rycCANARYcccccc01}',
        "cluster.setup=[export HF_TOKEN=can@ry-d, curl --password can@ry-e x]",
        "cluster.srun_args=[--container-env=API_TOKEN=can@ry-f]",
        "cluster.sbatch={comment: 'password=can@ry-g'}",
    )
    words += [setting.replace("@", "a") for setting in settings]
    before = os.umask(0o022)
    try:
        assert main(["submit", *words]) == 0
        assert main(["submit", *words, "--dry-run"]) == 0
        assert main(["submit", *words[:-1], "--prepare", "--name", "p"]) == 0
    finally:
        os.umask(before)
    said = "".join(capsys.readouterr())
    holders = set()
    for file in filter(Path.is_file, (tmp_path / "runs").rglob("*")):
        if re.search("canary[-c]", file.read_text(errors="replace")):
            holders.add(re.sub(r"file_\w+", "file", file.name))
            closed = [file, *file.parents][: len(file.relative_to(tmp_path / "runs").parts)]
            assert any(not path.stat().st_mode & 0o077 for path in closed), file
    scripts = {"submission.sh", "prepared.sh", "7_submission.sh", ".submission_file.sh"}
    assert holders - {".submission_file.sh"} == {"config.yaml", *scripts} - {".submission_file.sh"}
    assert not re.search("canary[-c]", said)
    run = RunDir(tmp_path / "runs" / "r")
    assert run.config().cluster.env["LAB_KEY"] == "it's can@ry-a".replace("@", "a")
    assert shlex.split(run.again())[1:3] == ["resume", "r"]
    assert run.submission.stat().st_mode & 0o777 == 0o600
    assert not re.search("canary", reading.dump(run.config(), public=True))


def test_a_run_without_secrets_stays_readable(tmp_path: Path) -> None:
    run = preparation.prepare(tmp_path / "r", Config(), "fixres submit")
    assert run.config_file.stat().st_mode & 0o777 == run.state_file.stat().st_mode & 0o777
    assert run.again() == "fixres submit"


@pytest.mark.parametrize("key", ["env={HF_TOKEN: %s}", "setup=export X_KEY=%s", "srun_args=%s", "sbatch={comment: %s}"])
def test_the_stand_in_of_a_secret_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="stands for a secret"):
        reading.parse(Config, reading.overrides([f"cluster.{key % REDACTED}"]))


def test_a_run_is_not_called_by_a_secret(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        preparation.check(tmp_path / TOKENS[0], Config())
    assert TOKENS[0] not in str(refused.value)


def test_events_states_and_failures_leave_secrets_out(tmp_path: Path) -> None:
    run = preparation.prepare(tmp_path / "r", Config(), f"fixres submit --weights https://me:canary@h/{TOKENS[0]}")
    run.event("seen", why=[{"said": f"{TOKENS[1]}", "LAB_PASSWORD": "canary"}])
    run.fail(f"its log ends: {TOKENS[0]}", "PASSWORD=canary fixres submit")
    for file in (run.events, run.state_file, run.failed, run.root / "command.txt"):
        text = file.read_text()
        assert REDACTED in text
        assert not any(secret in text for secret in ("canary", *TOKENS))
