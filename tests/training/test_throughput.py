"""The meter's readings, and the phases of a start."""

from __future__ import annotations

import pytest
import torch
from support.clock import own_clock

from fixres_dist.data.decoding import Bad, Batch
from fixres_dist.training import throughput
from fixres_dist.training.ranks import Ranks

RANKS = Ranks(0, 1, 1, ("here",), torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The meter's clock; its first entry is the time now, in seconds."""
    now = [100.0]
    own_clock(monkeypatch, throughput, monotonic=lambda: now[0])
    return now


def batch(n: int, *bad: Bad) -> Batch:
    return Batch(torch.zeros(n, 3, 4, 4, dtype=torch.uint8), torch.zeros(n), torch.arange(n), tuple(bad))


def test_a_reading_is_of_the_images_since_the_last_one(clock: list[float]) -> None:
    meter = throughput.Meter()
    for n, loss in ((6, 12.0), (2, 8.0)):
        meter.add(torch.tensor(loss), n)
    clock[0] += 4.0
    values = meter.read(RANKS, learning_rate=0.5)
    assert values["loss"] == 20.0 / 8
    assert values["images_per_second"] == 2.0
    assert values["learning_rate"] == 0.5
    meter.add(torch.tensor(3.0), 1)
    clock[0] += 1.0
    assert meter.read(RANKS)["loss"] == 3.0


def test_waiting_for_data_is_a_share_of_the_time_and_skipped_images_are_counted(clock: list[float]) -> None:
    meter = throughput.Meter()

    def loader():  # type: ignore[no-untyped-def]
        for found in (batch(2), batch(1, Bad(5, "torn"), Bad(6, "torn"))):
            clock[0] += 1.5
            yield found

    for found in meter.waiting(loader()):
        meter.add(torch.zeros(()), len(found.labels))
        clock[0] += 0.5
    values = meter.read(RANKS)
    assert values["data_wait_percent"] == pytest.approx(75.0)
    assert values["skipped"] == 2


def test_no_image_at_all_is_no_division_by_zero(clock: list[float]) -> None:
    meter = throughput.Meter()
    clock[0] += 1.0
    assert meter.read(RANKS)["loss"] == 0.0


def test_the_phases_of_a_start_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5, 13.0, 14.0])
    monkeypatch.setattr(throughput, "process_started", lambda: 8.0)
    own_clock(monkeypatch, throughput, time=lambda: next(times))
    startup = throughput.StartUp()
    for phase in ("imports", "model", "imports"):
        startup.mark(phase)
    found = startup.stop()
    assert found == {"time_to_first_step_s": 6.0, "imports_s": 2.5, "model_s": 2.5, "step_s": 1.0}
    assert not startup.running
