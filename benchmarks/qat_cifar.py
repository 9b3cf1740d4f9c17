"""QAT at few bits: ResNet-20 on CIFAR-10 from one float start, by method.

    python benchmarks/qat_cifar.py --data DATA --json out.json --plot out.png       # everything: two hours on two cores
    python benchmarks/qat_cifar.py --data DATA --json out.json --only "w2a2"        # some rows; those in the file are not run again

DATA holds what `examples/cifar10.py` needs. Weights have one scale a channel, activations one asymmetric range a tensor; the first
and the last layer keep 8 bits. Every row starts from the same float weights and trains on all training images in bfloat16 and
channels_last, by SGD with one cycle of the learning rate; accuracy is that of the packed model on all test images. "float" is the
start, and the start trained on in float as long as the comparisons are: what the training alone is worth. PTQ has mse ranges
(observer "mse") from 512 training images.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [HERE, str(Path(HERE).parent / "examples"), *(path for path in sys.path if path != HERE)]

import timing  # noqa: E402
from cifar10 import CIFAR10, ResNet20  # noqa: E402

sys.path.remove(HERE)  # kernels.py has the name of a package that transformers looks for

import lightning_quant as lq  # noqa: E402
from lightning_quant.report import table  # noqa: E402

BITS = ("w4a4", "w3a3", "w2a2")
# how the methods are compared, and what the best one adds
KIND = {"loss": "kl", "alpha": 0.7, "temperature": 4.0}
METHODS: dict[str, dict[str, Any]] = {
    "PTQ, mse ranges": {},
    "STE": {"method": "ste"},
    "LSQ": {"method": "lsq"},
    "LSQ, distilled": {"method": "lsq", "distill": KIND},
    "EWGS, distilled": {"method": "ewgs", "distill": KIND},
    "best": {"method": "lsq", "distill": KIND, "long": True},
}
# where bars end that would be longer
LEAST = -6.0
# epochs of the best, by bits
LONG = {"w4a4": 12, "w3a3": 15, "w2a2": 24}


class Experiment:
    """Data, trainers and the float start."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = CIFAR10(args.data / "cifar10", args.limit_train, args.limit_test)
        self.data.setup("fit")
        self.state = load_file(args.data / "cifar10" / "resnet20-float.safetensors")

    def model(self, lr: float) -> ResNet20:
        L.seed_everything(self.args.seed, verbose=False)
        model = ResNet20(lr=lr)
        model.load_state_dict(self.state)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def trainer(self, epochs: int, callbacks: list[L.Callback]) -> lq.Trainer:
        keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": keeps, "enable_model_summary": False}
        options = {"max_epochs": epochs, "enable_progress_bar": False, "accelerator": "cpu"}
        return lq.Trainer(callbacks=callbacks, precision="bf16-mixed" if epochs else "32-true", **options, **quiet)

    def accuracy(self, model: L.LightningModule) -> float:
        (logged,) = self.trainer(0, []).test(model, datamodule=self.data, verbose=False)
        return logged["accuracy"]

    def float(self, epochs: int) -> float:
        model = self.model(self.args.lr)
        if epochs:
            self.trainer(epochs, []).fit(model, datamodule=self.data)
        return self.accuracy(model)

    def run(self, bits: str, options: dict[str, Any]) -> float:
        if not options:
            recipe = lq.Recipe(bits, observer="mse", weight_observer="mse")
            return self.accuracy(self.trainer(0, []).quantize(self.model(0.0), datamodule=self.data, recipe=recipe))
        epochs = self.epochs(bits, options)
        callbacks: list[L.Callback] = [lq.QATCallback(bits, method=options["method"], freeze_bn_at=self.args.freeze_bn_at)]
        if "distill" in options:
            callbacks.append(lq.DistillationCallback(**options["distill"]))
        folder, resumed = None, None
        if self.args.checkpoints is not None:
            run = self.settings(epochs, self.lr(options))
            folder = self.args.checkpoints / re.sub(r"[^\w.]+", "-", f"{bits} {options} {run}")
            callbacks += [ModelCheckpoint(folder, save_last=True), lq.RandomStateCallback()]
            resumed = folder / "last.ckpt" if (folder / "last.ckpt").exists() else None
        trainer = self.trainer(epochs, callbacks)
        model = self.model(self.lr(options))
        trainer.fit(model, datamodule=self.data, ckpt_path=resumed)
        found = self.accuracy(trainer.quantize())
        if folder is not None:
            shutil.rmtree(folder)
        return found

    def limits(self) -> dict[str, Any]:
        return {"limit_train": self.args.limit_train, "limit_test": self.args.limit_test}

    def settings(self, epochs: int, lr: float = 0.0) -> dict[str, Any]:
        """What a row depends on, besides its bits and method; rates and seeds are for what trains."""
        trained = {"lr": lr, "freeze_bn_at": self.args.freeze_bn_at, "seed": self.args.seed} if epochs else {}
        return {"epochs": epochs, **self.limits(), **trained}

    def lr(self, options: dict[str, Any]) -> float:
        return self.args.long_lr if options.get("long") else self.args.lr

    def epochs(self, bits: str, options: dict[str, Any]) -> int:
        return 0 if not options else (self.args.long_epochs or LONG[bits]) if options.get("long") else self.args.epochs


