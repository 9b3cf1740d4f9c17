"""Selective QAT by two processes: `torchrun --standalone --nproc_per_node 2 -m tests.callbacks.selective_worker FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.sharding import plain_copy
from tests.callbacks.ddp_worker import host, loader, made
from tests.callbacks.distillation_worker import STRATEGIES, Sharded


def _weights(model: nn.Module) -> dict[str, Tensor]:
    state = plain_copy(model).state_dict()
    return {name: value.clone() for name, value in state.items() if value.is_floating_point() and "observer" not in name}


def train(what: str, strategy: Any = "auto") -> dict[str, Tensor]:
    """The end of a training of two epochs, and under `start.` what the parameters were."""
    model = made(0.05, Sharded)
    lq.prepare(model, lq.Recipe("w4a4", edges=None), method="lsq")
    start = {f"start.{name}": value for name, value in _weights(model).items() if "input" not in name}
    callback = lq.QATCallback(lq.Recipe("w4a4", edges=None), method="lsq", train=what)
    trainer = host(2, callback, strategy=strategy)
    trainer.fit(model, loader())
    assert all(value.requires_grad for value in model.parameters())
    return {**_weights(model), **start}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {(name, what): train(what, make()) for name, make in STRATEGIES.items() for what in ("head", "scales")}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
