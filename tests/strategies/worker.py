"""The cells of one strategy in some precisions, with their raw results in a JSON file, written by rank 0 after each cell.

python -m tests.strategies.worker one out.json 32-true
python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.strategies.worker <ddp|fsdp2> out.json 32-true bf16-mixed
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.sharding import is_sharded, plain_copy
from tests.digits import QUIET
from tests.strategies.models import (
    BATCH,
    CALIBRATION,
    RANK,
    WORLD,
    Data,
    Late,
    Model,
    NeverPrepared,
    Sharded,
    State,
    Stop,
    accuracy,
    calibrated_alone,
    differences,
    differs_on_ranks,
    float_weights,
    logits,
    packed_state,
    whole_state,
)

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
METHODS = {"ste": "w8a8", "lsq": "w4a4"}
EPOCHS, BATCHES = 2, 8
TIMEOUT = timedelta(seconds=60)  # a rank that waits for one that has failed fails, too


# --- features -------------------------------------------------------------------------------------------------------


class Cells:
    """The features of one strategy in one precision, in the order in which they need each other's results."""

    def __init__(self, strategy: str, precision: str, folder: Path) -> None:
        self.strategy, self.precision, self.folder = strategy, precision, folder
        self.hosts: dict[str, lq.Trainer] = {}
        self.packed: dict[str, L.LightningModule] = {}
        self.ends: dict[str, State] = {}

    def host(self, *callbacks: L.Callback, epochs: int = EPOCHS, folders: bool = False) -> lq.Trainer:
        strategy: Any = "auto"
        if self.strategy == "ddp":
            strategy = DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
        if self.strategy == "fsdp2":
            strategy = ModelParallelStrategy(WORLD, 1, save_distributed_checkpoint=folders, timeout=TIMEOUT)
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        return lq.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            devices=WORLD,
            strategy=strategy,
            precision=self.precision,  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            limit_train_batches=BATCHES,
            limit_val_batches=1.0,
            num_sanity_val_steps=0,
            **{**QUIET, "enable_checkpointing": saves},
        )

    def model(self, lr: float = 5e-4) -> Model:
        model = (Sharded if self.strategy == "fsdp2" else Model)(lr=lr)
        model.load_state_dict(float_weights())
        return model

    def float_accuracy(self) -> float:
        return accuracy(self.model(), self.precision)

    def validate(self, model: L.LightningModule, *callbacks: L.Callback, **options: Any) -> tuple[lq.Trainer, float]:
        host = self.host(*callbacks)
        return host, host.validate(model, datamodule=Data(BATCH), verbose=False, **options)[0]["accuracy"]

    def saved(self, method: str, folders: bool, epoch: int, resumed: bool = False) -> str:
        return str(self.folder / f"{self.precision}-{method}-{folders}-{resumed}" / f"epoch={epoch}.ckpt")

    def train(self, method: str, *extra: L.Callback, folders: bool = False, resume: str | None = None) -> lq.Trainer:
        """Train and keep checkpoints; or, with another seed, go on from one."""
        where = Path(self.saved(method, folders, 0, resume is not None)).parent
        host = self.host(
            lq.QATCallback(METHODS[method], method=method),  # type: ignore[arg-type]
            lq.RandomStateCallback(),
            ModelCheckpoint(where, filename="{epoch}", save_top_k=-1),
            *extra,
            folders=folders,
        )
        L.seed_everything(1, verbose=False)  # Lightning's distributed samplers shuffle by it
        if resume is not None:
            torch.manual_seed(99)
        torch.rand(RANK)  # other noise on each rank
        model = self.model()
        if resume is not None:  # what is not restored will show
            nn.init.normal_(model.net.head.weight)
        host.fit(model, datamodule=Data(BATCH), ckpt_path=resume, weights_only=True)
        return host

    def qat(self, method: str) -> dict[str, Any]:
        host = self.hosts[method] = self.train(method)
        self.ends[method] = whole_state(host)  # ends with the random numbers: first of all
        module = host.lightning_module
        plain = plain_copy(module)
        state = dict(plain.state_dict())
        start = {name: value.to(state[name].dtype) for name, value in self.model().named_parameters() if value.dim() > 1}
        moved = differences(start, {name: state[name] for name in start})
        found = host.validate(module, datamodule=Data(BATCH), verbose=False)[0]["accuracy"]
        return {
            "float accuracy": self.float_accuracy(),
            "accuracy": found,
            "accuracy of one process": accuracy(plain, self.precision),
            "sharded": is_sharded(module),
            "differs on ranks": differs_on_ranks(state),
            "weights kept by training": [name for name in start if name not in moved],
            "scale dtypes": sorted({str(one.scale.dtype) for one in quantizers(module)}),
            "without range": [one.name for one in quantizers(module) if not one.has_range],
        }

    def ste(self) -> dict[str, Any]:
        return self.qat("ste")

    def lsq(self) -> dict[str, Any]:
        return self.qat("lsq")

    def resume(self) -> dict[str, Any]:
        result = {}
        for folders in [False, True] if self.strategy == "fsdp2" else [False]:
            if folders:
                self.train("lsq", Stop(), folders=True)
            resumed = self.train("lsq", folders=folders, resume=self.saved("lsq", folders, 0))
            end = whole_state(resumed)
            _, found = self.validate(
                self.model(),
                lq.QATCallback("w4a4", method="lsq"),
                ckpt_path=self.saved("lsq", folders, EPOCHS - 1, True),
                weights_only=True,
            )
            result["folder" if folders else "file"] = {
                "is a folder": Path(self.saved("lsq", folders, 0)).is_dir(),
                "tensors": len(end),
                "optimizer tensors": sum(name.startswith("optimizer.") for name in end),
                "differs in": differences(self.ends["lsq"], end),
                "accuracy of the last checkpoint": found,
                "accuracy at the end": accuracy(plain_copy(resumed.lightning_module), self.precision),
            }
        return result

    def quantize(self) -> dict[str, Any]:
        result = {}
        for method, host in self.hosts.items():
            module = host.lightning_module
            before = dict(plain_copy(module).state_dict())
            packed = self.packed[method] = host.quantize()
            plain = plain_copy(module)
            expected, found = logits(plain, self.precision), logits(packed, self.precision)
            close = torch.isclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()).all(dim=1)
            result[method] = {
                "class": type(packed).__name__,
                "sharded": is_sharded(packed),
                "differs on ranks": differs_on_ranks(dict(packed.state_dict())),
                "rows close": close.double().mean().item(),
                "largest difference": (found - expected).abs().max().item() / expected.abs().max().item(),
                "same predictions": (found.argmax(1) == expected.argmax(1)).double().mean().item(),
                "trained model changed in": differences(before, dict(plain.state_dict())),
                "accuracy": accuracy(packed, self.precision),
                "accuracy of the trained model": accuracy(plain, self.precision),
            }
        return result

    def ptq(self) -> dict[str, Any]:
        model = self.model()
        host, float_found = self.validate(model)  # FSDP2 shards it
        before = packed_state(model)
        packed = self.packed["ptq"] = host.quantize(model, Data(BATCH), recipe="w8a8", calibration_batches=CALIBRATION)
        result = {
            "float accuracy": self.float_accuracy(),
            "float accuracy by the Trainer": float_found,
            "accuracy": accuracy(packed, self.precision),
            "given sharded": is_sharded(model),
            "sharded": is_sharded(packed),
            "differs on ranks": differs_on_ranks(dict(packed.state_dict())),
            "float model changed in": differences(before, packed_state(model)),
        }
        if self.precision == "32-true":
            result["differs from one process in"] = differences(calibrated_alone(), dict(packed.state_dict()))
        return result

    def validated(self) -> dict[str, Any]:
        result = {}
        for name, packed in self.packed.items():
            copied = copy.deepcopy(packed)
            _, found = self.validate(copied)
            result[name] = {
                "accuracy": found,
                "accuracy of one process": accuracy(packed, self.precision),
                "sharded": is_sharded(copied),
                "changed in": differences(dict(packed.state_dict()), packed_state(copied)),
            }
        return result

    def save(self) -> dict[str, Any]:
        result = {}
        for name, packed in self.packed.items():
            where = self.folder / f"{self.precision}-saved-{name}"
            # each rank names another folder: only rank 0's is written, and is there when any rank goes on
            lq.save_quantized(packed, where / str(RANK))
            loaded = lq.load_quantized(Model(), where / "0")
            files = sorted(str(path.relative_to(where)).partition("-")[0] for path in where.rglob("*") if path.is_file())
            host, _ = self.validate(copy.deepcopy(packed))
            host.save_checkpoint(where / "packed.ckpt")
            reloaded = lq.load_from_checkpoint(type(self.model()), where / "packed.ckpt")
            result[name] = {
                "files": files,
                "reloaded differs in": differences(dict(packed.state_dict()), dict(loaded.state_dict())),
                "checkpoint differs in": differences(dict(packed.state_dict()), dict(reloaded.state_dict())),
                "reloaded accuracy": accuracy(loaded, self.precision),
                "checkpoint accuracy": accuracy(reloaded, self.precision),
                "accuracy": accuracy(packed, self.precision),
            }
        return result

    def late(self) -> dict[str, Any]:
        L.seed_everything(1, verbose=False)
        host = self.host(lq.QATCallback("w8a8", method="lsq"), epochs=3)
        host.fit(Late(lr=1e-2), datamodule=Data(BATCH))
        packed = host.quantize()
        return {
            "sharded": is_sharded(host.lightning_module),
            "without range": [one.name for one in quantizers(host.lightning_module) if not one.has_range],
            "differs on ranks": differs_on_ranks(dict(packed.state_dict())),
            "accuracy": accuracy(packed, self.precision),
            "accuracy of the trained model": accuracy(plain_copy(host.lightning_module), self.precision),
        }

    # --- what only FSDP2 has ---

    def never_prepared(self) -> dict[str, Any]:
        host = self.host(lq.QATCallback("w8a8"))
        try:
            host.fit(NeverPrepared(), datamodule=Data(BATCH))
        except MisconfigurationException as error:
            return {"refused": str(error), "steps": host.global_step}
        return {"steps": host.global_step}

    def scheduled(self) -> dict[str, Any]:
        L.seed_everything(1, verbose=False)
        options: Any = {"bits": {0: 8, 1: 4}, "quantize_activations_from": 0.25, "quant_noise": 0.5}
        host = self.host(lq.QATCallback("w4a4", method="lsq", **options))
        host.fit(self.model(), datamodule=Data(BATCH))
        plain = plain_copy(host.lightning_module)
        return {
            "without range": [one.name for one in quantizers(plain) if not one.has_range],
            "widths": sorted({one.spec.bits for one in quantizers(plain)}),
            "differs on ranks": differs_on_ranks(dict(plain.state_dict())),
            "accuracy": accuracy(host.quantize(), self.precision),
            "accuracy of the trained model": accuracy(plain, self.precision),
        }

    def gathered_in_bf16(self, ignores_frozen: bool) -> dict[str, Any]:
        packed: Any = copy.deepcopy(self.packed["ste"])
        packed.policy, packed.ignores_frozen = MixedPrecisionPolicy(param_dtype=torch.bfloat16), ignores_frozen
        _, found = self.validate(packed)
        return {"accuracy": found, "accuracy of one process": accuracy(self.packed["ste"], self.precision)}


