"""Float, PTQ and QAT of a small CNN and a small transformer on the real digits that scikit-learn ships.

    python examples/digits.py

Trains both models, quantizes them in every way, and prints one table: accuracy on the held-out digits, packed bytes, latency of
one batch on the reference kernels. Saves and reloads every packed model and checks that it computes the same. About two minutes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_quant as lq
from lightning_quant.report import model_bytes, table

PTQ = ("w8a8", "w8a8-dynamic", "w4a16", "w4a4")
QAT = ("w4a4", "w2a2")


class Digits(L.LightningDataModule):
    """1,797 real digits of 8 x 8 pixels: 1,297 to train on, 500 to validate."""

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        data = TensorDataset(images[order], torch.tensor(digits.target)[order])
        self.train = torch.utils.data.Subset(data, range(1297))
        self.val = torch.utils.data.Subset(data, range(1297, 1797))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=250)


class CNN(nn.Module):
    """Convolutions and BatchNorms with a shortcut, for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(32, 128, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(128)
        self.conv2, self.bn2 = nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.shortcut = nn.Sequential(nn.Conv2d(32, 128, 1, stride=2, bias=False), nn.BatchNorm2d(128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(y + self.shortcut(x)).mean(dim=(2, 3)))


class Transformer(nn.Module):
    """Two encoder layers over the image's 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.encoder(tokens).mean(dim=1)))


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        # Adam undoes LSQ's gradient scale, so learned scales get a lower rate of their own
        groups = lq.param_groups(self, lr=self.lr, weight_decay=0.01, scale_lr=self.lr / 10)
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(epochs: int, *callbacks: L.Callback) -> lq.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return lq.Trainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, callbacks=list(callbacks), **quiet)


def accuracy(model: L.LightningModule, data: Digits) -> float:
    return 100 * make_trainer(1).validate(model, datamodule=data, verbose=False)[0]["accuracy"]


def latency(model: nn.Module, batch: Tensor, repeats: int = 20) -> float:
    """Median milliseconds of one forward pass."""
    taken = []
    with torch.inference_mode():
        model.eval()(batch)
        for _ in range(repeats):
            start = time.perf_counter()
            model(batch)
            taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def check_reload(qmodel: Classifier, fresh: nn.Module, batch: Tensor) -> str:
    """Save, reload into a model without weights, and compare outputs bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        lq.save_quantized(qmodel, folder)
        again = lq.load_quantized(Classifier(fresh, qmodel.lr), folder)
    if not torch.equal(qmodel(batch), again(batch)):
        raise AssertionError("the reloaded model computes something else")
    return "equal"


def run(name: str, make_net: Any, epochs: int, data: Digits, args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """All rows of one architecture."""
    L.seed_everything(0, verbose=False)
    batch = torch.rand(64, 1, 8, 8)
    model = Classifier(make_net(), args.lr)
    make_trainer(epochs).fit(model, datamodule=data)
    size = model_bytes(model)
    rows: list[tuple[Any, ...]] = []

    def add(scheme: str, how: str, measured: Classifier, reloaded: str) -> None:
        used, score = model_bytes(measured), accuracy(measured, data)
        cells = (f"{score:.1f}", f"{used:,}", f"{used / size:.3f}", f"{latency(measured, batch):.2f}", reloaded)
        rows.append((name, scheme, how, *cells))
        print("  ".join(map(str, rows[-1])), flush=True)

    add("float", "", model, "")
    for scheme in PTQ:
        qmodel = make_trainer(1).quantize(model, datamodule=data, recipe=scheme)
        add(scheme, "PTQ", qmodel, check_reload(qmodel, make_net(), batch))
    for scheme in QAT:
        trained = copy.deepcopy(model).train()
        trained.lr = args.lr / 2
        callback = lq.QATCallback(scheme, method="lsq", freeze_bn_at=0.8)
        trainer = make_trainer(args.qat_epochs, callback)
        trainer.fit(trained, datamodule=data)
        qmodel = trainer.quantize()
        add(scheme, "QAT", qmodel, check_reload(qmodel, make_net(), batch))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="of the CNN; the transformer takes twice as many")
    parser.add_argument("--qat-epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the images are 8 x 8: threads would cost more than they bring
    start = time.time()
    data = Digits()
    rows = run("CNN", CNN, args.epochs, data, args) + run("Transformer", Transformer, 2 * args.epochs, data, args)
    header = ("model", "scheme", "by", "accuracy %", "bytes", "of float", "ms / 64 images", "reloaded")
    print(f"\n{table(header, rows)}\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
