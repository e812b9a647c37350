from __future__ import annotations

from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config


def parsed(*items: str) -> Config:
    return reading.parse(Config, reading.overrides(list(items)))


def test_written_and_read_again_it_is_equal() -> None:
    config = parsed(
        *("model.name=b0", "tune.base_lr=1e-3", "pretrain.epochs=4", "run.batch_per_device=8", "run.compile=true"),
        *(
            "cluster.time=24:00:00",
            "cluster.env={NCCL_SOCKET_IFNAME: ib0}",
            "cluster.srun_args=[--container-image=a:b]",
        ),
    )
    assert reading.load(reading.dump(config)) == config
    assert config.tune.base_lr == 1e-3
    assert config.cluster.time == "24:00:00", "YAML 1.1 reads this as 86400"
    assert config.cluster.env == {"NCCL_SOCKET_IFNAME": "ib0"}
    assert config.pretrain is not None
    assert config.pretrain.policy == "all"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("tune.epoch=3", ["'tune.epoch'", "Did you mean 'tune.epochs'"]),
        ("tun.epochs=3", ["'tun'", "Did you mean 'tune'"]),
        ("tune.epochs=three", ["tune.epochs", "'three'", "whole number"]),
        ("tune.epochs=1.5", ["tune.epochs", "whole number"]),
        ("tune.epochs=-1", ["epochs", "0 or more"]),
        ("tune.global_batch=0", ["global_batch", "1 or more"]),
        ("tune.base_lr=nan", ["tune.base_lr", "a number"]),
        ("tune.policy=clasifier", ["Did you mean 'classifier'", "last_block"]),
        ("tune.repeats=0", ["repeats is 0", "1 or more"]),
        ("tune.average_epochs=2", ["average_epochs is 2 of 1 epochs", "0 .. epochs"]),
        ("tune.momentum=1", ["momentum", "< 1"]),
        ("run.compile=maybe", ["run.compile", "true, false, auto"]),
        ("run.engine=cache", ["run.engine", "Did you mean 'cached'"]),
        ("data.res=0", ["res is 0", "32 or more"]),
        ("cluster.nodes=4-1", ["nodes", "MIN-MAX"]),
        ("epochs", ["section.key=value"]),
    ],
)
def test_what_does_not_fit_is_refused_with_help(item: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parsed(item)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [
        *(
            f"cluster.{key}=x\nrm -r y"
            for key in ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "python")
        ),
        'cluster.srun_args=["--x\\nrm"]',
        'cluster.sbatch={comment: "x\\nrm"}',
        'cluster.sbatch={"comment\\nrm": x}',
        'cluster.env={"A\\nrm": x}',
        'cluster.env={"A=1; rm y; B": x}',
        'cluster.env={A: "x\\e[2J"}',
        "cluster.on_change=x\x1b[2J",
    ],
)
def test_no_setting_becomes_a_line_of_the_batch_script(item: str) -> None:
    with pytest.raises(UserError, match=r"accepted: (one line|names of environment variables|long names)"):
        parsed(item)


def test_identity_leaves_out_what_may_change_between_starts() -> None:
    a = parsed("model.name=b0", "cluster.nodes=4", "run.log_every=3", "data.workers=2")
    b = parsed("model.name=b0", "cluster.nodes=1-4", "run.log_every=5", "data.workers=auto", "data.root=/elsewhere")
    assert reading.identity(a) == reading.identity(b)
    c = parsed("model.name=b0", "tune.base_lr=0.5", "run.seed=1")
    assert reading.differences(reading.identity(a), reading.identity(c)) == [
        "tune.base_lr 0.001 -> 0.5",
        "run.seed 0 -> 1",
    ]


def test_learning_rate_rule_is_the_originals() -> None:
    """ResNet-50 in the original: base 1e-3 at 64 images on 8 GPUs is 8e-3."""
    assert parsed("tune.base_lr=1e-3", "tune.global_batch=512").tune.peak_learning_rate() == pytest.approx(8e-3)
    assert parsed("tune.base_lr=0.1", "tune.lr_rule=none").tune.peak_learning_rate() == 0.1


def test_policy_all_keeps_ordinary_batch_statistics() -> None:
    assert parsed("tune.policy=all").tune.bn_stats == "ema"
    assert parsed().tune.bn_stats == "exact"


def test_stage_one_can_be_dropped() -> None:
    base = {"pretrain": {"epochs": "3"}}
    assert reading.parse(Config, reading.merge(base, reading.overrides(["pretrain=none"]))).pretrain is None


@pytest.mark.parametrize("items", [("pretrain=none", "pretrain.epochs=3"), ("pretrain.epochs=3", "pretrain=none")])
def test_a_setting_of_a_stage_one_that_is_dropped_is_refused(items: tuple[str, str]) -> None:
    """In one order it was a traceback, in the other the epochs were lost without a word."""
    with pytest.raises(
        UserError, match=r"pretrain=none drops stage one, and pretrain\.epochs is given.*Next: leave out"
    ):
        reading.overrides(list(items))


@pytest.mark.parametrize("key", ["setup", "srun_args", "env", "sbatch"])
@pytest.mark.parametrize("value", ["", "null", "~", "\n    # - --container-image=a:b"])
def test_a_list_or_mapping_without_entries_is_empty(key: str, value: str, tmp_path: Path) -> None:
    """It became one empty argument, with which srun starts nothing."""
    profile = tmp_path / "site.yaml"
    profile.write_text(f"cluster:\n  {key}: {value}\n  partition: gpu\n")
    read = reading.parse(Config, reading.read_profile(profile)).cluster
    assert not getattr(read, key)
    assert not getattr(parsed(f"cluster.{key}=").cluster, key)
    assert read.partition == "gpu"


def test_empty_sizes_are_none() -> None:
    assert parsed("tune.hold_out_sizes=").tune.hold_out_sizes == ()


@pytest.mark.parametrize("value", ["exclude: [n1, n2]", "exclude: {n1: n2}", "setup: [[a, b]]", "srun_args: {a: b}"])
def test_a_list_or_mapping_for_text_is_refused(value: str) -> None:
    """It became the text of a Python list in the job."""
    with pytest.raises(UserError, match=r"cluster\.\w+ is .*; accepted: text, such as n1,n2"):
        reading.load(f"cluster: {{{value}}}")
