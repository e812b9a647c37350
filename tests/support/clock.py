"""A module's own clock in a test."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def own_clock(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., Any]) -> None:
    """`module` sees these functions of `time`; everybody else keeps the real ones.

    Setting them on `time` itself reaches every thread of the process: sleeps of other threads were counted as waits of the
    module that is tested.
    """
    monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **functions}))
