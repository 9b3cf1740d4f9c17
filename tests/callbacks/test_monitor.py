from __future__ import annotations

import copy
import csv
import math
import os
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.calibration import quantizers, set_flags
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.numerics import CODEBOOKS, FLOAT8, MIN_SCALE
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import packed_modules
from tests.digits import Classifier, Digits, trainer

Row = tuple[int, float]


def read_csv(logger: CSVLogger) -> dict[str, list[Row]]:
    """name -> [(step, value)]"""
    found: dict[str, list[Row]] = {}
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if name.startswith("quant/") and value:
                    found.setdefault(name, []).append((int(line["step"]), float(value)))
    return found


def steps(found: dict[str, list[Row]], name: str = "quant/sqnr_db/min") -> list[int]:
    return [step for step, _ in found.get(name, [])]


def hooked(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in quantizers(module))


# --- the numbers, against float64 ------------------------------------------------------------------------------------


def grid(spec: QuantSpec) -> np.ndarray:
    """All values of codes at scale 1 and zero point 0, ascending."""
    if spec.dtype in FLOAT8:
        values = torch.arange(256, dtype=torch.uint8).view(FLOAT8[spec.dtype]).double().numpy()
        return np.unique(values[np.isfinite(values)])
    if spec.dtype in CODEBOOKS:
        return np.array(CODEBOOKS[spec.dtype])
    low = -(2 ** (spec.bits - 1)) if spec.signed else 0
    return np.arange(low, low + 2**spec.bits, dtype=np.float64)


def reference(rows: list[np.ndarray], scales: np.ndarray, zeros: np.ndarray, spec: QuantSpec) -> tuple[list[np.ndarray], int]:
    """Each row on its own grid by nearest value, and how many elements are outside."""
    out, outside = [], 0
    for row, scale, zero in zip(rows, scales, zeros, strict=True):
        values = (grid(spec) - zero) * scale
        out.append(values[np.abs(row[:, None] - values).argmin(1)])
        first, second, before, last = values[0], values[1], values[-2], values[-1]
        outside += int(((row < first - 0.5001 * (second - first)) | (row > last + 0.5001 * (last - before))).sum())
    return out, outside


def split(x: Tensor, spec: QuantSpec) -> list[np.ndarray]:
    values = x.detach().double().numpy()
    if spec.granularity == "tensor":
        return [values.ravel()]
    rows = [values.ravel()] if spec.flat_groups else list(values.reshape(-1, values.shape[-1]))
    if spec.granularity != "group":
        return rows
    assert spec.group_size is not None
    return [row[start : start + spec.group_size] for row in rows for start in range(0, len(row), spec.group_size)]


def expected(calls: list[Tensor], quantizer: FakeQuantize) -> tuple[float, float]:
    """SQNR in dB and the clipped fraction over several calls."""
    spec, signal, noise, outside, elements = quantizer.spec, 0.0, 0.0, 0, 0
    for x in calls:
        rows = split(x, spec)
        if spec.dynamic:
            scales = np.array([np.abs(row).max() / grid(spec)[-1] for row in rows])
            zeros = np.zeros(len(rows))
        else:
            scales = quantizer.scale.detach().abs().double().numpy().ravel()
            zeros = quantizer.zero_point.detach().double().numpy().ravel().round()
        out, missed = reference(rows, scales, zeros, spec)
        outside += 0 if spec.dynamic else missed
        elements += x.numel()
        for row, value in zip(rows, out, strict=True):
            value = torch.tensor(value).to(x.dtype).double().numpy()
            signal, noise = signal + (row**2).sum(), noise + ((row - value) ** 2).sum()
    return 10 * math.log10(signal / noise), outside / elements


