"""Stage one trained once for many runs, such as a grid over fixing settings.

Its result stands in the cache folder under a key of all that determines it. One run trains at a time, under a lock; others
with the same key wait and take the result, and go on from the checkpoints of one that was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fixres_dist.base import locks, owners
from fixres_dist.base.commands import shell
from fixres_dist.base.environment import cache_folder, versions, writable
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import whole
from fixres_dist.base.small_files import append, read_json, read_lines, write_json
from fixres_dist.config import reading
from fixres_dist.models.weights import state_digest
from fixres_dist.runs import checkpoint, snapshots
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import damage, results
from fixres_dist.training.loop import train_stage
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage
from fixres_dist.training.throughput import StartUp

WAIT_S = 2.0  # between looks at whether another run has finished the same stage one
ROOMS = ("config", "data", "models", "training")  # whose code decides what comes out


@dataclass(frozen=True)
class Place:
    """Where the stage one of one key stands: `result` once it is done, and until then which run trains it."""

    folder: Path
    key: dict[str, Any]

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def trainer(self) -> Path:
        return self.folder / "trainer.json"


@dataclass(frozen=True)
class Trained:
    """trainer.json, and result/result.json."""

    run: str  # the directory of the run that trains it, or has trained it
    sha256: str = ""  # of the weights


def place_of(session: Session) -> Place | None:
    """None where nothing is shared: no cache folder can be written, or every sample of this run is to be recorded."""
    config, ranks, root = session.config, session.ranks, cache_folder(session.config.data.cache) / "stage_one"
    if config.pretrain is None or config.run.record_samples or not writable(root):
        return None
    installed, run = versions(), config.run
    key = {
        "model": [config.model.timm_name, state_digest(session.model.state_dict())],
        "classes": list(session.classes),
        "samples": {split: [index.fingerprint, index.contents] for split, index in session.splits.items()},
        "pretrain": asdict(config.pretrain),
        "seed": run.seed,
        "pictures": [list(session.resize(config.pretrain.res)), list(session.spec.mean), list(session.spec.std)],
        "data": [config.data.backend, config.data.on_bad],
        # These change only rounding, of which many steps make other weights.
        "arithmetic": [session.arithmetic.name, ranks.device.type, str(session.memory_format), ranks.world_size],
        "run": [run.optimizer, run.activation_checkpointing, run.batch_per_device, run.deterministic, run.compile],
        "versions": {name: installed[name] for name in ("torch", "timm")},
        "code": snapshots.digest(*(Path(__file__).parents[1] / room for room in ROOMS)),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / name
    # Weights that another user wrote, or could have written, are not believed (base/owners.py).
    return Place(owners.of_this_user(folder) if folder.exists() and not owners.believed(folder) else folder, key)


def train(run: RunDir, session: Session, todo: list[Stage], writer: checkpoint.Writer, startup: StartUp) -> None:
    """Stage one of `todo`, whose last one is the fixing stage, from where it stands to pretrained.safetensors; nothing where
    that is there, or where there is none. Raises Stopped, once all is saved."""
    ranks, first = session.ranks, todo[:-1]
    again = partial(damage.pretrained_again, run, session, first)
    if not first or ranks.from_main(run.pretrained.exists) or ranks.from_main(again):
        return
    with turn(run, session, first) as needed:
        begun = ranks.from_main(lambda: checkpoint.newest_stage(run.checkpoints))
        for stage in first if needed else ():
            ranks.check_stop()
            if stage.name == "head" and begun not in ("", "head"):
                continue  # the checkpoint of stage one has the classifier
            session = session.for_size(stage.res)  # with the classifier that the first one has trained
            train_stage(run, session, stage, todo, writer, startup)


@contextlib.contextmanager
def turn(run: RunDir, session: Session, first: list[Stage]) -> Iterator[bool]:
    """Whether this run has to train stage one, whose result is kept after the block; else it has been taken.

    On every rank; raises Stopped while it waits for another run.
    """
    ranks, place = session.ranks, place_of(session) if session.ranks.is_main else None
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            found = ranks.from_main(partial(decide, stack, run, session, place, first, say=attempt == 0))
            if found != "wait":
                break
            ranks.check_stop()
            time.sleep(WAIT_S)
        yield found == "train"
        if found == "train" and place:
            keep(run, place, first[-1].res)


def decide(
    stack: contextlib.ExitStack, run: RunDir, session: Session, place: Place | None, first: list[Stage], say: bool
) -> str:
    """Rank 0: `take` once the result is in the run, `train` once the lock is held, until `stack` closes, or `wait`."""
    if place is None:
        return "train"
    if taken(run, place, first[-1]):
        return "take"
    if not writable(place.folder):
        return "train"
    place.folder.mkdir(parents=True, exist_ok=True)
    owners.close_to_others(place.folder)
    try:
        stack.enter_context(locks.lock(place.folder / ".lock"))
    except locks.Held as held:
        if say:
            print(f"another run trains the same stage one ({held}; {place.folder}); waiting for it", flush=True)
            run.event("waiting for stage one", held=str(held), folder=str(place.folder))
        return "wait"
    if taken(run, place, first[-1]):  # it was done between the two looks
        stack.close()
        return "take"
    adopt(run, session, place, first)
    write_json(place.folder / "key.json", place.key)
    write_json(place.trainer, asdict(Trained(str(run.root.absolute()))))
    return "train"


def file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def keep(run: RunDir, place: Place, res: int) -> None:
    """Copy what stage one has left to the cache: weights, predictions, lines of metrics. A disk that refuses only costs the copy.

    Of a run that could do without images nothing is kept, since they belong to its count.
    """
    if run.skipped():
        return
    predictions = results.predictions_file(run, f"before-{res}")
    try:
        with whole(place.result) as part:
            part.mkdir()
            for file, name in ((run.pretrained, run.pretrained.name), (predictions, "predictions.npz")):
                shutil.copyfile(file, part / name)
            shutil.copyfile(run.metrics, part / run.metrics.name)
            made = Trained(str(run.root.absolute()), file_digest(part / run.pretrained.name))
            write_json(part / "result.json", asdict(made), sealed=True)
    except OSError as error:
        print(f"stage one is not kept for other runs: {error}", flush=True)
        return
    print(f"stage one is kept in {place.folder} for runs that differ only in what follows", flush=True)


def taken(run: RunDir, place: Place, last: Stage) -> bool:
    """Copy the kept result into the run, the weights last; False where there is none. A damaged one is removed."""
    weights = place.result / run.pretrained.name
    if not (place.result / "result.json").exists():
        return False
    try:
        found = read_json(place.result / "result.json", Trained, shell("rm", "-r", place.result))
        if file_digest(weights) != found.sha256:
            raise ValueError("its weights have another checksum")
        Predictions.read(place.result / "predictions.npz")
        if not (place.result / run.metrics.name).exists():
            raise ValueError(f"its {run.metrics.name} is gone")
        lines = read_lines(place.result / run.metrics.name)
    except (UserError, OSError, ValueError) as error:
        print(f"{place.result} cannot be used ({error}); stage one is trained again", flush=True)
        shutil.rmtree(place.result, ignore_errors=True)
        return False
    predictions = results.predictions_file(run, f"before-{last.res}")
    predictions.parent.mkdir(exist_ok=True)
    copy(place.result / "predictions.npz", predictions)
    if checkpoint.newest_stage(run.checkpoints) != "fix":  # else only the weights were damaged
        run.metrics.unlink(missing_ok=True)
        for line in lines:
            append(run.metrics, line)
        run.update_state(step=last.stop)
    copy(weights, run.pretrained)
    run.event("stage one taken", trained_by=found.run, folder=str(place.folder))
    print(f"stage one is taken from {place.folder}; {found.run} has trained it", flush=True)
    return True


def copy(source: Path, target: Path) -> None:
    with whole(target) as part:
        shutil.copyfile(source, part)


def adopt(run: RunDir, session: Session, place: Place, first: list[Stage]) -> None:
    """Go on from the newest checkpoint of a run that was stopped in the same stage one, where it has come further.

    Its checkpoint is that of this run, but for the settings of what follows.
    """
    with contextlib.suppress(UserError, OSError):
        other = RunDir(Path(read_json(place.trainer, Trained, "nothing").run))
        newest = checkpoint.complete(other.checkpoints)[-1:]
        if not newest or other.root.resolve() == run.root.resolve():
            return
        progress = checkpoint.progress_of(newest[0])
        step = progress.step
        if progress.stage not in [one.name for one in first] or step <= run.saved_step():
            return
        lines = read_lines(other.metrics, step=int)
        theirs = (other.root.parent if other.root.name == run.held_out.name else other.root) / "choices.json"
        if session.kept and theirs.exists():  # what it has decided makes the bits with which it would have gone on
            write_json(
                session.kept, {**session.choices(), **read_json(theirs, dict[str, dict[str, Any]], "")}, sealed=True
            )
        run.metrics.unlink(missing_ok=True)
        for line in lines:
            if line["step"] <= step:
                append(run.metrics, line)
        # Last: it is what a start after a kill looks for.
        checkpoint.copy(newest[0], run.checkpoints, configuration=reading.identity(session.config))
        run.event("stage one adopted", step=step, begun_by=str(other.root))
        print(f"stage one goes on from step {step} of {other.root}, which was stopped", flush=True)
