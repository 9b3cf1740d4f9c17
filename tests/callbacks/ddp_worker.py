"""What two DDP processes do: `torchrun --standalone --nproc_per_node 2 -m tests.callbacks.ddp_worker FOLDER`.

Each rank writes what it has found into the folder, for the tests to judge.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.methods import METHODS

BATCHES, BATCH, FEATURES = 6, 8, 12
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "kl")
LEARNED = [name for name, method in METHODS.items() if method.learns]
SCHEDULED = ("ste", "lsq", "ternary")
# at 0.05 pact's steps of scales turn a last bit into another code: rows in another order alone move weights by 0.02; ewgs, whose
# gradient is not linear in those that ranks average, comes to another result in proportion to its steps
RATES = {"pact": 0.001, "ewgs": 0.005}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def global_batches() -> list[tuple[Tensor, Tensor]]:
    """The batches of one process; of two, each takes every second row."""
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(BATCH, FEATURES, generator=generator) * (1 + index) for index in range(BATCHES)]
    return [(one, torch.randint(0, 4, (BATCH,), generator=generator)) for one in x]


class Shard(torch.utils.data.Dataset):
    """One row of batches: this rank's rows of each global batch."""

    def __init__(self, rank: int, world: int) -> None:
        self.batches = [(x[rank::world], y[rank::world]) for x, y in global_batches()]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]


class Net(L.LightningModule):
    """Two layers, no BatchNorm: what one process computes is what two compute together."""

    def __init__(self, lr: float = 0.0, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        norms = [nn.BatchNorm1d(16)] if norm else []
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), *norms, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.example_input_array = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Split(Net):
    """One rank leaves out a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net[:2](x) if self.global_rank == 0 else self.net(x))


class Poisoned(Net):
    """nan on the last rank only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] * torch.nan if self.global_rank == self.trainer.world_size - 1 else batch[0]
        return nn.functional.cross_entropy(self(x), batch[1])


def host(epochs: int, *callbacks: L.Callback, **options: Any) -> lq.Trainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {**QUIET, "strategy": "ddp" if world > 1 else "auto", "devices": world, "use_distributed_sampler": False, **options}
    return lq.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)


def loader() -> DataLoader:
    return DataLoader(Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))), batch_size=None)


def fit(model: Net, callback: L.Callback, epochs: int, *more: L.Callback, **options: Any) -> lq.Trainer:
    trainer = host(epochs, callback, *more, **options)
    trainer.fit(model, loader(), ckpt_path=options.pop("ckpt_path", None))
    return trainer


def made(lr: float = 0.0, cls: type[Net] = Net, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(lr, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def observed(observer: str, recipe: str) -> dict[str, Tensor]:
    """Weights stand still: only what observers see counts."""
    model = made()
    fit(model, lq.QATCallback(lq.Recipe(recipe, observer=observer, edges=None)), 1)
    return state(model)


def learned(method: str, quantize_from: int) -> dict[str, Any]:
    """In a float phase learned scales are parameters that nothing uses."""
    model = made(RATES.get(method, 0.05))
    recipe = lq.Recipe("w4a4", edges=None, bits=METHODS[method].bits)
    trainer = fit(model, lq.QATCallback(recipe, method=method, quantize_from=quantize_from, scale_lr=0.5), 3)  # type: ignore[arg-type]
    steps = [len(trainer.optimizers[0].state[part.scale]) for part in quantizers(model) if part.learned]
    return {"state": state(model), "packed": state(trainer.quantize()), "momentum": steps}


def scheduled(method: str) -> dict[str, Any]:
    """Widths fall, and activations come later: learned ranges of activations start anew from a batch of all ranks."""
    model = made(0.01)
    options: Any = {"bits": {0: 8, 1: 4, 2: METHODS[method].bits or 3}, "quantize_activations_from": 1, "method": method}
    recipe = lq.Recipe("w3a3", edges=None, bits=METHODS[method].bits)
    trainer = fit(model, lq.QATCallback(recipe, quantize_from=0.2, **options), 3)
    steps = [len(trainer.optimizers[0].state[part.scale]) for part in quantizers(model) if part.learned]
    return {"state": state(model), "packed": state(trainer.quantize()), "momentum": steps}


def calibrated(recipe: str, observer: str) -> dict[str, Tensor]:
    trainer = host(1)
    return state(trainer.quantize(made(), dataloaders=loader(), recipe=lq.Recipe(recipe, observer=observer)))


def normed() -> dict[str, Any]:
    """torch's SyncBatchNorm needs a GPU: each rank has statistics of its own, and DDP hands out those of rank 0."""
    model = made(0.05, norm=True)
    trainer = fit(model, lq.QATCallback("w8a8"), 2)
    return {"state": state(model), "packed": state(trainer.quantize())}


def resumed(folder: Path) -> dict[str, Any]:
    """Dropout, and each rank its own random numbers: to the end at once, and in two parts."""

    def run(epochs: int, where: Path | None, ckpt: Path | None, seed: int) -> dict[str, Tensor]:
        L.seed_everything(seed + int(os.environ["RANK"]), verbose=False)
        model = made(0.05, norm=True, dropout=0.5)
        torch.manual_seed(seed + int(os.environ["RANK"]))
        keeper = [ModelCheckpoint(where, filename="{epoch}", save_top_k=-1)] if where else []
        options: Any = {"scale_lr": 0.5, "oscillation": "freeze", "oscillation_threshold": 1e-3, "quant_noise": 0.7}
        callback = lq.QATCallback(lq.Recipe("w4a4", edges=None), method="ewgs", quantize_from=1, freeze_bn_at=3, **options)
        trainer = host(epochs, callback, lq.RandomStateCallback(), *keeper, enable_checkpointing=bool(keeper))
        trainer.fit(model, loader(), ckpt_path=ckpt, weights_only=True)
        momentum = trainer.optimizers[0].state_dict()["state"]
        return {**state(model), **{f"optimizer.{key}": value["momentum_buffer"] for key, value in momentum.items()}}

    whole = run(4, folder / "ckpt", None, 0)
    return {"whole": whole, "parts": {n: run(4, None, folder / "ckpt" / f"epoch={n}.ckpt", 77) for n in (0, 1, 2)}}


def failing(cls: type[Net]) -> str:
    try:
        fit(made(0.05, cls), lq.QATCallback("w8a8"), 1)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def saved(folder: Path) -> list[str]:
    """Every rank saves; one writes."""
    trainer = host(1)
    qmodel = trainer.quantize(made(), recipe="w8a16")
    lq.save_quantized(qmodel, folder / "packed")
    again = lq.load_quantized(made(), folder / "packed")
    return [name for name, value in again.state_dict().items() if not torch.equal(value, qmodel.state_dict()[name])]


def single() -> dict[str, Any]:
    """What one process finds; two are compared with it."""
    return {
        "observed": {(name, recipe): observed(name, recipe) for name in OBSERVERS for recipe in ("w8a8", "w4a4")},
        "learned": {(method, start): learned(method, start) for method in LEARNED for start in (0, 1)},
        "scheduled": {method: scheduled(method) for method in SCHEDULED},
        "calibrated": {name: calibrated("w8a8", name) for name in OBSERVERS if name != "moving_average"},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = single()
    found["normed"] = normed()
    found["resumed"] = resumed(folder)
    found["saved"] = saved(folder)
    # what fails comes last: ranks that stopped at different places do not meet again
    found["poisoned"] = failing(Poisoned)
    found["split"] = failing(Split)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
