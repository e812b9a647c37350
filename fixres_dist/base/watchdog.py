"""A process in which no batch progresses for too long says where it stands and ends. No torch.

Without it a rank that hangs holds its nodes, and the others wait for it in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

NO_PROGRESS = "no progress for"  # how every reason begins that comes from here
PACKAGE = Path(__file__).parents[1]
GIVE_UP_S = 120.0  # for what is written down before the end, each write of which is tried again for half a minute
POLLS, LONGEST_POLL_S = 20, 1.0  # looks within the limit
latest = time.monotonic()  # of this process's last sign of progress


def beat() -> None:
    """A sign of progress: a batch, a phase of the start, a part of a long scan."""
    global latest
    latest = time.monotonic()


@contextlib.contextmanager
def watching(
    limit_s: Callable[[], float], seen: Callable[[float], None], give_up: Callable[[str, float], None]
) -> Iterator[None]:
    """While the block runs, a thread looks after the process.

    At every look it calls `seen(idle_s)` with the seconds since the last sign of progress. Once they exceed `limit_s()`
    (0: never), it prints the stacks of all threads to stderr, calls `give_up(place, limit_s)` with the line at which the
    main thread stands, and ends the process with exit code 1.
    """
    beat()
    ended = threading.Event()

    def watch() -> None:
        while True:
            seen(time.monotonic() - latest)
            limit = limit_s()
            poll = min(LONGEST_POLL_S, limit / POLLS or LONGEST_POLL_S)
            asked = time.monotonic()
            if ended.wait(poll):
                return
            if time.monotonic() - asked > 2 * poll + 1:
                beat()  # this process was suspended, and every other thread of it too
            if limit and time.monotonic() - latest > limit:
                end_process(f"{NO_PROGRESS} {limit:.0f} s", functools.partial(give_up, place(), limit))

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def end_process(why: str, give_up: Callable[[], None]) -> NoReturn:
    """From any thread: print `why` and the stacks of all threads, call `give_up`, and end the process with exit code 1.

    It ends as well where `give_up` fails or does not come back, as when the run's file system is away.
    """
    faulthandler.dump_traceback_later(GIVE_UP_S, exit=True)
    print(f"{why}: the stacks of all threads", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    try:
        give_up()
    except Exception as error:
        print(f"the reason cannot be written down: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def place() -> str:
    """The innermost line of this package at which the main thread is: `training/ranks.py:80 highest`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "code outside of this package"


@dataclass(frozen=True)
class Standing:
    """Where a rank stands that hangs, or waits for one that does."""

    rank: int
    node: str
    place: str
    time: float  # Unix time in seconds


def reason(told: Sequence[Standing], world_size: int, limit_s: float) -> str:
    """Why the run is ended, from where each rank that answers stands: the fewest come first, with their node, since the
    others wait for them; a rank that does not answer is suspended, or its node is lost."""
    at: dict[str, list[Standing]] = {}
    for one in sorted(told, key=lambda one: one.rank):
        at.setdefault(one.place, []).append(one)
    silent = sorted({*range(world_size)} - {one.rank for one in told})
    parts = [f"{named(silent)} does not answer (suspended, or its node is lost)"] if silent else []
    for where, here in sorted(at.items(), key=lambda item: len(item[1])):
        nodes = sorted({one.node for one in here})
        parts.append(f"{named([one.rank for one in here])}{f' on {nodes[0]}' if len(nodes) == 1 else ''} in {where}")
    return f"{NO_PROGRESS} {limit_s:.0f} s (run.watchdog_s): {'; '.join(parts)}; stacks of all threads are in the logs"


def named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {', '.join(map(str, ranks[:8]))}{more}"
