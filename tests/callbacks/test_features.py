"""QATCallback beside whatever else a Trainer can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.surgery import fake_modules, packed_modules
from tests.digits import Classifier, Digits, accuracy, trainer
from tests.helpers import thinned


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def assert_packs(host: lq.Trainer, model: L.LightningModule) -> lq.Trainer:
    """The packed model computes what the trained one does, up to the rounding of a folded BatchNorm."""
    qmodel = host.quantize(model)
    with torch.no_grad():
        got, want = qmodel(images()), model.eval()(images())
    close = torch.isclose(got.float(), want.float(), rtol=1e-4, atol=1e-4 * want.abs().max().item()).all(dim=1)
    assert close.float().mean() >= 0.8
    model.train()
    return qmodel


# --- averaging ------------------------------------------------------------------------------------------------------

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema-without-buffers": lambda: EMAWeightAveraging(decay=0.8, use_buffers=False),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=2),
}


@pytest.mark.parametrize(("recipe", "method"), [("w8a8", "ste"), ("w4a4", "lsq")])
@pytest.mark.parametrize("name", AVERAGES)
def test_averaging_listed_after(trained: Classifier, name: str, recipe: str, method: str) -> None:
    before = accuracy(trained)
    trained.hparams.lr = 5e-4
    seen: list[float] = []

    class Scores(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append(100 * trainer.callback_metrics["accuracy"].item())

    callback = lq.QATCallback(recipe, method=method, quantize_from=1, freeze_bn_at=0.75)
    host = trainer(4, callback, AVERAGES[name](), Scores(), num_sanity_val_steps=0)
    host.fit(trained, datamodule=Digits())
    # from the first validation with fake quantization on, the averaged model has its own ranges
    assert min(seen) > before - 4
    qmodel = assert_packs(host, trained)
    assert accuracy(qmodel) > before - 2
    for part in quantizers(trained):
        if part.is_weight and not part.learned:  # the ranges of the averaged weights, not of the last step's
            fake = next(fake for fake in fake_modules(trained).values() if fake.weight_fake_quant is part)
            assert torch.equal(part.measure(fake.effective_weight("weight"))[0], part.scale)


@pytest.mark.parametrize("name", AVERAGES)
def test_averaging_listed_before_says_what_to_do(name: str) -> None:
    host = trainer(1, AVERAGES[name](), lq.QATCallback("w8a8"))
    with pytest.raises(MisconfigurationException, match="list QATCallback before it"):
        host.fit(Classifier(), datamodule=Digits())


def test_an_averaged_run_resumes(tmp_path: Path) -> None:
    def host(epochs: int, *more: L.Callback) -> lq.Trainer:
        callbacks = [lq.QATCallback("w4a4", method="lsq", quantize_from=1), EMAWeightAveraging(decay=0.8), *more]
        return trainer(epochs, *callbacks, enable_checkpointing=bool(more), limit_train_batches=4)

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = Classifier()
    host(3, keeper).fit(model, datamodule=Digits())
    again = Classifier()
    resumed = host(4)
    resumed.fit(again, datamodule=Digits(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert resumed.current_epoch == 4
    score = host(1).validate(Classifier(), Digits(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False, weights_only=True)
    # the checkpoint holds the averaged weights, with fake quantization on
    assert score[0]["accuracy"] == pytest.approx(host(1).validate(model, Digits(), verbose=False)[0]["accuracy"], abs=0.02)


# --- callbacks that watch a score -----------------------------------------------------------------------------------


class Scripted(Classifier):
    """A score that falls when fake quantization starts, and never reaches that of the float model again."""

    def on_validation_epoch_end(self) -> None:
        quantizing = next(quantizers(self)).quantizing
        self.log("score", 0.5 + 0.01 * self.current_epoch if quantizing else 0.9 - 0.01 * self.current_epoch)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("resume", [False, True])
def test_patience_and_best_score_start_afresh(restart: bool, resume: bool, tmp_path: Path) -> None:
    def host(epochs: int) -> tuple[lq.Trainer, EarlyStopping, ModelCheckpoint]:
        stopping = EarlyStopping("score", mode="max", patience=3)
        keeper = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}", save_last=True)
        callback = lq.QATCallback("w8a8", quantize_from=3, restart_monitors=restart)
        options: dict[str, Any] = {"limit_train_batches": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        return trainer(epochs, stopping, keeper, callback, **options), stopping, keeper

    run, stopping, keeper = host(3 if resume else 6)
    model: Any = Scripted()
    run.fit(model, datamodule=Digits())
    if resume:  # the restart itself is then the first thing that a new process does
        assert (stopping.wait_count, keeper.best_model_score.item()) == (2, pytest.approx(0.9))
        run, stopping, keeper = host(6)
        run.fit(Scripted(), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    if restart:
        assert run.current_epoch == 6
        assert (stopping.wait_count, stopping.best_score.item()) == (0, pytest.approx(0.55))
        assert keeper.best_model_score.item() == pytest.approx(0.55)
        assert Path(keeper.best_model_path).name == "epoch=5.ckpt"
        assert (tmp_path / "epoch=0.ckpt").exists()  # the float model's best stays on disk
    else:
        assert run.current_epoch == 4  # patience ran out
        assert Path(keeper.best_model_path).name == "epoch=0.ckpt"


def test_monitors_restart_once(tmp_path: Path) -> None:
    def host(epochs: int) -> tuple[lq.Trainer, EarlyStopping]:
        stopping = EarlyStopping("score", mode="max", patience=9)
        keeper = ModelCheckpoint(tmp_path, save_last=True)
        options: dict[str, Any] = {"limit_train_batches": 2, "enable_checkpointing": True}
        return trainer(epochs, stopping, keeper, lq.QATCallback("w8a8", quantize_from=1), **options), stopping

    run, stopping = host(3)
    run.fit(Scripted(), datamodule=Digits())
    run, stopping = host(4)
    stopping.on_train_start = lambda *args: seen.append(stopping.best_score.item())  # type: ignore[method-assign]
    seen: list[float] = []
    run.fit(Scripted(), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert seen == [pytest.approx(0.52)]
    assert stopping.best_score.item() == pytest.approx(0.53)


# --- precision, short runs, accumulation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "precision", "method"),
    thinned(["w8a8", "w4a4", "w8a8-dynamic"], ["32-true", "bf16-mixed", "bf16-true"], ["ste", "lsq"], of=3),
)
def test_precision(trained: Classifier, recipe: str, precision: str, method: str) -> None:
    before = accuracy(trained)
    calibrated = trainer(precision=precision).quantize(trained, datamodule=Digits(), recipe=recipe)
    score = trainer(precision=precision).validate(calibrated, datamodule=Digits(), verbose=False)[0]["accuracy"]
    assert 100 * score > before - 2
    trained.hparams.lr = 5e-4
    host = trainer(2, lq.QATCallback(recipe, method=method), precision=precision)
    host.fit(trained, datamodule=Digits())
    dtypes = {value.dtype for name, value in trained.state_dict().items() if name.endswith(".scale")}
    assert dtypes <= {torch.float32}
    assert {value.dtype for name, value in trained.named_parameters() if name.endswith("conv1.weight")} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    }
    qmodel = host.quantize()
    assert 100 * host.validate(qmodel, datamodule=Digits(), verbose=False)[0]["accuracy"] > before - 2


OPTIONS: list[dict[str, Any]] = [
    {"fast_dev_run": True},
    {"fast_dev_run": 3},
    {"overfit_batches": 2},
    {"inference_mode": True},
    {"inference_mode": False},
    {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    {"detect_anomaly": True},
    {"deterministic": True},
    {"max_steps": 7},
    {"check_val_every_n_epoch": 2},
    {"reload_dataloaders_every_n_epochs": 1},
    {"use_distributed_sampler": False, "barebones": False, "profiler": "simple"},
]


@pytest.mark.parametrize(("options", "method"), thinned(OPTIONS, ["ste", "lsq"], of=2), ids=str)
def test_trainer_options(options: dict[str, Any], method: str) -> None:
    model = Classifier()
    callbacks: list[L.Callback] = [lq.QATCallback("w8a8", method=method, quantize_from=0.0)]
    host = trainer(2, *callbacks, **{"limit_train_batches": 6, **options})
    host.fit(model, datamodule=Digits())
    assert all(part.quantizing for part in quantizers(model))
    host.validate(model, datamodule=Digits(), verbose=False)
    host.fit_loop.max_epochs = 4
    host.fit(model, datamodule=Digits())  # nothing that validation made is in the way of training
    assert_packs(host, model)


def test_accumulation_scheduler_and_learning_rate_finder(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=6)
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), finder, lq.QATCallback("w4a4", method="lsq", quantize_from=1)]
    model = Classifier()
    host = trainer(2, *callbacks, limit_train_batches=10, default_root_dir=tmp_path, enable_checkpointing=True)
    host.fit(model, datamodule=Digits())
    assert host.global_step == 15
    assert_packs(host, model)


# --- optimizers -----------------------------------------------------------------------------------------------------


class TwoOptimizers(Classifier):
    """Manual optimization: the stem by one optimizer, the rest by another, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        stem = list(self.net.stem.parameters())
        known = {id(value) for value in stem}
        rest = [value for value in self.parameters() if id(value) not in known]
        optimizers = [torch.optim.SGD(stem, 0.05, momentum=0.9), torch.optim.AdamW(rest, 2e-3)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 100) for optimizer in optimizers]


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_several_optimizers(trained: Classifier, method: str, tmp_path: Path) -> None:
    model = TwoOptimizers()
    model.load_state_dict(trained.state_dict())
    host = trainer(2, lq.QATCallback("w4a4", method=method, quantize_from=0.5), limit_train_batches=10)
    host.fit(model, datamodule=Digits())
    host.save_checkpoint(tmp_path / "two.ckpt")
    qmodel = assert_packs(host, model)
    assert accuracy(qmodel) > 85
    resumed = trainer(3, lq.QATCallback("w4a4", method=method, quantize_from=0.5), limit_train_batches=10)
    resumed.fit(TwoOptimizers(), datamodule=Digits(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert len(resumed.optimizers) == 2


# --- torch.compile --------------------------------------------------------------------------------------------------


class Silent(Classifier):
    """`self.log` within a compiled training_step fails in Lightning 2.6.6 itself, with a float model too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def compiled_part(model: Classifier) -> L.LightningModule:
    model.net = torch.compile(model.net, backend="eager")
    return model


def compiled_in_place(model: Classifier) -> L.LightningModule:
    model.net.compile(backend="eager")
    return model


def compiled_whole(model: Classifier) -> L.LightningModule:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(("make", "method"), thinned([compiled_part, compiled_in_place, compiled_whole], ["ste", "lsq"], of=2))
def test_compiled_modules(trained: Classifier, make: Any, method: str) -> None:
    before = accuracy(trained)
    if make is compiled_whole:
        trained.__class__ = Silent
    trained.hparams.lr = 5e-4
    plain = lq.quantize(trained, "w8a8", trainer=trainer(), datamodule=Digits())
    model = make(trained)
    host = trainer(2, lq.QATCallback("w8a8", method=method, freeze_observers_at=1), limit_train_batches=6)
    ptq = host.quantize(model, datamodule=Digits(), recipe="w8a8")
    assert torch.allclose(ptq(images()), plain(images()), atol=1e-5)
    host.fit(model, datamodule=Digits())
    inner = getattr(model, "_orig_mod", model)
    assert all(part.quantizing and part.has_range for part in quantizers(inner))
    assert len(fake_modules(inner)) == 5
    assert all(fake.folded_norm for name, fake in fake_modules(inner).items() if not name.endswith("head"))
    qmodel = host.quantize()
    assert len(packed_modules(qmodel)) == 5
    qmodel.__class__ = Classifier
    assert accuracy(qmodel) > before - 2


# --- what ends a fit early ------------------------------------------------------------------------------------------


class Fails(Classifier):
    """Raises in a step of its choice."""

    where: str | None = None
    error: type[BaseException] = RuntimeError

    def _fail(self, where: str) -> None:
        if self.where == where and not self.trainer.sanity_checking:
            raise self.error("planted")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self._fail("training")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 2:
            self._fail("optimizer")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._fail("validation")
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["training", "optimizer", "validation"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_an_end_inside_an_epoch_leaves_a_clean_state(where: str, error: type[BaseException], method: str) -> None:
    model = Fails()
    model.where, model.error = where, error
    names = list(model.state_dict())
    host = trainer(2, lq.QATCallback("w8a8", method=method, freeze_bn_at=0), limit_train_batches=4)
    with pytest.raises((error, SystemExit)):
        host.fit(model, datamodule=Digits())
    assert set(names) <= set(model.state_dict())
    assert not any(part.observing for part in quantizers(model) if not part.is_weight)
    assert not any(part.linked for part in quantizers(model))
    assert all(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d)) or where == "validation"
    model.where = None
    again = trainer(1, lq.QATCallback("w8a8", method=method), limit_train_batches=4)
    again.validate(model, datamodule=Digits(), verbose=False)
    again.fit(model, datamodule=Digits())
    assert_packs(again, model)