FEATURES: dict[str, Callable[[Cells], Any]] = {
    "ste": Cells.ste,
    "lsq": Cells.lsq,
    "resume": Cells.resume,
    "quantize": Cells.quantize,
    "ptq": Cells.ptq,
    "validate": Cells.validated,
    "save": Cells.save,
    "late": Cells.late,
}
# in 32-true
FSDP2_ONLY: dict[str, Callable[[Cells], Any]] = {
    "never-prepared": Cells.never_prepared,
    "scheduled": Cells.scheduled,
    "gathered-in-bf16": lambda cells: cells.gathered_in_bf16(False),
    "gathered-in-bf16-ignoring-frozen": lambda cells: cells.gathered_in_bf16(True),
}


class Results:
    """What every rank got, told through a file, which a rank can write whatever has become of the others."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.cells = path, {}
        self.store = dist.FileStore(str(folder / "results"), WORLD) if WORLD > 1 else None

    def run(self, name: str, cell: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        try:
            result = cell()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        found = [result]
        if self.store is not None:
            self.store.set(f"{name}/{RANK}", json.dumps(result))
            found = [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(WORLD)]
        self.cells[name] = {"ranks": found, "seconds": round(time.monotonic() - start, 2)}
        if RANK == 0:
            self.path.write_text(json.dumps(self.cells, indent=1))


def main(strategy: str, outfile: str, *precisions: str) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    path = Path(outfile)
    folder = path.parent / f"{path.stem}-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"  # of this launch alone
    folder.mkdir(exist_ok=True)
    results = Results(path, folder)
    calibrated_alone()
    for precision in precisions:
        cells = Cells(strategy, precision, folder)
        for feature, cell in FEATURES.items():
            results.run(f"{strategy}-{precision}-{feature}", lambda cell=cell, cells=cells: cell(cells))
        if strategy == "fsdp2" and precision == "32-true":
            for feature, cell in FSDP2_ONLY.items():
                results.run(f"{strategy}-{feature}", lambda cell=cell, cells=cells: cell(cells))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
