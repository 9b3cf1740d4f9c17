"""Where a fit, a checkpoint or another callback met QAT at an edge, and once went wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.surgery import fake_modules, is_prepared, packed_modules
from tests.digits import trainer


class Net(L.LightningModule):
    """Layers registered in another order than they run, and a branch that no trace gets through."""

    def __init__(self, norm: bool = False, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.head = nn.Linear(16, 4)
        norms = [nn.BatchNorm1d(16)] if norm else []
        self.net = nn.Sequential(nn.Linear(8, 16), *norms, nn.SiLU(), nn.Linear(16, 16), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


def rows(count: int = 32) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, generator=generator) + index % 4, index % 4) for index in range(count)]


def loader(count: int = 32) -> DataLoader:
    return DataLoader(rows(count), 4)


def score(host: lq.Trainer, model: L.LightningModule, **options: Any) -> float:
    return host.validate(model, loader(), verbose=False, **options)[0]["val"]


# --- averaging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["moving_average", "mse", "percentile"])
@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_an_averaged_checkpoint_computes_what_was_validated(method: str, observer: str, tmp_path: Path) -> None:
    recipe = lq.Recipe("w8a8", observer=observer)
    model = Net()
    host = trainer(4, lq.QATCallback(recipe, method=method), EMAWeightAveraging(decay=0.95))
    host.fit(model, loader(), loader())
    host.save_checkpoint(tmp_path / "ema.ckpt")
    fresh = trainer(1, lq.QATCallback(recipe, method=method))
    assert score(fresh, Net(), ckpt_path=tmp_path / "ema.ckpt", weights_only=True) == pytest.approx(score(host, model), abs=1e-6)


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_an_average_that_starts_late_has_ranges(method: str) -> None:
    seen: list[float] = []

    class Scores(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append(trainer.callback_metrics["val"].item())

    model = Net()
    trainer(20).fit(model, loader())
    before = score(trainer(), model)
    late = EMAWeightAveraging(decay=0.9, update_starting_at_step=20)
    host = trainer(3, lq.QATCallback("w8a8", method=method), late, Scores(), num_sanity_val_steps=0)
    host.fit(model, loader(), loader())
    assert max(seen) < before + 0.2


# --- schedule -------------------------------------------------------------------------------------------------------


class Flags(L.Callback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.seen.append(next(quantizers(module)).quantizing)


def test_fractions_under_a_changing_accumulation() -> None:
    flags = Flags()
    host = trainer(4, GradientAccumulationScheduler({0: 1, 1: 4}), lq.QATCallback("w8a8", quantize_from=0.5), flags)
    host.fit(Net(), loader())
    assert flags.seen == [False, False, True, True]


def test_a_plateau_schedule_starts_afresh() -> None:
    class Plateau(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("score", 0.1 if not next(quantizers(self)).quantizing else 1 / (1 + self.current_epoch))
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "score"}}

    rates = {}
    for restart in (True, False):
        host = trainer(8, lq.QATCallback("w8a8", quantize_from=1, restart_monitors=restart))
        host.fit(Plateau(), loader())
        rates[restart] = host.optimizers[0].param_groups[0]["lr"]
    assert rates[True] == 0.01
    assert rates[False] < 0.01


def test_a_callback_reused_for_another_model_starts_afresh() -> None:
    callback = lq.QATCallback("w8a8", quantize_from=1)
    trainer(2, callback).fit(Net(), loader())
    assert callback.state_dict()["stage"][0]
    host = trainer(1, callback)
    host.fit(Net(), loader())
    assert not callback.state_dict()["stage"][0]


# --- what a stage reaches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"freeze_observers_at": 1}])
def test_a_part_that_training_does_not_reach_stays_float_and_is_named(options: dict[str, Any]) -> None:
    class More(Net):
        def __init__(self) -> None:
            super().__init__()
            self.only_validated, self.late = nn.Linear(16, 4), nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self(batch[0])
            out = self.late(out) if self.current_epoch > 1 else out
            return nn.functional.cross_entropy(out, batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.only_validated(self.net(batch[0])).mean())

    model = More()
    host = trainer(3, lq.QATCallback("w8a8", **options))
    with pytest.warns(UserWarning, match=r"no training batch has reached .*only_validated\.input"):
        host.fit(model, loader(), loader())
    assert model.late.input_fake_quant.has_range
    with pytest.raises(RuntimeError, match=r"only_validated\.input: no range was ever observed"):
        host.quantize()


class Counted(Dataset):
    """Data that draws from every generator there is, and counts."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(8) + random.random() + float(np.random.rand()), index % 4


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.left = iter(rows())

    def __iter__(self) -> Any:
        return self.left


