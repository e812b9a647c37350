"""Signals set a flag; the loop reads it at a step boundary, where all ranks agree, save and leave."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Remembers the first stop signal. No work is done in the handler: it may interrupt an optimizer step.

    Loader workers are forked from this process and get every signal too; the pid guard makes them ignore it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.pid = os.getpid()

    def install(self) -> StopFlag:
        for number in SIGNALS:
            signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.signal = self.signal or number


def ignore_stop_signals() -> None:
    """For loader workers: they end with their parent, not with a signal that the parent wants to survive."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
