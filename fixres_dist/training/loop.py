"""The training of one stage: open it, measure, the loop, close it. One loop serves ordinary training and fixing.

Everything but the tuned tensors, their momenta and the progress is a function of the configuration and the step, so a
start after a kill continues exactly from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace

import torch
from torch import nn

from fixres_dist.base.signals import Stopped
from fixres_dist.models.parts import described, frozen_digest
from fixres_dist.models.weights import fitted, read_state, write_tensors, write_weights
from fixres_dist.runs import checkpoint
from fixres_dist.runs.restoring import exchange, put_tensors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.training import auto_batch, class_order, compiled_code, results, samples
from fixres_dist.training.cache.build import open_stores
from fixres_dist.training.profiling import traced
from fixres_dist.training.session import Session
from fixres_dist.training.stage_training import END, Training, open_stage
from fixres_dist.training.stages import Stage
from fixres_dist.training.step import average_weights, backward, distribute, measure_statistics
from fixres_dist.training.throughput import StartUp


def train_stage(
    run: RunDir, session: Session, stage: Stage, todo: list[Stage], writer: checkpoint.Writer, startup: StartUp
) -> None:
    """Train `stage`, one of `todo`, from its newest checkpoint, or from its start, to its end; raises Stopped, once all is
    saved, where a stop signal came before."""
    training = open_stage(run, session, stage, todo, writer)
    startup.mark("trunk")
    try:
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=False):
            open_features(training)
            if not training.resumed:
                measure(training, startup)
            elif training.tuned_before:
                measure_before_again(training)
            if session.ranks.is_main:
                compiled_code.keep(session.config.data.cache)  # for starts after a kill
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=True):
            loop(training, startup)
        close(training)
    except Stopped:
        stop(training)
        raise
    finally:
        if training.tracker:
            training.tracker.close()
    if session.ranks.is_main:
        compiled_code.keep(session.config.data.cache)  # what was compiled since


def stop(training: Training) -> None:
    """All ranks have agreed on a stop signal, anywhere in the stage: save the last step, unless a checkpoint has it, or
    there is nothing yet but what evaluations and measurements have kept."""
    step = training.progress.step
    if training.tracker:
        training.run.update_state(Event.STOP_REQUESTED, step=step, eta_s=None)
    if training.saved_step not in (-1, step):
        training.save()
    training.writer.wait()


def open_features(training: Training) -> None:
    """Cache the trunk's features where that pays (cache/rule.py)."""
    work, run, step = training.work, training.run, training.progress.step
    training.work = work = open_stores(work, training.resumed, run.event)
    if training.tracker:
        run.event("engine", stage=work.stage.name, step=step, **work.how())
    training.set_modes()
    training.say(described(work.parts))
    if work.parts.folded:
        training.say(work.parts.folded)
    if training.tracker and training.resumed:
        total = training.tracker.total_steps
        training.say(f"resuming {run.name} at step {step} of {total} ({100 * step / max(1, total):.0f}%)")


def measure(training: Training, startup: StartUp) -> None:
    """Before the first step: the accuracy before fixing, exact BN statistics, and a first checkpoint with them."""
    work = training.work
    if work.stage.name == "fix":
        if training.tracker and not work.session.config.pretrain:
            write_tensors(work.session.model, training.run.head_before, work.parts.tuned.tensors)
        training.draw("crops")
        training.keep("before", before := training.evaluate("before"))
        val, columns = work.session.val, work.session.columns["val"]
        # Stage one has trained the classifier in the folders' order; what it takes for one another is no other order.
        if not work.session.config.pretrain and (
            warning := class_order.doubt(before, val, columns, work.session.classes)
        ):
            training.say(warning)
        training.measure_other_sizes()
        startup.mark("evaluation")
    if work.parts.tuned.last_bns and work.stage.tune.bn_stats in ("exact", "mean"):
        partial = training.partial("statistics", work.session.ranks.world_size, work.batch_per_device)
        count = measure_statistics(work, partial)
        names = ", ".join(work.parts.tuned.last_bns)
        training.say(f"statistics of {names} measured on {count} images at {work.stage.res} px")
        startup.mark("statistics")
    training.save()


