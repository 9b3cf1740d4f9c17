"""Two gloo processes, launched for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def launch(module: str, folder: Path, weights_only: bool = True, timeout: float = 600) -> list[Any]:
    """Run a module on two ranks; returns what each has saved as `<rank>.pt` in the folder that it is given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=weights_only) for rank in (0, 1)]