def draw(figure: Any, rows: list[dict[str, Any]], exact: float) -> None:
    """Accuracy less the float start's, a group of bars for each number of bits."""
    axes = figure.subplots(len(BITS), 1, squeeze=False)[:, 0]
    order = list(METHODS)
    for shown, bits in zip(axes, BITS, strict=True):
        mine = sorted((row for row in rows if row["bits"] == bits), key=lambda row: order.index(row["method"]))
        names = [f"{row['method']} ({row['epochs']})" for row in mine]
        less = [row["accuracy"] - exact for row in mine]
        bars = shown.barh(names, [max(value, LEAST) for value in less], color="tab:blue")
        shown.bar_label(bars, labels=[f"{value:+.2f}" for value in less], padding=3, fontsize=8)
        shown.axvline(0.0, color="black", linewidth=0.8)
        shown.set(title=bits, xlabel="accuracy less float's, points (epochs)", xlim=(LEAST - 1, 1))
        shown.invert_yaxis()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LQ_DATA"), help="the data's folder; default: LQ_DATA")
    parser.add_argument("--epochs", type=int, default=5, help="of each comparison")
    parser.add_argument("--long-epochs", type=int, help=f"of the best; default: {LONG}")
    parser.add_argument("--lr", type=float, default=0.02, help="highest learning rate of a comparison")
    parser.add_argument("--long-lr", type=float, default=0.04, help="highest learning rate of the best")
    parser.add_argument("--freeze-bn-at", type=float, default=0.9)
    parser.add_argument("--only", default="", help="rows this regular expression is in, such as 'w2a2 LSQ'")
    parser.add_argument("--checkpoints", type=Path, help="a folder: killed runs go on from their last epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--json", type=Path, help="a file to write results to as they come; rows that it has are not run again")
    parser.add_argument("--plot", type=Path, help="a picture to write; needs matplotlib")
    args = parser.parse_args(given)
    if args.data is None or not (args.data / "cifar10" / "train.npz").is_file():
        parser.error("no data: --data (or LQ_DATA) names a folder with cifar10, see examples/cifar10.py")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    experiment = Experiment(args)
    rows: list[dict[str, Any]] = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []

    def measure(bits: str, method: str, settings: dict[str, Any], make: Any) -> None:
        wanted = {"bits": bits, "method": method, **settings}
        if any(wanted.items() <= row.items() for row in rows):
            return
        start = time.perf_counter()
        found = {**wanted, "accuracy": make(), "seconds": time.perf_counter() - start}
        rows.append(found)
        print(f"{bits:<6}{method:<18}{settings['epochs']:>4} epochs{found['accuracy']:>8.2f}{found['seconds']:>8.0f} s", flush=True)
        timing.write_json(args.json, {"machine": timing.machine(args.threads), "rows": rows})

    measure("float", "start", experiment.settings(0), lambda: experiment.float(0))
    if re.search(args.only, "float trained on"):
        measure("float", "trained on", experiment.settings(args.epochs, args.lr), lambda: experiment.float(args.epochs))
    for bits in BITS:
        for name, options in METHODS.items():
            if re.search(args.only, f"{bits} {name}"):
                settings = experiment.settings(experiment.epochs(bits, options), experiment.lr(options))
                measure(bits, name, settings, lambda b=bits, o=options: experiment.run(b, o))
    limits = experiment.limits().items()
    rows = [row for row in rows if limits <= row.items()]
    exact = next(row["accuracy"] for row in rows if row["method"] == "start")
    shown = [
        (row["bits"], row["method"], row["epochs"], f"{row['accuracy']:.2f}", f"{row['accuracy'] - exact:+.2f}") for row in rows
    ]
    print(table(["bits", "method", "epochs", "accuracy", "less float"], shown))
    timing.figure(args.plot, lambda figure: draw(figure, [row for row in rows if row["bits"] in BITS], exact), (8.0, 8.0))


if __name__ == "__main__":
    main()
