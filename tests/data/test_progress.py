"""Progress of long work where there is no terminal: lines in the log, none for work that is short."""

from __future__ import annotations

import pytest
from support.clock import own_clock

from fixres_dist.data import progress


def test_a_line_every_half_minute_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    own_clock(monkeypatch, progress, monotonic=lambda: now[0])
    for show in (True, False):
        with progress.progress_bar("reading", show) as report:
            for done in range(0, 2000, 100):  # the first 400 were done before
                now[0] += 4
                report(400 + done, 4400)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "reading: 1,100 of 4,400 images (25 %), 22 img/s, eta 2m31s",
        "reading: 1,900 of 4,400 images (43 %), 23 img/s, eta 1m47s",
    ]
