"""Two gloo processes, launched for real."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from tests.forking import run_together


def _rank(module: str, folder: str, rank: int, port: int) -> None:
    """Run a module as torchrun does."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({key: str(value) for key, value in {**ranks, **meeting}.items()})
    torch.set_num_threads(1)
    sys.argv = [module, folder]
    runpy.run_module(module, run_name="__main__")


def launch(module: str, folder: Path, weights_only: bool = True, timeout: float = 600) -> list[Any]:
    """Run a module on two ranks; returns what each has saved as `<rank>.pt` in the folder that it is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_together(_rank, [(module, str(folder), rank, port) for rank in (0, 1)], timeout)
    return [torch.load(folder / f"{rank}.pt", weights_only=weights_only) for rank in (0, 1)]
