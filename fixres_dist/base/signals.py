"""Stop signals set a flag. Every loop over batches reads it at each batch, where all ranks agree, save and leave."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from fixres_dist.base.watchdog import end_process

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A stop signal on which all ranks have agreed, at the same batch. What is done so far is kept for the next start."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number  # the signal's


class StopFlag:
    """Remembers the first stop signal; its handler does nothing else, since it may interrupt an optimizer step."""

    def __init__(self) -> None:
        self.signal = 0  # number of the first stop signal; 0: none yet
        self.pid = os.getpid()  # loader workers are forked from this process, get every signal too, and ignore it

    def install(self) -> StopFlag:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.signal = self.signal or number

    def deadline(self, seconds: float, give_up: Callable[[], None], heard: Callable[[], None]) -> None:
        """End this process `seconds` after the first stop signal, unless it has left by itself: a rank that waits in a
        collective for a dead one must not hold its nodes. `give_up` is called before that, and must be quick; `heard` at
        once, even in a step that lasts longer than the process may live.

        A Python handler does not run while the main thread hangs in C, but the interpreter writes each signal to its
        wakeup descriptor at once, where a thread reads it.
        """
        told, tell = socket.socketpair()
        tell.setblocking(False)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            with tell:  # stays open as long as signals are written to it
                while not self.signal and told.recv(1)[0] not in SIGNALS:
                    pass  # another signal: Slurm sends SIGCONT with most of its signals
                ends = time.monotonic() + seconds
                try:
                    heard()
                except Exception as error:  # the deadline holds all the same
                    print(f"after the stop signal: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                time.sleep(max(0.0, ends - time.monotonic()))
                end_process(f"no common batch {seconds:.0f} s after the stop signal", give_up)

        threading.Thread(target=watch, name="stop deadline", daemon=True).start()


def ignore_stop_signals() -> None:
    """For loader workers: they end with their parent, which outlives a stop signal until it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