@pytest.mark.parametrize("kind", ["random", "generator", "stream"])
def test_looking_for_batchnorms_takes_nothing_from_the_training(kind: str) -> None:
    def data() -> DataLoader:
        if kind == "stream":
            return DataLoader(Stream(), 4)
        generator = torch.Generator().manual_seed(1) if kind == "generator" else None
        return DataLoader(Counted(), 4, shuffle=True, generator=generator)

    ends = []
    for callbacks in ([], [lq.QATCallback("w8a8", quantize_from=100)]):
        L.seed_everything(0, verbose=False)
        model = Net(norm=True)
        trainer(1, *callbacks).fit(model, data())
        ends.append((model.head.weight.detach().clone(), torch.rand(1), random.random(), np.random.rand()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_a_stage_whose_example_fails_follows_the_checkpoint(recipe: str, tmp_path: Path) -> None:
    class Tested(Net):
        def on_test_epoch_start(self) -> None:
            self.predictions: list[Tensor] = []

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.predictions.append(self(batch[0]))

    host = trainer(2, lq.QATCallback(recipe))
    model = Tested(norm=True)
    host.fit(model, loader())
    assert fake_modules(model)["net.0"].norm is model.net[1]
    host.save_checkpoint(tmp_path / "qat.ckpt")
    host.test(model, loader(), verbose=False)
    fresh = Tested(norm=True)
    trainer(1, lq.QATCallback(recipe)).test(fresh, loader(), ckpt_path=tmp_path / "qat.ckpt", verbose=False, weights_only=True)
    assert torch.equal(torch.cat(fresh.predictions), torch.cat(model.predictions))
    assert torch.equal(lq.convert(fresh)(torch.ones(2, 8)), host.quantize(model)(torch.ones(2, 8)))


def test_another_recipe_is_refused_and_shown_and_nothing_is_loaded(tmp_path: Path) -> None:
    host = trainer(1, lq.QATCallback("w8a8"))
    host.fit(Net(), loader())
    host.save_checkpoint(tmp_path / "qat.ckpt")
    told = {
        lq.QATCallback("w8a16"): r"head: input\.bits 8 there and None here",
        lq.QATCallback(lq.Recipe("w8a8", ignore=["head"])): "head: quantized there and float here",
        lq.QATCallback("w8a8", method="lsq"): "method 'ste' there and 'lsq' here",
        lq.QATCallback(lq.Recipe("w8a8", observer="mse")): "observer 'moving_average' there and 'mse' here",
    }
    for callback, message in told.items():
        model = Net()
        before = model.head.weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            trainer(2, callback).fit(model, loader(), ckpt_path=tmp_path / "qat.ckpt", weights_only=True)
        assert torch.equal(model.head.weight, before)


def test_modules_that_keep_parts_out_of_their_state_dict(tmp_path: Path) -> None:
    class Partly(Net):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return {name: value for name, value in super().state_dict(*args, **options).items() if "head" not in name}

    host = trainer(1, lq.QATCallback("w8a8"))
    host.fit(Partly(), loader())
    host.save_checkpoint(tmp_path / "part.ckpt")
    resumed = trainer(2, lq.QATCallback("w8a8"))
    resumed.fit(Partly(), loader(), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert resumed.current_epoch == 2


@pytest.mark.parametrize("value", [torch.tensor([0.5, 1.5]), torch.tensor(10**12), torch.tensor([1, 2], dtype=torch.uint8)])
def test_an_extra_state_of_the_users_own(value: Tensor, tmp_path: Path) -> None:
    class Own(Net):
        got: Any = None

        def get_extra_state(self) -> Tensor:
            return value

        def set_extra_state(self, state: Tensor) -> None:
            self.got = state

    host = trainer(1, lq.QATCallback("w8a8"))
    host.fit(Own(), loader())
    host.save_checkpoint(tmp_path / "own.ckpt")
    model = Own()
    trainer(2, lq.QATCallback("w8a8")).fit(model, loader(), ckpt_path=tmp_path / "own.ckpt", weights_only=True)
    assert torch.equal(model.got, value)

    class Layer(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return value

        def set_extra_state(self, state: Tensor) -> None: ...

    with pytest.raises(ValueError, match="has an extra state of its own"):
        lq.prepare(nn.Sequential(Layer(4, 4)), "w8a16")


def test_a_part_of_a_checkpoint_loads_into_a_part_of_the_model(tmp_path: Path) -> None:
    host = trainer(1, lq.QATCallback("w8a8"))
    model = Net()
    host.fit(model, loader())
    part = {name.removeprefix("net."): value for name, value in model.state_dict().items() if name.startswith("net.")}
    fresh = lq.prepare(Net().net, "w8a8")
    fresh.load_state_dict(part)
    assert torch.equal(fresh.eval()(torch.ones(2, 8)), model.net.eval()(torch.ones(2, 8)))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_float_run_resumes_with_learned_scales_and_its_optimizers_state(grouped: bool, scheduled: bool, tmp_path: Path) -> None:
    class Optimized(Net):
        def configure_optimizers(self) -> Any:
            groups = lq.param_groups(self, lr=0.01, scale_lr=1e-4, weight_decay=0.01) if grouped else self.parameters()
            optimizer = torch.optim.AdamW(groups, 0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
            return {"optimizer": optimizer, "lr_scheduler": schedule} if scheduled else optimizer

    first = Optimized()
    host = trainer(2)
    host.fit(first, loader())
    host.save_checkpoint(tmp_path / "float.ckpt")
    moments = {name: host.optimizers[0].state[value]["exp_avg"].clone() for name, value in first.named_parameters()}
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            states = trainer.optimizers[0].state
            seen.update({name: dict(states.get(value, {})) for name, value in module.named_parameters()})

    model = Optimized()
    resumed = trainer(3, lq.QATCallback("w4a4", method="lsq"), Look())
    resumed.fit(model, loader(), ckpt_path=tmp_path / "float.ckpt", weights_only=True)
    for name, value in moments.items():
        assert seen[name]["exp_avg"].shape == value.shape
    learned = [name for name in seen if "fake_quant" in name]
    assert learned
    assert not any(seen[name] for name in learned)
    assert all(seen[name] for name in moments)
    assert packed_modules(resumed.quantize())


def test_validating_a_checkpoint_does_not_bring_its_random_state_into_a_fit(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="one")
    trainer(1, lq.RandomStateCallback(), keeper, enable_checkpointing=True).fit(Net(), loader(), loader())
    host = trainer(1, lq.RandomStateCallback())
    host.validate(Net(), loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False, weights_only=True)
    torch.manual_seed(123)
    expected = torch.rand(1)
    seen: list[Tensor] = []

    class Draw(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.append(torch.rand(1))

    model = Net()
    host.callbacks.append(Draw())  # type: ignore[attr-defined]
    torch.manual_seed(123)
    seeded = DataLoader(rows(), 4, generator=torch.Generator())
    host.fit(model, seeded)
    assert torch.equal(seen[0], expected)
    assert not is_prepared(model)
