"""One fit in a process of its own, which may kill itself."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_quant as lq

EPOCHS, BATCHES, ACCUMULATE = 4, 6, 2


class Noisy(Dataset):
    """Samples that are augmented with every random generator there is."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(4 * BATCHES, 1, 8, 8, generator=generator)
        self.y = torch.randint(0, 4, (len(self.x),), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] * (1 + random.random()) + np.random.rand() * torch.randn(1, 8, 8), self.y[index]


class Model(L.LightningModule):
    def __init__(self, grouped: bool = True) -> None:
        super().__init__()
        self.grouped = grouped
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.drop, self.hidden, self.head = nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.drop(self.net(x).mean(dim=(2, 3))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        groups = lq.param_groups(self, lr=5e-3, scale_lr=5e-4, weight_decay=0.01) if self.grouped else self.parameters()
        optimizer = torch.optim.AdamW(groups, 5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES // ACCUMULATE)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(L.Callback):
    """SIGKILL to the own process at a place of the fit."""

    def __init__(self, epoch: int, batch: int, where: str) -> None:
        self.at, self.where = (epoch, batch), where

    def _kill(self, where: str, trainer: L.Trainer, batch: int) -> None:
        if (where, trainer.current_epoch, batch) == (self.where, *self.at):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._kill("start", trainer, batch_idx)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self._kill("backward", trainer, trainer.fit_loop.epoch_loop.batch_idx)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        self._kill("validation", trainer, batch_idx)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self._kill("save", trainer, trainer.fit_loop.epoch_loop.batch_idx)


def fit(
    folder: str,
    method: str,
    recipe: Any,
    mode: str,
    options: Any = None,
    kill: Any = None,
    resume: str | None = None,
    seed: int = 0,
) -> None:
    """Train to the end and save `final.ckpt`.

    Args:
        options: more of `QATCallback`'s; with `scale_lr` the optimizer has one group.
        mode: "epoch": a plain DataLoader, checkpoints after each epoch's validation; "step": a stateful one, without
            validation, and a checkpoint at every third optimizer step but one.
    """
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    loader = (StatefulDataLoader if mode == "step" else DataLoader)(Noisy(), 4, shuffle=True)
    every: dict[str, Any] = {"every_n_train_steps": 2} if mode == "step" else {}
    callbacks: list[L.Callback] = [
        lq.QATCallback(recipe, method=method, quantize_from=1, freeze_observers_at=2, freeze_bn_at=0.8, **(options or {})),
        lq.RandomStateCallback(),
        ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every),
    ]
    if mode == "epoch":
        callbacks += [EarlyStopping("loss", patience=50)]
    if kill:
        callbacks.append(Kill(*kill))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        limit_val_batches=2 if mode == "epoch" else 0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Model(grouped="scale_lr" not in (options or {})), loader, DataLoader(Noisy(), 4), ckpt_path=resume, weights_only=True
    )
    trainer.save_checkpoint(os.path.join(folder, "final.ckpt"))
