"""Processes that may be killed, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

WORKERS = ["tests.callbacks.resume_worker", "tests.callbacks.lora_resume_worker", "tests.work_worker"]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WORKERS)
    return context


def _call(function: Callable[..., Any], log: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*args, **options)


def run_forked(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Call a function of `WORKERS` in a process of its own; returns 0, or `-signal.SIGKILL` if it has killed itself."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = _context().Process(target=_call, args=(function, str(log), args, options))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{function} has not ended: {log.read_text()[-3000:]}")
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
        return process.exitcode
