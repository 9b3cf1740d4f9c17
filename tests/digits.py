"""A real LightningModule on real data for the tests of the upper layers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def trainer(epochs: int = 1, *callbacks: L.Callback, **options: Any) -> lq.Trainer:
    return lq.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **options})


class Digits(L.LightningDataModule):
    """1,297 digits to train on, 500 to validate."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.tensor(digits.target)[order]
        self.train, self.val = TensorDataset(images[:1297], labels[:1297]), TensorDataset(images[1297:], labels[1297:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 250)


class Net(nn.Module):
    """Convolutions and BatchNorms with a shortcut, registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2, self.bn1 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(y + self.shortcut(x)).mean(dim=(2, 3)))


class Classifier(L.LightningModule):
    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen.append(len(batch[0]))
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        steps = min(self.trainer.estimated_stepping_batches, 10_000)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def accuracy(model: L.LightningModule, **options: Any) -> float:
    return 100 * trainer(**options).validate(model, datamodule=Digits(), verbose=False)[0]["accuracy"]