class Twice(L.LightningModule):
    """One layer that runs twice in a batch, on inputs of different size; nothing learns."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 6)
        self.inputs = [torch.randn(5, 40).to(dtype), 3 * torch.randn(2, 40).to(dtype)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(self.inputs[0]).float().sum() + self.layer(self.inputs[1]).float().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(4, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def planted(module: L.LightningModule, recipe: Any, method: str, shrink: float = 0.6) -> L.LightningModule:
    """A model prepared by hand, whose static ranges are too narrow."""
    lq.prepare(module, recipe, method=method)
    set_flags(module, quantizing=True)
    with torch.no_grad():
        for part in quantizers(module):
            part.observing = False
            if part.spec.dynamic:
                continue
            if not part.is_weight:
                part.scale.fill_(4.0 / 2**part.spec.bits)
                part.zero_point.fill_(0 if part.spec.symmetric else 1)
                part.has_range = True
            part.scale.mul_(-shrink if part.learned else shrink)  # a learned scale's magnitude counts
    return module


RECIPES: list[Any] = [
    ("w8a8", "ste"),
    ("w8a8", "lsq"),
    ({"scheme": "w4a4", "edges": None}, "ste"),
    ({"scheme": "w4a4", "edges": None}, "lsq"),
    ({"scheme": "w4a16", "group_size": 16}, "ste"),
    ({"scheme": "w2a16", "group_size": 16}, "ste"),
    ({"scheme": "w2a16", "group_size": 16}, "lsq"),
    ({"scheme": "w8a16", "granularity": "tensor"}, "ste"),
    ("w8a8-dynamic", "ste"),
    ("fp8", "ste"),
    ("nf4", "ste"),
]


@pytest.mark.parametrize(("recipe", "method"), RECIPES)
def test_values_equal_a_float64_computation(tmp_path: Path, recipe: Any, method: str) -> None:
    model = planted(Twice(), recipe, method)
    logger = CSVLogger(tmp_path)
    trainer(1, lq.QuantizationMonitor(2), logger=logger).fit(model)
    found = read_csv(logger)
    calls = {"weight": [model.layer.weight] * 2, "input": model.inputs}
    values = {name: expected(calls[name], part) for name, part in model.layer.quantizers()}
    for name, (sqnr, clipped) in values.items():
        assert found[f"quant/sqnr_db/layer.{name}"] == [(step, pytest.approx(sqnr, abs=1e-3)) for step in (0, 2)]
        assert found[f"quant/clipped/layer.{name}"] == [(step, clipped) for step in (0, 2)]
    dynamic = dict(model.layer.quantizers()).get("input") is not None and model.layer.input_fake_quant.spec.dynamic
    assert values["weight"][1] > 0
    assert not dynamic or found["quant/clipped/layer.input"][0][1] == 0
    assert found["quant/sqnr_db/min"][0][1] == pytest.approx(min(sqnr for sqnr, _ in values.values()), abs=1e-3)
    assert found["quant/sqnr_db/mean"][0][1] == pytest.approx(np.mean([sqnr for sqnr, _ in values.values()]), abs=1e-3)
    assert found["quant/clipped/max"][0][1] == pytest.approx(max(clipped for _, clipped in values.values()))
    assert found["quant/clipped/mean"][0][1] == pytest.approx(np.mean([clipped for _, clipped in values.values()]))


def test_bf16_activations_are_summed_in_float64(tmp_path: Path) -> None:
    model = Twice(torch.bfloat16)
    model.inputs = [torch.randn(512, 40).bfloat16(), torch.randn(512, 40).bfloat16()]
    planted(model, "w8a8", "ste")
    logger = CSVLogger(tmp_path)
    trainer(1, lq.QuantizationMonitor(), logger=logger, precision="bf16-mixed").fit(model)
    sqnr, clipped = expected(model.inputs, model.layer.input_fake_quant)
    found = read_csv(logger)
    assert found["quant/sqnr_db/layer.input"] == [(0, pytest.approx(sqnr, abs=1e-3))]
    assert found["quant/clipped/layer.input"] == [(0, clipped)]


def test_tensors_on_the_grid_and_zeros_have_no_sqnr(tmp_path: Path) -> None:
    model = Twice()
    model.inputs = [torch.zeros(3, 40), torch.zeros(1, 40)]
    planted(model, "w8a8", "ste")
    logger = CSVLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*QuantizationMonitor.*")
        trainer(1, lq.QuantizationMonitor(), logger=logger).fit(model)
    found = read_csv(logger)
    assert "quant/sqnr_db/layer.input" not in found
    assert found["quant/clipped/layer.input"] == [(0, 0.0)]
    assert found["quant/sqnr_db/min"] == found["quant/sqnr_db/layer.weight"]


def test_a_checkpointed_block_counts_once(tmp_path: Path) -> None:
    class Checkpointed(Twice):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.inputs[0].requires_grad_()
            return checkpoint(self.layer, x, use_reentrant=False).sum() + self.layer(self.inputs[1]).mean()

    model = planted(Checkpointed(), "w8a8", "ste")
    logger = CSVLogger(tmp_path)
    trainer(1, lq.QuantizationMonitor(), logger=logger).fit(model)
    assert read_csv(logger)["quant/clipped/layer.input"] == [(0, expected(model.inputs, model.layer.input_fake_quant)[1])]


# --- loggers ---------------------------------------------------------------------------------------------------------


def read_tensorboard(logger: TensorBoardLogger) -> dict[str, list[Row]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    accumulator.Reload()
    names = [name for name in accumulator.Tags()["scalars"] if name.startswith("quant/")]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a header does not fit into what is left of the block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = part if kind in (1, 2) else parts + part  # full, first; middle, last
        if kind in (1, 4):
            yield parts


def read_wandb(directory: Path) -> dict[str, list[Row]]:
    import json

    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[str, list[Row]] = {}
    for raw in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        line = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in line.items():
            if name.startswith("quant/"):
                found.setdefault(name, []).append((line["trainer/global_step"], value))
    return found


def test_every_logger_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "board")
    online = WandbLogger(save_dir=tmp_path, offline=True, project="test", settings=wandb.Settings(console="off"))
    host = trainer(
        2,
        lq.QuantizationMonitor(4),
        lq.QATCallback("w4a4"),
        LearningRateMonitor(),
        logger=[table, board, online],
        limit_train_batches=5,
        limit_val_batches=1,
        log_every_n_steps=1,
    )
    try:
        host.fit(Classifier(), datamodule=Digits())
        last = {name: online.experiment.summary[name] for name in ("quant/sqnr_db/min", "quant/ratio")}
    finally:
        wandb.finish()
    first = read_csv(table)
    assert steps(first) == [0, 4, 8]
    assert {f"quant/{kind}/net.{layer}" for kind in ("sqnr_db", "clipped") for layer in ("conv1.weight", "head.input")} <= set(
        first
    )
    for other in (read_tensorboard(board), read_wandb(tmp_path)):
        assert {name: steps(other, name) for name in first} == {name: steps(first, name) for name in other}
        for name, rows in first.items():
            assert [value for _, value in other[name]] == pytest.approx([value for _, value in rows], rel=1e-6), name
    assert last["quant/sqnr_db/min"] == pytest.approx(first["quant/sqnr_db/min"][-1][1])
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        rates = {int(line["step"]) for line in csv.DictReader(file) if line["lr-AdamW"]}
    assert set(steps(first)) <= rates


def test_aggregates_only(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    host = trainer(1, lq.QATCallback("w8a8"), lq.QuantizationMonitor(per_layer=False), logger=logger, limit_train_batches=2)
    host.fit(Classifier(), datamodule=Digits())
    names = {name.removeprefix("quant/") for name in read_csv(logger) if "/sqnr" in name or "/clip" in name}
    assert names == {"sqnr_db/min", "sqnr_db/mean", "clipped/max", "clipped/mean"}


def test_sizes_are_those_of_the_packed_model(tmp_path: Path) -> None:
    logger, model = CSVLogger(tmp_path), Classifier()
    before = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    host = trainer(1, lq.QATCallback("w4a4"), lq.QuantizationMonitor(), logger=logger, limit_train_batches=2)
    host.fit(model, datamodule=Digits())
    packed = host.quantize()
    after = sum(value.nbytes for value in [*packed.parameters(), *packed.buffers()])
    ends = ("_packed", "_scale", "_zero_point", "_shape")
    words = sum(v.nbytes for part in packed_modules(packed).values() for n, v in part.named_parameters() if n.endswith(ends))
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    found = read_csv(logger)
    assert found["quant/float_bytes"] == [(2, before)]
    assert found["quant/packed_bytes"] == [(2, after)]
    assert found["quant/ratio"] == [(2, pytest.approx(after / before))]
    assert found["quant/bits_per_weight"] == [(2, pytest.approx(8 * words / weights))]


# --- when it measures ------------------------------------------------------------------------------------------------


class Watched(Classifier):
    """Notes at which batches there are hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: list[int] = []
        self.batches = 0
        self.in_validation = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if hooked(self):
            self.measured.append(self.batches)
        self.batches += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.in_validation += hooked(self)
        super().validation_step(batch, batch_idx)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    logger, model = CSVLogger(tmp_path), Watched()
    host = trainer(
        2, lq.QATCallback("w8a8"), lq.QuantizationMonitor(2), logger=logger, limit_train_batches=5, accumulate_grad_batches=2
    )
    host.fit(model, datamodule=Digits())
    # three steps in each epoch, of 2, 2 and 1 batches
    assert model.measured == [0, 4, 7]
    assert steps(read_csv(logger)) == [0, 2, 4]
    assert hooked(model) == model.in_validation == 0


