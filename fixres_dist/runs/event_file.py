"""TensorBoard's file of events, in the format of its own writers.

Those write in a thread. A failed write raises there, where no caller can catch it, and prints a traceback beside the run's
reason; and loader processes are forked while it may hold a lock. The few points of a run need no thread.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from fixres_dist.base.files import named

NUMBERS = itertools.count()


class EventFile:
    """A new file in `folder`. A TensorBoard that has read earlier ones of this folder forgets what they said.

    Every method raises OSError, with the file's path, on a disk that is full or away.
    """

    def __init__(self, folder: Path, suffix: str = "") -> None:
        folder.mkdir(exist_ok=True)  # not its parents: their disk may be unmounted (see checkpoint.write)
        # TensorBoard reads files in the order of their names; two may be of one second.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(NUMBERS):06d}"
        self.path = folder / f"{name}{suffix}"
        self.records = RecordWriter(open(self.path, "xb"))  # noqa: SIM115 (closed by close)
        self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))

    def write(self, event: Event) -> None:
        with named(self.path):
            self.records.write(event.SerializeToString())

    def add(self, summary: Any, step: int = 0, walltime: float | None = None) -> None:
        """Add a summary of torch.utils.tensorboard.summary; `walltime`: seconds since 1970, None for now."""
        self.write(Event(wall_time=time.time() if walltime is None else walltime, step=step, summary=summary))

    def flush(self) -> None:
        """Show what was added to those who read the file."""
        with named(self.path):
            self.records.flush()

    def close(self) -> None:
        with named(self.path):
            self.records.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
