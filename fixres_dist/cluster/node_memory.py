"""How much memory a job asks of each node with cluster.mem=auto: what scontrol says of partition and nodes decides. No torch.

All of it would block the others on a node that is shared, and its partition's default is meant for small jobs.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from fixres_dist.cluster import slurm
from fixres_dist.config.schema import Cluster
from fixres_dist.config.shell_values import LEFT_OUT

AUTO, WHOLE = "auto", "0"  # WHOLE: sbatch's word for all memory of the node


class Asked(NamedTuple):
    """The value of sbatch's --mem, and where it comes from."""

    mem: str
    why: str


def of(cluster: Cluster) -> Asked:
    """What a job with these settings asks; its share of a node is that of its GPUs, or of its CPUs where it asks for none."""
    if cluster.mem != AUTO:
        return Asked(cluster.mem, "cluster.mem")
    given = {name for name, value in cluster.sbatch.items() if value not in LEFT_OUT}
    if "exclusive" in given:
        return Asked(WHOLE, "exclusive nodes")
    no_gpus = "gpus-per-node" in cluster.sbatch and not {"gpus-per-node", "gres"} & given
    gpus, cpus = (0 if no_gpus else cluster.gpus_per_node), cluster.gpus_per_node * cluster.cpus_per_task
    return by_partition(os.environ.get("PATH", ""), cluster.partition, gpus, cpus)


def note(cluster: Cluster) -> str:
    """A line for the plan: what the job asks of each node's memory, and why."""
    if {"mem-per-gpu", "mem-per-cpu"} & cluster.sbatch.keys():
        return "asks       for the memory that cluster.sbatch says"
    mem, why = of(cluster)
    return f"asks       for {'all the memory' if mem == WHOLE else f'{mem} of the memory'} of each node ({why})"


@functools.cache
def by_partition(path: str, name: str, gpus: int, cpus: int) -> Asked:
    """`path`: where Slurm's programs are."""
    config, partition = slurm.config(), slurm.partition(name)
    if "MEMORY" not in config.get("SelectTypeParameters", "").upper():
        return Asked(WHOLE, "Slurm does not share out memory here, or does not tell")
    if partition.get("OverSubscribe", "").startswith("EXCLUSIVE"):
        return Asked(WHOLE, "the partition gives whole nodes")
    per_gpu = setting(partition.get("JobDefaults", "")) or setting(config.get("JobDefaults", ""))
    if gpus and per_gpu:
        return Asked(f"{gpus * per_gpu}M", f"{gpus} x the site's DefMemPerGPU of {per_gpu} MB")
    asked, what = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    nodes = [node for node in slurm.nodes(partition.get("PartitionName", name)) if node.cpus >= cpus]
    shares = [(node.memory_mb, node.gpus if gpus else node.cpus) for node in nodes]
    shares = [(memory, of_node) for memory, of_node in shares if of_node >= asked]
    if all(of_node == asked for _, of_node in shares):
        return Asked(
            WHOLE, f"whole nodes: all their {what}" if shares else "Slurm does not tell of nodes that are large enough"
        )
    memory, of_node = min(shares, key=lambda share: share[0] * asked / share[1])
    found = memory * asked // of_node
    if (most := partition.get("MaxMemPerNode", "")).isdigit():
        found = min(found, int(most))
    return Asked(f"{found}M", f"{asked} of {of_node} {what} of a node with {memory:,} MB")


def setting(defaults: str) -> int:
    """DefMemPerGPU in MB, of Slurm's JobDefaults such as DefCpuPerGPU=8,DefMemPerGPU=60000; 0 where it is not set."""
    pairs = dict(item.partition("=")[::2] for item in defaults.split(","))
    value = pairs.get("DefMemPerGPU", "")
    return int(value) if value.isdigit() else 0
