"""Distillation by two processes: `torchrun --standalone --nproc_per_node 2 -m tests.callbacks.distillation_worker FOLDER`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

import lightning_quant as lq
from lightning_quant.sharding import plain_copy
from tests.callbacks.ddp_worker import Net, host, loader, made

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "ddp, unused sought": lambda: "ddp_find_unused_parameters_true",
    "fsdp2": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
}


class Sharded(Net):
    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        for part in (self.net, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train(strategy: Any = "auto", epochs: int = 2, ckpt: str | None = None, folder: Path | None = None) -> dict[str, Tensor]:
    """QAT and distillation; a resumed run starts from other weights."""
    model = made(0.05, Sharded)
    if ckpt is not None:
        with torch.no_grad():
            model.head.bias.add_(1)
    distill = lq.DistillationCallback(loss={"kl": 1.0, "features": 0.5}, layers="net.0", alpha=0.7, dtype="float32")
    keeper = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    qat = lq.QATCallback(lq.Recipe("w4a4", edges=None))
    trainer = host(epochs, qat, distill, *keeper, enable_checkpointing=bool(keeper), strategy=strategy)
    trainer.fit(model, loader(), ckpt_path=ckpt)
    whole = plain_copy(model)
    return {**whole.state_dict(), "loss": trainer.callback_metrics["distill/loss"], "steps": torch.tensor(trainer.global_step)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, strategy in STRATEGIES.items():
        where = folder / name.partition(",")[0]
        found[name] = train(strategy(), folder=where if "," not in name else None)
        if "," not in name:
            found[f"{name}, resumed"] = train(strategy(), ckpt=str(where / "epoch=0.ckpt"))
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