def measure_before_again(training: Training) -> None:
    """Where head_before.safetensors or predictions from before fixing were damaged: again, of the tuned tensors at the start."""
    work, run, model = training.work, training.run, training.work.session.model
    now = exchange(model, training.tuned_before)
    if training.tracker and not work.session.config.pretrain:
        write_tensors(model, run.head_before, work.parts.tuned.tensors)
    training.keep("before", work.evaluate("before, again", training.partial("before-again")))
    training.measure_other_sizes(again=True)
    put_tensors(model, now)
    training.set_modes()


def loop(training: Training, startup: StartUp) -> None:
    """Optimizer steps to the stage's end."""
    work, run, tracker, optimizer = training.work, training.run, training.tracker, training.optimizer
    stage, ranks, settings = work.stage, work.session.ranks, work.session.config.run
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    if training.progress.pending:
        training.evaluate_pending()
        startup.mark("evaluation")
    head = distribute(work)
    meter, saved_at, started = training.meter, time.monotonic(), training.opened - training.progress.seconds
    meter.restart()
    if tracker:
        tracker.begin_steps()
    for step, micro_batches in traced(work.steps(training.progress.step, meter), run, settings.profile, ranks.is_main):
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.zero_grad()
        seen = backward(work, head, training.scale, step, micro_batches, meter)
        done, epoch, ends_epoch = step + 1, *stage.epochs_after(step + 1)
        last = done == stage.stop
        logging = done % settings.log_every == 0 or last
        norm = float(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])) if logging else 0.0
        norm = norm if training.scale.step() else 0.0
        training.progress = replace(training.progress, step=done, seconds=time.monotonic() - started)
        training.average(done, last)
        if startup.running:
            phases = startup.stop()
            if tracker:
                run.event("first step", **phases)
                tracker.first(done, phases)
        if settings.record_samples:
            samples.record(run, work, step, seen)
        if logging:
            values = meter.read(ranks, learning_rate=rate, grad_norm=norm, **training.scale.metrics())
            if not math.isfinite(values["loss"]):
                raise training.diverged(f"the training loss is {values['loss']}")
            if tracker:
                tracker.step(done, stage.name, (done - stage.first) / stage.per_epoch, values)
        if ends_epoch:
            training.set_modes()
            if count := stage.averages(done):
                average_weights(optimizer, count, use=last)
            if not last and settings.eval_every and epoch % settings.eval_every == 0:
                training.progress = replace(training.progress, pending=f"{stage.name} epoch {epoch}")
                training.save()  # an evaluation can take longer than a stop signal's warning
                training.evaluate_pending()
                meter.restart()
                saved_at = time.monotonic()
        due = training.saved_step != done and time.monotonic() - saved_at >= settings.save_every_s
        (save_now,) = ranks.check_stop(int(ranks.is_main and due))
        if save_now or last:
            training.save()
            saved_at = time.monotonic()


def take_back(training: Training) -> None:
    """Leave the trained weights `alpha` of the way from those before the stage; statistics stay as they are measured."""
    work, run = training.work, training.run
    file = run.pretrained if work.session.config.pretrain else run.head_before
    before = fitted(work.session.model, read_state(file))  # stage one's size may be another
    now = dict(work.session.model.named_parameters())
    mixed = {
        name: torch.lerp(before[name].to(p), p.detach(), work.stage.tune.alpha)
        for name, p in now.items()
        if p.requires_grad
    }
    put_tensors(work.session.model, mixed)


def close(training: Training) -> None:
    """After the last step: evaluate, and write the stage's weights; after fixing also the results."""
    work, run = training.work, training.run
    session, stage = work.session, work.stage
    training.writer.wait()
    if frozen_digest(work.parts) != training.fingerprint["frozen weights"]:
        raise RuntimeError(
            "a tensor that the policy keeps frozen has changed; please report this with the run's config.yaml"
        )
    if stage.tune.alpha < 1:
        take_back(training)
    predictions = training.evaluate(END[stage.name])
    if stage.name != "head":
        training.keep("after" if stage.name == "fix" else f"before-{stage.res}", predictions)
    if training.tracker and stage.name != "head":
        if stage.name == "fix":
            images = sum(s.images_until(s.stop) for s in training.todo)
            summary = results.write_results(run, session, training.progress.seconds, images, **work.how())
            training.draw("results")
            training.show_results(summary)
        weights = run.root / "export" / "model.safetensors" if stage.name == "fix" else run.pretrained
        write_weights(session.model, weights, session.config, stage.res, session.classes)
        shutil.rmtree(run.partial, ignore_errors=True)
        if stage.name == "fix":
            training.say(summary.sentence(run))
    session.ranks.barrier()
