"""Files about single samples: which ones a rank has seen, and which ones could not be decoded."""

from __future__ import annotations

from collections.abc import Callable

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import append
from fixres_dist.data.dataset import verify_command
from fixres_dist.data.decoding import Bad
from fixres_dist.data.index import Index
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.stage_session import StageSession


def record(run: RunDir, work: StageSession, step: int, seen: list[int]) -> None:
    """A line of samples/rank_K.jsonl: the samples that this rank has seen at this step (run.record_samples=true)."""
    stage, ranks = work.stage, work.session.ranks
    ((request,),) = work.requests(step, step + 1, stage.tune.global_batch)
    pairs = zip(request.samples.tolist(), request.views, strict=True)
    views = [view.record() for sample, view in pairs if sample in seen]  # a skipped sample has no view
    epoch, _ = stage.epochs_after(step)
    file = run.root / "samples" / f"rank_{ranks.rank}.jsonl"
    file.parent.mkdir(exist_ok=True)
    append(file, {"epoch": epoch, "step": step, "stage": stage.name, "samples": seen, "views": views})


def skipping(run: RunDir, ranks: Ranks, most: int | str) -> Callable[[Index, Bad], None]:
    """What a run does about an image it has to do without: a line in skipped/rank_K.jsonl, once per start.

    `most`: data.max_skipped, over all ranks and starts; beyond it a UserError is raised.
    """
    seen: set[str] = set()

    def note(index: Index, bad: Bad) -> None:
        name = f"{index.folder.name}/{index.name(bad.sample)}"
        if name not in seen:
            seen.add(name)
            (run.root / "skipped").mkdir(exist_ok=True)
            append(run.root / "skipped" / f"rank_{ranks.rank}.jsonl", {"name": name, "reason": bad.reason})
            print(f"skipped {index.where(bad.sample)}: {bad.reason}", flush=True)
            limit, skipped = max(10, len(index) // 100) if most == "auto" else int(most), run.skipped()
            if skipped > limit:
                verify = verify_command(index.folder.parent, index.folder.name)
                raise UserError(
                    f"{skipped} images could not be decoded, the last one {index.where(bad.sample)}: {bad.reason}. Accepted: "
                    f"data.max_skipped={limit}. Next: {verify} lists them; or the same command with a higher data.max_skipped"
                )

    return note
