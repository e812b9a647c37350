"""`bench end-to-end`: images/s from JPEG files to the optimizer step, beside decoding alone and the step alone."""

from __future__ import annotations

import os
from functools import partial
from statistics import median

from fixres_dist.bench import step, turns
from fixres_dist.bench.result import Ratios, Result, row_of
from fixres_dist.bench.setting import Setting, Work, variant
from fixres_dist.data import backends
from fixres_dist.models.parts import parts_of
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import stages
from fixres_dist.training.throughput import Meter


def measure(setting: Setting, repeat: int) -> Result:
    builds = {"data alone": decode, "step alone": step.step, "end to end": end_to_end}
    variants = {name: partial(variant, build, setting) for name, build in builds.items()}
    found, failed = turns.alternate(variants, repeat, f"end-to-end {setting.model} {setting.res}")
    rows = {name: row_of(name, values) for name, values in found.items()}
    versus: Ratios = {}
    if not failed:
        data, alone, whole = rows.values()
        slower = min(data.images_per_second, alone.images_per_second)
        # Loader and step share the CPUs where there is no GPU: no schedule beats the sum of their CPU times.
        needed_s = (data.cpu_ms_per_image + alone.cpu_ms_per_image) / 1000 / len(os.sched_getaffinity(0))
        waits = [100 * turn.waited_s / turn.wall_s for turn in found[whole.name]]
        versus["vs_slower_part"] = {whole.name: round(whole.images_per_second / slower, 3)}
        versus["vs_cpu_bound"] = {whole.name: round(whole.images_per_second / min(slower, 1 / needed_s), 3)}
        versus["data_wait_percent"] = {whole.name: round(median(waits), 2)}
    return Result(list(rows.values()), failed, rows_vs=versus)


def decode(session: Session, setting: Setting) -> Work:
    """The product's loader alone."""
    stage, meter = stages(session.config, len(session.train))[-1], Meter()
    work = StageSession(session, stage, parts_of(session.model, stage.tune.policy))
    steps = work.steps(0, meter)
    return Work(lambda: sum(len(batch.labels) for batch in next(steps)[1]), ahead(session), meter)


def end_to_end(session: Session, setting: Setting) -> Work:
    work, meter = step.fixing(session), Meter()
    one, steps = step.stepper(work), work.steps(0, meter)
    return Work(lambda: one(next(steps)[1]), ahead(session), meter)


def ahead(session: Session) -> int:
    """More batches than a loader has made while others had their turn."""
    return 2 * backends.worker_count(session.config.data.workers, session.ranks.cpus, 1) + 2
