"""A fine-tune in a process of its own, which may kill itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_quant as lq
from tests.lora_cases import QUIET, VOCABULARY, Causal

EPOCHS, BATCHES = 3, 6


class Model(Causal):
    def configure_optimizers(self) -> Any:
        optimizer = lq.make_optimizer(self, "adamw8bit", lr=1e-2, min_8bit_size=64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, step: int) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    model = Model()
    ids = torch.randint(0, VOCABULARY, (4 * BATCHES, 12), generator=torch.Generator().manual_seed(1))
    saved = ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}")
    adapters = lq.LoRACallback(r=4, dropout=0.2, adapter_dir=str(folder / "adapter"))
    callbacks = [adapters, lq.RandomStateCallback(), saved, Kill(step)]
    options = {**QUIET, "default_root_dir": folder}
    trainer = L.Trainer(max_epochs=EPOCHS, plugins=[lq.QuantPrecision("nf4")], callbacks=callbacks, **options)
    last = folder / "last.ckpt"
    trainer.fit(model, DataLoader(ids, batch_size=4, shuffle=True), ckpt_path=str(last) if last.exists() else None)
