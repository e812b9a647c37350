"""What of a run's files is damaged, or was left by a killed start: found at a start, before any of it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fixres_dist.base.files import sweep
from fixres_dist.base.small_files import Damaged, put_aside
from fixres_dist.config.schema import Config
from fixres_dist.models import tensor_files, weights
from fixres_dist.runs import checkpoint
from fixres_dist.runs.restoring import put_tensors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import results
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage

DAMAGED = "damaged"  # the event


def put_aside_damaged(run: RunDir) -> None:
    """By rank 0, under the run's lock: each damaged file is renamed to NAME.damaged and told in events.jsonl, so that the one
    before it is taken, or it is made again; temporary files that nobody is writing go."""
    for folder in (run.checkpoints, run.root / "predictions", run.partial):
        sweep(folder, age_s=0)
    tensors = (run.pretrained, run.head_before, run.first_classifier)
    for file in tensors:
        sweep(run.root, file.name, age_s=0)
    sweep(run.root)
    sweep(run.root / "export")
    tell = telling(run)
    checkpoint.put_damaged_aside(run.checkpoints, tell)
    readers: dict[Path, Callable[[Path], object]] = dict.fromkeys(tensors, lambda path: tensor_files.load(path, ""))
    readers |= dict.fromkeys((run.root / "predictions").glob("*.npz"), Predictions.read)
    for file, read in readers.items():
        if file.exists():
            try:
                read(file)
            except Damaged as error:
                put_aside(file)
                tell(error)


def telling(run: RunDir) -> Callable[[Damaged], None]:
    def tell(error: Damaged) -> None:
        print(
            f"{error.path} is damaged ({error.why}): it is kept as {error.path.name}.damaged, and not used", flush=True
        )
        run.event(DAMAGED, file=str(error.path), reason=error.why)

    return tell


def pretrained_again(run: RunDir, session: Session, first: list[Stage]) -> bool:
    """Write pretrained.safetensors again where it was damaged, from the last checkpoint of stage one; by rank 0, with the
    session as it starts. False where that is not kept aside, since fixing has not begun: stage one goes on then, and writes it
    itself."""
    end = checkpoint.stage_end(run.checkpoints, first[-1].stop) if first else None
    if not (end and end.exists()):
        return False
    model, tensors = session.for_size(first[-1].res).model, checkpoint.read(end).tensors
    put_tensors(model, tensors.ema or tensors.head)
    weights.write_weights(model, run.pretrained, session.config, first[-1].res, session.classes)
    return True


def lacks_before(run: RunDir, config: Config) -> bool:
    """Whether what was measured before fixing is not there, because it was damaged."""
    wanted = [results.predictions_file(run, "before"), *([] if config.pretrain else [run.head_before])]
    other_sizes = (file.with_suffix("") for file in (run.root / "predictions").glob("before-*.npz.damaged"))
    return not all(file.exists() for file in wanted) or any(map(is_lost, other_sizes))


def is_lost(file: Path) -> bool:
    """Whether a damaged file was put aside, and none has taken its place."""
    return not file.exists() and file.with_name(f"{file.name}.damaged").exists()
