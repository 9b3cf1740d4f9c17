"""ResNet-20 on CIFAR-10 through float, post-training quantization (PTQ) and quantization-aware training (QAT).

    python examples/cifar10.py --data DATA                    # all schemes: a quarter of an hour on two cores
    python examples/cifar10.py --data DATA --qat-epochs 0     # PTQ only: two minutes
    python examples/cifar10.py --data DATA --epochs 60        # trains the float model, too, instead of loading it

DATA (or the environment variable LQ_DATA) holds `cifar10/train.npz` and `cifar10/test.npz`, each with the arrays `jpeg`
(uint8: the bytes of all images, one after the other), `offset` (int64 [n + 1] into it) and `label` (uint8 [n]), and
`cifar10/resnet20-float.safetensors`, a trained ResNet-20. Prints one row a scheme: accuracy on the test images in percent,
bytes of the whole model and their ratio to the float model's, and the seconds it took to quantize (for QAT: to train) and
pack. Needs pillow.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

import lightning_quant as lq

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_IMAGES = 512
W4A8 = lq.QuantScheme(weight=lq.QuantSpec(4), input=lq.QuantSpec(8, symmetric=False, granularity="tensor"))
PTQ = {
    "w8a8": "w8a8",
    "w8a8-dynamic": "w8a8-dynamic",
    "w4a16": "w4a16",
    "w4a8": lq.Recipe(W4A8, edges="w8a8"),  # a scheme of one's own; the first and the last layer keep 8 bits
    "w4a4": "w4a4",
}
QAT = ("w4a4", "w2a2")


def read_images(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    """Up to `limit` images, uint8 `[n, 3, 32, 32]`, and their labels, int64 `[n]`, in a fixed random order."""
    from PIL import Image

    with np.load(path) as file:
        data, offset, label = file["jpeg"], file["offset"], file["label"]
    # the files are sorted by class: the first images of one are no sample of it
    order = np.random.default_rng(0).permutation(len(label))[:limit]
    files = [data[offset[i] : offset[i + 1]].tobytes() for i in order]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(label[order]).long()


def crop_and_flip(images: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels and mirrored or not, at random."""
    windows = F.pad(images, (4, 4, 4, 4), mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32]
    n = len(images)
    cropped = windows[torch.arange(n), :, torch.randint(9, (n,)), torch.randint(9, (n,))]
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, cropped.flip(3), cropped)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Indexed with a list: a whole batch at once, normalised, so that no image is handled in Python on its own."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool = False) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices].float() / 255
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return (crop_and_flip(images) if self.augment else images), self.labels[indices]


class CIFAR10(L.LightningDataModule):
    """CIFAR-10, decoded once into memory."""

    def __init__(self, folder: Path, limit_train: int | None = None, limit_test: int | None = None) -> None:
        super().__init__()
        self.folder, self.limits = folder, {"train": limit_train, "test": limit_test}
        self.images: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str) -> None:
        for name in ("test",) if stage == "test" else ("train", "test"):
            if name not in self.images:
                self.images[name] = read_images(self.folder / f"{name}.npz", self.limits[name])

    def train_dataloader(self) -> DataLoader[Any]:
        data = Batches(*self.images["train"], augment=True)
        return DataLoader(data, sampler=BatchSampler(RandomSampler(data), 128, drop_last=True), batch_size=None)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """What `trainer.quantize` sees: training images as they are, never the test set."""
        images, labels = self.images["train"]
        return _in_order(Batches(images[:CALIBRATION_IMAGES], labels[:CALIBRATION_IMAGES]), 128)

    def test_dataloader(self) -> DataLoader[Any]:
        return _in_order(Batches(*self.images["test"]), 500)


def _in_order(data: Batches, batch_size: int) -> DataLoader[Any]:
    return DataLoader(data, sampler=BatchSampler(SequentialSampler(data), batch_size, drop_last=False), batch_size=None)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (He et al. 2015, arXiv:1512.03385, section 4.2, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.extra = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:  # subsample, and pad with channels of zeros
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs), Block(outputs, outputs), Block(outputs, outputs))


