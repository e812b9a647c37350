"""What cluster.mem=auto asks of a node, by what scontrol says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_slurm import fake_slurm

from fixres_dist.cluster import jobs, node_memory
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir

NODE = (
    "NodeName={name} CPUTot=128 Gres=gpu:h100:{gpus}(S:0-1) RealMemory={memory} Partitions=debug,gpu MemSpecLimit=24000"
)
OTHER = "NodeName=old CPUTot=128 Gres=gpu:8 RealMemory=64000 Partitions=debug"
TWO_KINDS = [NODE.format(name="n1", gpus=8, memory=1024000), NODE.format(name="n2", gpus=4, memory=424000), OTHER]
ALIKE = [TWO_KINDS[0], OTHER]


def scontrol(types: str, partition: str, nodes: list[str], config: str = "(null)") -> str:
    """A pretended scontrol, which answers show config, partition and node."""
    gpu = f"PartitionName=gpu Default=YES MaxTime=UNLIMITED {partition}"
    config = f"JobDefaults             = {config}\nSelectTypeParameters    = {types}\nKillWait = 30 sec"
    answers = {"config": config, "partition": gpu, "node": "\n".join(nodes)}
    return "case $2 in " + " ".join(f"{what}) cat <<'E'\n{text}\nE\n;;" for what, text in answers.items()) + " esac"


@pytest.mark.parametrize(
    ("told", "settings", "mem", "why"),
    [
        (("CR_CORE_MEMORY", "OverSubscribe=NO", ALIKE), [], "0", "whole nodes: all their GPUs"),
        (("CR_CORE_MEMORY", "OverSubscribe=NO", ALIKE), ["gpus_per_node=2"], "250000M", "2 of 8 GPUs"),
        (("CR_CPU_MEMORY", "OverSubscribe=NO", TWO_KINDS), ["gpus_per_node=4"], "400000M", "4 of 4 GPUs"),
        (("CR_CPU_MEMORY", "OverSubscribe=YES:4", TWO_KINDS), ["gpus_per_node=2"], "200000M", "2 of 4 GPUs"),
        (("CR_CPU_MEMORY", "MaxMemPerNode=90000", ALIKE), ["gpus_per_node=1"], "90000M", "1 of 8 GPUs"),
        (("CR_CPU_MEMORY", "JobDefaults=DefMemPerGPU=60000", ALIKE), ["gpus_per_node=2"], "120000M", "DefMemPerGPU"),
        (("CR_CPU_MEMORY", "", ALIKE, "DefCpuPerGPU=8,DefMemPerGPU=50000"), [], "400000M", "DefMemPerGPU of 50000 MB"),
        (
            ("CR_CPU_MEMORY", "OverSubscribe=EXCLUSIVE", ALIKE),
            ["gpus_per_node=2"],
            "0",
            "the partition gives whole nodes",
        ),
        (("CR_CPU", "OverSubscribe=NO", ALIKE), ["gpus_per_node=2"], "0", "does not share out memory"),
        (("CR_CPU_MEMORY", "", ALIKE), ["gpus_per_node=2", "sbatch={exclusive: true}"], "0", "exclusive nodes"),
        (
            ("CR_CPU_MEMORY", "", ALIKE),
            ["gpus_per_node=2", "sbatch={gpus_per_node: none}"],
            "125000M",
            "16 of 128 CPUs",
        ),
        (("CR_CPU_MEMORY", "", ALIKE), ["gpus_per_node=2", "sbatch={gres: 'gpu:h100:2'}"], "250000M", "2 of 8 GPUs"),
        (("CR_CPU_MEMORY", "", ALIKE), ["gpus_per_node=2", "mem=70G"], "70G", "cluster.mem"),
        (("CR_CPU_MEMORY", "", []), ["gpus_per_node=2"], "0", "does not tell of nodes"),
    ],
)
def test_memory_of_a_node(
    told: tuple[str, str, list[str]],
    settings: list[str],
    mem: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, scontrol=scontrol(*told))
    config = reading.parse(Config, reading.overrides([f"cluster.{setting}" for setting in settings]))
    assert f"#SBATCH --mem={mem}\n" in jobs.sbatch_text(config, RunDir(Path("/runs/r")))
    assert why in node_memory.note(config.cluster)


def test_without_an_answer_of_slurm_it_is_all_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert "#SBATCH --mem=0\n" in jobs.sbatch_text(Config(), RunDir(Path("/runs/r")))
