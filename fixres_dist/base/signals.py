"""Signals set a flag; the loop reads it at a step boundary, where all ranks agree, save and leave."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopFlag:
    """Remembers the first stop signal. No work is done in the handler: it may interrupt an optimizer step.

    Loader workers are forked from this process and get every signal too; the pid guard makes them ignore it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.pid = os.getpid()

    def install(self) -> StopFlag:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.signal = self.signal or number

    def deadline(self, seconds: float, give_up: Callable[[], None]) -> None:
        """End this process `seconds` after the first stop signal, unless it has left by itself: a rank that waits in a
        collective for a dead peer must not hold its nodes. `give_up` is called before, with little time.

        A Python handler does not run while the main thread hangs in C; the interpreter's wakeup descriptor is written
        at once, so a thread that reads it knows of the signal in any case.
        """
        told, tell = socket.socketpair()
        tell.setblocking(False)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            with tell:  # kept open as long as signals are written to it
                while not self.signal and told.recv(1)[0] not in SIGNALS:
                    pass  # SIGCONT comes with most of Slurm's signals
                time.sleep(seconds)
                print(f"no common step boundary {seconds:.0f} s after the stop signal: giving up", file=sys.stderr)
                faulthandler.dump_traceback()
                give_up()
                os._exit(1)

        threading.Thread(target=watch, name="stop deadline", daemon=True).start()


def ignore_stop_signals() -> None:
    """For loader workers: they end with their parent, not with a signal that the parent wants to survive."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
