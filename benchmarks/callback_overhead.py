"""What the callbacks add to a training step, beyond fake quantization itself.

Four fits of the same ResNet-20 in one process take turns, step by step, so that a machine's drift meets all of them alike:
prepared by hand with the flags of QAT set and no callback; the same again, which shows how far equal fits differ; with
`QATCallback`; and with `QuantizationMonitor` beside it. Each logs its loss to a CSVLogger. A step is the time from one train
batch's start to the next one's, waiting excluded; a ratio is that of one turn.

    OMP_NUM_THREADS=1 python benchmarks/callback_overhead.py
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.calibration import set_flags

KINDS = ("by hand", "control", "QATCallback", "with monitor")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        if inputs == outputs and stride == 1:
            self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet20(L.LightningModule):
    """He et al. 2016, arXiv:1512.03385, section 4.2, with projections as shortcuts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            for block in range(3):
                layers.append(Block(channels, width << stage, 2 if stage and not block else 1))
                channels = width << stage
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Turns:
    """Lets one of several threads run at a time, each for one step."""

    def __init__(self, names: Sequence[str]) -> None:
        self.queue, self.changed = list(names), threading.Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.queue[0] == name)

    def pass_on(self, name: str, leave: bool = False) -> None:
        with self.changed:
            self.queue.remove(name)
            self.queue += [] if leave else [name]
            self.changed.notify_all()


class Clock(L.Callback):
    """Times steps and takes turns; the first in the list, so that all that callbacks do is inside of a step."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns
        self.start: float | None = None
        self.steps: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if self.start is not None:
            self.steps.append(time.perf_counter() - self.start)
        self.turns.pass_on(self.name)
        self.turns.wait(self.name)
        self.start = time.perf_counter()


def fit(kind: str, clock: Clock, options: argparse.Namespace, directory: str) -> None:
    clock.turns.wait(kind)
    try:
        torch.set_num_threads(options.threads)  # a thread has its own
        torch.manual_seed(0)
        model = ResNet20(options.width)
        callbacks: list[L.Callback] = [clock]
        if kind in ("by hand", "control"):
            lq.prepare(model, options.recipe)
            set_flags(model, observing=True, following=True, quantizing=True)
        else:
            callbacks.append(lq.QATCallback(options.recipe))
        if kind == "with monitor":
            callbacks.append(lq.QuantizationMonitor(every_n_steps=options.every))
        size = options.batch
        data = TensorDataset(torch.randn(8 * size, 3, 32, 32), torch.randint(10, (8 * size,)))
        trainer = L.Trainer(
            max_steps=options.steps + 1,
            callbacks=callbacks,
            logger=CSVLogger(directory),
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, size))
    finally:
        clock.turns.pass_on(kind, leave=True)


def run(order: Sequence[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of each kind."""
    turns = Turns(order)
    clocks = {kind: Clock(kind, turns) for kind in order}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(len(order)) as pool:
        for done in [pool.submit(fit, kind, clocks[kind], options, directory) for kind in order]:
            done.result()
    return {kind: clock.steps for kind, clock in clocks.items()}


def spread(ratios: Sequence[float]) -> str:
    """The median, its 95 % interval (by order statistics, so of any distribution), and the quartiles."""
    ordered, n = sorted(ratios), len(ratios)
    half = math.ceil(0.98 * math.sqrt(n))
    low, high = ordered[max(n // 2 - half, 0)], ordered[min(n // 2 + half, n - 1)]
    quartiles = f"{ordered[n // 4]:.3f} .. {ordered[-1 - n // 4]:.3f}"
    return f"{statistics.median(ratios):.4f}  (95 %: {low:.4f} .. {high:.4f}; quartiles {quartiles}; {n} pairs)"


def report(rounds: Sequence[dict[str, list[float]]], options: argparse.Namespace) -> None:
    marked = [step for step in range(options.warmup, options.steps) if step % options.every == 0]
    usual = [step for step in range(options.warmup, options.steps) if step % options.every]

    def ratios(kind: str, base: str, steps: Sequence[int]) -> list[float]:
        return [times[kind][step] / times[base][step] for times in rounds for step in steps]

    by_hand = statistics.median(times["by hand"][step] for times in rounds for step in usual)
    print(f"a step by hand: {1e3 * by_hand:.1f} ms, median")
    print(f"control / by hand:                      {spread(ratios('control', 'by hand', usual))}")
    print(f"QATCallback / by hand:                  {spread(ratios('QATCallback', 'by hand', usual))}")
    print(f"with monitor / by hand, usual steps:    {spread(ratios('with monitor', 'by hand', usual))}")
    print(f"with monitor / by hand, measured steps: {spread(ratios('with monitor', 'by hand', marked))}")
    one = statistics.median(ratios("with monitor", "by hand", usual))
    other = statistics.median(ratios("with monitor", "by hand", marked))
    n = options.every
    print(f"with monitor / by hand, 1 step in {n} measured: {((n - 1) * one + other) / n:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the callbacks add to a training step.")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--steps", type=int, default=160, help="timed steps of a fit, warm-up included")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=50, help="QuantizationMonitor(every_n_steps=...)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not any(step >= options.warmup for step in range(0, options.steps, options.every)):
        parser.error("no step after the warm-up would be measured: give more --steps or a smaller --every")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rounds = []
    for turn in range(options.rounds):
        rounds.append(run(KINDS[turn % 4 :] + KINDS[: turn % 4], options))
        print(f"round {turn + 1} of {options.rounds}", flush=True)
    report(rounds, options)


if __name__ == "__main__":
    main()
