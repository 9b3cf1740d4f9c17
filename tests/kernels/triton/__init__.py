"""Triton's kernels. Whether they are interpreted is settled when Triton is imported: those tests have a process of their own."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def only_interpreted() -> None:
    """For the top of a module whose tests `test_interpreter.py` runs."""
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("runs in Triton's interpreter, in the process that test_interpreter.py starts", allow_module_level=True)


def only_compiled() -> None:
    """For the top of a module whose tests need Triton's compiler, or this process as it is."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: Triton's compiler is not in use", allow_module_level=True)
