"""The model and the data that the examples here share: a small BatchNorm network on the digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq


class DigitsNet(L.LightningModule):
    """Two convolutions with BatchNorm, which quantization folds, and a linear head.

    Args:
        width: channels of the first convolution.
        lr: rate of the weights.
        scale_lr: rate of learned scales (`QATCallback(method="lsq")`); Adam wants a tenth of `lr`.
    """

    def __init__(self, width: int = 16, lr: float = 5e-3, scale_lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = lq.param_groups(self, lr=self.hparams.lr, scale_lr=self.hparams.scale_lr, weight_decay=1e-4)
        return torch.optim.AdamW(groups)


class EpochOrder(Sampler[int]):
    """A random order for each epoch that depends on nothing else: a resumed fit sees what an uninterrupted one sees."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self) -> int:
        return self.size


class DigitsData(L.LightningDataModule):
    """1,297 digits to train on, 500 to validate, test and predict.

    Args:
        batch_size: of the training.
        limit: how many digits to train on at most.
        seed: of the order of training.
    """

    def __init__(self, batch_size: int = 64, limit: int = 1297, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.limit, self.seed = batch_size, limit, seed

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.tensor(digits.target)[order]
        self.train = TensorDataset(images[: min(self.limit, 1297)], labels[: min(self.limit, 1297)])
        self.val = TensorDataset(images[1297:], labels[1297:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, sampler=EpochOrder(len(self.train), self.seed))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=250)

    test_dataloader = predict_dataloader = val_dataloader
