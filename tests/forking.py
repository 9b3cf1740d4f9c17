"""Processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

WORKERS = ["tests.callbacks.resume_worker", "tests.callbacks.lora_resume_worker", "tests.work_worker"]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WORKERS)
    return context


def _call(function: Callable[..., Any], log: str, args: Sequence[Any], options: dict[str, Any]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*args, **options)


def run_forked(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Call a function in a process of its own; returns 0, or `-signal.SIGKILL` if it has killed itself."""
    (code,) = run_together(function, [args], codes=(0, -signal.SIGKILL), **options)
    return code


def run_together(
    function: Callable[..., Any],
    calls: Sequence[Sequence[Any]],
    timeout: float = 300,
    codes: Sequence[int] = (0,),
    **options: Any,
) -> list[int]:
    """Calls of a function at the same time, each in a process of its own; returns how they ended.

    Raises AssertionError with what was printed as soon as one ends with another exit code than `codes`, or after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{index}.log" for index in range(len(calls))]
        made = [
            _context().Process(target=_call, args=(function, str(log), args, options))
            for log, args in zip(logs, calls, strict=True)
        ]
        for process in made:
            process.start()
        left = {process.sentinel: index for index, process in enumerate(made)}
        try:
            while left:
                ended = wait(list(left), timeout)
                told = "".join(log.read_text()[-4000:] for log in logs if log.exists())
                assert ended, f"not ended after {timeout} seconds: {told}"
                for sentinel in ended:
                    process = made[left.pop(sentinel)]
                    process.join()
                    assert process.exitcode in codes, f"exit code {process.exitcode}: {told}"
        finally:
            for process in made:
                process.kill()
                process.join()
        return [process.exitcode for process in made]
