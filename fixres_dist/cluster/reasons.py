"""The first cause of a failure: which rank on which node, from srun's log and from what ranks said. No torch.

When a rank ends, the others break because of it (a connection is reset), and srun ends those that are left: with SIGTERM,
then SIGKILL. So neither the first message nor `Killed` need be the cause.
"""

from __future__ import annotations

import re
from pathlib import Path

from fixres_dist.cluster.logs import MARK
from fixres_dist.runs.rundir import RunDir

NODES_BUSY = "Requested nodes are busy"  # srun has started no rank, and Slurm may think better of it
OTHERS = ("srun:", "slurmstepd", "submitit ", MARK)  # beginnings of lines in a rank's log that it has not written

# Errors of a rank whose peer is gone.
CONSEQUENCE = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|connection\w*error|by peer|broken ?pipe|remote (process|peer)|EOFError|"
    r"DistNetworkError|DistStoreError|ncclRemoteError|socket (timeout|error)|waited \d+ s for rank|heartbeat",
    re.IGNORECASE,
)
CLEAN_UP = re.compile(r"^srun: .*(Terminating StepId|Terminating job step|Job step aborted)", re.MULTILINE)
OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|out of memory", re.IGNORECASE)


def culprit(run: RunDir, job: str, said: str = "") -> str:
    """What srun says of the task that died first, such as `n2: task 3: Killed`; empty if its log names none.

    `said`: the error that a rank has left. srun's exit code tells less: it is the highest one, so mostly 143 of a task
    that it has terminated itself.
    """
    text = of_this_start(run, job)
    before, _, after = CLEAN_UP.sub("\0", text, count=1).partition("\0")
    first, later = tasks(before), tasks(after)
    # A task that breaks ends by itself, with a code; srun hears of it before or after the one that a signal ended. One that
    # was killed after srun began to clean up is the cause only if others say that their peer was gone.
    groups = [killed(first), killed(later) if consequence(said) else [], first, killed(later), later]
    found = next((group[0] for group in groups if group), "")
    if found.endswith("Killed") and OUT_OF_MEMORY.search(text):
        return f"{found} (out of memory, by the node's kernel or the job's limit)"
    return found + (" (by hand, or out of memory)" if found.endswith("Killed") else "")


def of_this_start(run: RunDir, job: str) -> str:
    """srun's log since the job's newest start."""
    file = run.root / "submitit" / job / f"{job}_0_log.err"
    text = file.read_text(errors="replace") if file.exists() else ""
    return re.split(rf"^(?:{MARK} |.*\*\*\* JOB \S+ ON \S+ CANCELLED AT )", text, flags=re.MULTILINE)[-1]


def tasks(text: str) -> list[str]:
    return re.findall(r"^srun: error: (\S+: tasks? \S+: (?!Terminated).+)$", text, re.MULTILINE)


def killed(lines: list[str]) -> list[str]:
    return [line for line in lines if "Exited with" not in line]


def consequence(said: str) -> bool:
    """Whether an error tells only that another rank is gone."""
    return bool(CONSEQUENCE.search(said))


def first_cause(run: RunDir, job: str, code: int, said: str) -> str:
    """The failure of a job's step in one line: the task that died, what a rank has said, or else how its log ends."""
    if no_step := re.search(r"^srun: error: (Unable to create step .+)$", of_this_start(run, job), re.MULTILINE):
        return f"srun has started no rank: {no_step[1]}"  # what ranks have said is of an earlier start
    task = culprit(run, job, said)
    if said and "Exited with" in task and not consequence(said):
        return said  # by the rank that ended with this code
    parts = [task or ("Slurm ended the step" if code == 0 else f"srun ended with {code}"), said]
    rank = re.search(r": tasks? (\d+)", task)
    if not said and rank and (words := last_words(run.root / "submitit" / job / f"{job}_{rank[1]}_log.err")):
        parts.append(f"its log ends: {words}")
    return "; ".join(filter(None, parts))


def last_words(log: Path) -> str:
    """The last line of a log that a task itself wrote; empty where there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    own = [line.strip() for line in lines if line.strip() and not line.startswith(OTHERS)]
    return own[-1][:300] if own else ""


def nodes_of(why: str) -> list[str]:
    """The nodes of a cause, n2 in `n2: task 3: Killed` and `rank 3 on n2: ...`, n1 and n2 in `n[1-2]: tasks 0-1: Killed`."""
    found = re.search(r"\brank \d+ on ([\w.-]+): |(?:^|: )([\w.\[\],-]+): tasks? \d", why)
    return hostnames(found[1] or found[2]) if found else []


def hostnames(text: str) -> list[str]:
    """The names in a list as Slurm shortens it, in order: gpu[08-10,12],login -> gpu08, gpu09, gpu10, gpu12, login."""
    names: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text):
        head, bracket, rest = item.partition("[")
        if not bracket:
            names.append(item)
            continue
        inside, _, tail = rest.partition("]")
        ends = hostnames(tail) if tail else [""]
        for part in inside.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{head}{number:0{len(first)}}{end}" for number in numbers for end in ends]
    return names