def test_evaluation_inside_an_epoch_is_not_measured(tmp_path: Path) -> None:
    model = Watched()
    host = trainer(
        1,
        lq.QATCallback("w8a8"),
        lq.QuantizationMonitor(1),
        logger=CSVLogger(tmp_path),
        limit_train_batches=3,
        val_check_interval=1,
    )
    host.fit(model, datamodule=Digits())
    host.validate(model, datamodule=Digits(), verbose=False)
    assert model.measured == [0, 1, 2]
    assert len(model.seen) >= 8
    assert model.in_validation == 0


def test_resumes_on_the_same_steps(tmp_path: Path) -> None:
    first, again = CSVLogger(tmp_path / "first"), CSVLogger(tmp_path / "again")
    host = trainer(2, lq.QATCallback("w8a8"), lq.QuantizationMonitor(4), logger=first, limit_train_batches=3)
    host.fit(Classifier(), datamodule=Digits())
    host.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(4, lq.QATCallback("w8a8"), lq.QuantizationMonitor(4), logger=again, limit_train_batches=3)
    resumed.fit(Classifier(), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (steps(read_csv(first)), steps(read_csv(again))) == ([0, 4], [8])


def test_nothing_is_logged_before_quantization_starts(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    host = trainer(2, lq.QATCallback("w8a8", quantize_from=1), lq.QuantizationMonitor(2), logger=logger, limit_train_batches=4)
    host.fit(Classifier(), datamodule=Digits())
    found = read_csv(logger)
    assert steps(found) == steps(found, "quant/clipped/max") == [4, 6]


def test_manual_optimization_that_steps_over_a_multiple(tmp_path: Path) -> None:
    class Manual(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for part in torch.tensor_split(torch.arange(len(batch[0])), 3):
                loss = super().training_step((batch[0][part], batch[1][part]), batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    logger, model = CSVLogger(tmp_path), Manual()
    host = trainer(1, lq.QATCallback("w8a8"), lq.QuantizationMonitor(4), logger=logger, limit_train_batches=6)
    host.fit(model, datamodule=Digits())
    # batches start at steps 0, 3, 6, 9, 12, 15, which reach 0, 4, 8 and 12; Lightning's axis counts batches here
    assert steps(read_csv(logger)) == [0, 2, 3, 4]
    assert [batch // 3 for batch in model.measured[::3]] == [0, 2, 3, 4]


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_training_is_the_same_to_the_bit(tmp_path: Path, method: str) -> None:
    states, random = [], []
    for monitors in ([], [lq.QuantizationMonitor(2)]):
        L.seed_everything(1, verbose=False)
        model = Classifier()
        options: dict[str, Any] = {"limit_train_batches": 6, "limit_val_batches": 1, "logger": CSVLogger(tmp_path)}
        trainer(2, lq.QATCallback("w4a4", method=method), *monitors, **options).fit(model, datamodule=Digits())
        states.append(model.state_dict())
        random.append(torch.get_rng_state())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert torch.equal(*random)


# --- warnings --------------------------------------------------------------------------------------------------------


class Plant(L.Callback):
    """Sets the scales of one quantizer before every batch."""

    def __init__(self, layer: str, tensor: str, change: Callable[[FakeQuantize], Any]) -> None:
        self.layer, self.tensor, self.change = layer, tensor, change

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        part = dict(module.get_submodule(self.layer).quantizers())[self.tensor]
        part.observing = False
        with torch.no_grad():
            self.change(part)


def narrow(part: FakeQuantize) -> None:
    part.scale.fill_(1e-6)


def first_channel_to_zero(part: FakeQuantize) -> None:
    part.scale[0] = 0.0 if part.learned else MIN_SCALE


def wide(part: FakeQuantize) -> None:
    part.scale.fill_(1e6)


def told(plant: Plant, method: str, fits: int = 1, **options: Any) -> list[str]:
    """What the monitor warned of in a fit of eight measured batches whose first two are not planted on."""
    model, monitor = Classifier(1e-4), lq.QuantizationMonitor(1, **options)
    trainer(1, lq.QATCallback("w8a8", method=method), limit_train_batches=2, limit_val_batches=0).fit(model, datamodule=Digits())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(fits):
            callbacks = (lq.QATCallback("w8a8", method=method), plant, monitor)
            trainer(1, *callbacks, limit_train_batches=8, limit_val_batches=0).fit(model, datamodule=Digits())
    return [str(warning.message) for warning in caught if "QuantizationMonitor" in str(warning.message)]


@pytest.mark.parametrize("method", ["ste", "lsq"])
@pytest.mark.parametrize("tensor", ["weight", "input"])
def test_saturation_warns_once_and_names_the_layer(method: str, tensor: str) -> None:
    (message,) = [text for text in told(Plant("net.conv2", tensor, narrow), method) if "saturates" in text]
    assert message.startswith("QuantizationMonitor: net.conv2 saturates: ")
    assert f"% of its {tensor} lies outside" in message
    assert ("scale_lr" if method == "lsq" else "freeze_observers_at") in message


@pytest.mark.parametrize("method", ["ste", "lsq"])
@pytest.mark.parametrize(
    ("tensor", "change", "count"), [("weight", first_channel_to_zero, "1 of the 32"), ("input", wide, "1 of the 1")]
)
def test_collapse_warns_once_and_names_the_layer(method: str, tensor: str, change: Any, count: str) -> None:
    (message,) = told(Plant("net.conv2", tensor, change), method)
    assert message.startswith(f"QuantizationMonitor: net.conv2 has scales that collapsed, {count} of its {tensor}: ")
    assert ("scale_lr" if method == "lsq" else "outliers") in message


def test_warns_again_in_another_fit_and_never_above_the_threshold() -> None:
    plant = Plant("net.head", "weight", narrow)
    assert len([text for text in told(plant, "ste", fits=2) if "saturates" in text]) == 2
    assert not [text for text in told(plant, "ste", saturation=1.0) if "saturates" in text]


def test_a_good_model_is_not_warned_of() -> None:
    assert told(Plant("net.head", "weight", lambda part: None), "ste") == []


def test_nothing_to_measure_warns() -> None:
    with pytest.warns(UserWarning, match="QuantizationMonitor has nothing to measure") as caught:
        trainer(1, lq.QuantizationMonitor(1), limit_train_batches=2).fit(Classifier(), datamodule=Digits())
    assert len([one for one in caught if "QuantizationMonitor" in str(one.message)]) == 1


def test_a_compiled_model_cannot_be_measured(tmp_path: Path) -> None:
    model, logger = planted(Twice(), "w8a8", "ste"), CSVLogger(tmp_path)
    model.layer.compile(backend="eager")
    with pytest.warns(UserWarning, match="inside torch.compile") as caught:
        trainer(1, lq.QuantizationMonitor(2), logger=logger).fit(model)
    assert len([one for one in caught if "QuantizationMonitor" in str(one.message)]) == 1
    assert steps(read_csv(logger)) == []


@pytest.mark.parametrize(
    "options",
    [
        *({"every_n_steps": value} for value in (0, -1, 1.5, True, None)),
        *({"saturation": value} for value in (-0.1, 1.1, True, "half", float("nan"))),
        {"per_layer": 1},
    ],
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"QuantizationMonitor {next(iter(options))}="):
        lq.QuantizationMonitor(**options)


# --- hooks come and go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_hooks(error: type[BaseException]) -> None:
    class Breaks(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise error("planted")
            return loss

    model, monitor = Breaks(), lq.QuantizationMonitor(2)
    with pytest.raises((error, SystemExit)):
        trainer(1, lq.QATCallback("w8a8"), monitor).fit(model, datamodule=Digits())
    assert model.measured == [0, 2]
    assert hooked(model) == 0
    assert not monitor._handles
    assert not monitor._meters


def test_an_epoch_that_the_module_skips_leaves_no_hooks(tmp_path: Path) -> None:
    class Skips(Watched):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 2 else None

        def on_train_epoch_start(self) -> None:
            self.left = hooked(self)

    model, logger = Skips(), CSVLogger(tmp_path)
    trainer(2, lq.QATCallback("w8a8"), lq.QuantizationMonitor(2), logger=logger, limit_train_batches=4).fit(
        model, datamodule=Digits()
    )
    assert model.left == model.in_validation == hooked(model) == 0
    assert steps(read_csv(logger)) == [0, 2, 4]  # the second only in the next epoch


def test_copies_pickles_and_a_second_fit(tmp_path: Path) -> None:
    class Copies(L.Callback):
        """Copies the model while it is being measured."""

        copied: Any = None

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            assert hooked(module)
            self.copied = pickle.loads(pickle.dumps(copy.deepcopy(module.net)))

    monitor, model = lq.QuantizationMonitor(1), Classifier()
    for attempt, one in enumerate([monitor, monitor, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]):
        logger, copies = CSVLogger(tmp_path / str(attempt)), Copies()
        host = trainer(1, lq.QATCallback("w8a8"), copies, one, logger=logger, limit_train_batches=2)
        host.fit(model, datamodule=Digits())
        assert steps(read_csv(logger)) == [0, 1]
        assert hooked(model) == 0
        assert copies.copied(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        assert not one._handles
        assert not one._meters
    assert monitor.state_dict() == {}