class ResNet20(L.LightningModule):
    """The network for CIFAR-10 of He et al. 2015, section 4.2, with 20 layers and 16, 32 and 64 channels."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _layer(16, 16), _layer(16, 32), _layer(32, 64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def calibration_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        correct = self(images).argmax(dim=1) == labels
        self.log("accuracy", 100 * correct.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        # learned scales and zero points are kept out of the weight decay; a float model has none
        groups = lq.param_groups(self, lr=self.lr, weight_decay=1e-4)
        optimizer = torch.optim.SGD(groups, self.lr, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Experiment:
    """The trainers, the data and the float model that every scheme starts from; one method a way to quantize."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = CIFAR10(args.data / "cifar10", args.limit_train, args.limit_test)
        self.data.setup("fit")  # decode now, outside the timings

    def trainer(self, epochs: int = 0, callbacks: Sequence[L.Callback] = ()) -> lq.Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        return lq.Trainer(max_epochs=epochs, callbacks=list(callbacks), enable_progress_bar=self.args.progress, **quiet)

    def float_model(self) -> ResNet20:
        model = ResNet20()
        if self.args.epochs:
            self.trainer(self.args.epochs).fit(model, datamodule=self.data)
        else:
            model.load_state_dict(load_file(self.args.pretrained))
        return model

    def ptq(self, state: dict[str, Tensor], recipe: str | lq.Recipe) -> nn.Module:
        model = ResNet20()
        model.load_state_dict(state)
        return self.trainer().quantize(model, datamodule=self.data, recipe=recipe)

    def qat(self, state: dict[str, Tensor], recipe: str | lq.Recipe) -> nn.Module:
        model = ResNet20(lr=self.args.qat_lr)
        model.load_state_dict(state)
        # BatchNorm statistics stop once the learning rate is low
        trainer = self.trainer(self.args.qat_epochs, [lq.QATCallback(recipe, method="lsq", freeze_bn_at=0.8)])
        trainer.fit(model, datamodule=self.data)
        return trainer.quantize()

    def accuracy(self, model: L.LightningModule) -> float:
        (logged,) = self.trainer().test(model, datamodule=self.data, verbose=False)
        return logged["accuracy"]


def run(args: argparse.Namespace) -> None:
    """Every scheme in turn; a row is printed as soon as it is known."""
    experiment = Experiment(args)
    float_bytes = 0

    def row(name: str, make: Callable[[], Any]) -> Any:
        nonlocal float_bytes
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        float_bytes = float_bytes or size
        accuracy = experiment.accuracy(model)
        print(f"{name:<18}{accuracy:>8.2f}{size:>14,}{size / float_bytes:>8.3f}{seconds:>9.1f}", flush=True)
        return model

    print(f"{'scheme':<18}{'accuracy':>8}{'bytes':>14}{'ratio':>8}{'seconds':>9}")
    state = row("float", experiment.float_model).state_dict()
    for name, recipe in PTQ.items():
        row(f"{name} PTQ", lambda recipe=recipe: experiment.ptq(state, recipe))
    for name in QAT if args.qat_epochs else ():
        row(f"{name} QAT", lambda name=name: experiment.qat(state, name))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LQ_DATA"), help="the data's folder; default: LQ_DATA")
    parser.add_argument("--pretrained", type=Path, help="float weights; default: DATA/cifar10/resnet20-float.safetensors")
    parser.add_argument("--epochs", type=int, default=0, help="train the float model for so long instead of loading it")
    parser.add_argument("--qat-epochs", type=int, default=2, help="length of the QAT fine-tune; 0: none")
    parser.add_argument("--qat-lr", type=float, default=0.01, help="highest learning rate of the QAT fine-tune")
    parser.add_argument("--limit-train", type=int, help="use only so many training images")
    parser.add_argument("--limit-test", type=int, help="use only so many test images")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    args = parser.parse_args(argv)
    if args.data is None:
        missing("no data: give --data DATA or set LQ_DATA")
    args.pretrained = args.pretrained or args.data / "cifar10" / "resnet20-float.safetensors"
    for path in [args.data / "cifar10" / "train.npz", args.data / "cifar10" / "test.npz"] + [args.pretrained] * (not args.epochs):
        if not path.is_file():
            missing(f"no data: {path} does not exist; see --help for what --data (or LQ_DATA) has to hold")
    return args


def missing(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*treespec, LeafSpec.*")
    L.seed_everything(0, verbose=False)
    run(args)


if __name__ == "__main__":
    main()
