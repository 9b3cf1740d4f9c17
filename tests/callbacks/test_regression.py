"""What went wrong with Lightning's own QAT callback until it was removed in 2.0 (PR #16750): one test for each reason.

The numbers are those of Lightning's issues.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, ModelPruning, ModelSummary
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.surgery import fake_modules, is_packed, is_prepared, packed_modules
from tests.digits import Classifier, Digits, trainer

METHODS = ["ste", "lsq"]


class TwoInputs(Classifier):
    """A forward with two positional arguments and keywords, one without default."""

    def forward(self, x: Tensor, shift: Tensor, *, mask: Tensor, gain: float = 1.0) -> Tensor:
        return self.net(x * mask + shift) * gain

    def _logits(self, batch: Any) -> Tensor:
        x = batch[0]
        return self(x, torch.zeros_like(x), mask=torch.ones_like(x), gain=2.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self._logits(batch), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self._logits(batch), batch[1])
        self.log("accuracy", self.accuracy)


class Tested(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)


class TestedDigits(Digits):
    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("method", METHODS)
def test_regression_7926_15862_keyword_and_multi_argument_forwards(method: str) -> None:
    model = TwoInputs()
    host = trainer(1, lq.QATCallback("w8a8", method=method), limit_train_batches=5)
    host.fit(model, datamodule=Digits())
    qmodel = host.quantize()
    x, zero, one = images(), torch.zeros(16, 1, 8, 8), torch.ones(16, 1, 8, 8)
    with torch.no_grad():
        for call in (model.eval(), qmodel):
            assert torch.equal(call(x, zero, mask=one, gain=4.0), 2 * call(x, shift=zero, mask=one, gain=2.0))
    with pytest.raises(TypeError, match="mask"):
        model(x, zero)
    assert type(model).forward is TwoInputs.forward
    assert "forward" not in model.__dict__
    ptq = trainer().quantize(TwoInputs(), datamodule=Digits(), recipe="w8a8")
    assert len(packed_modules(ptq)) == 5


@pytest.mark.parametrize("method", METHODS)
def test_regression_6457_8485_11346_checkpoints_load_and_resume(method: str, tmp_path: Path) -> None:
    def callback() -> lq.QATCallback:
        return lq.QATCallback("w4a4", method=method, quantize_from=1)

    model = Classifier(lr=1e-3)
    host = trainer(2, callback(), limit_train_batches=4)
    host.fit(model, datamodule=Digits())
    host.save_checkpoint(tmp_path / "qat.ckpt")
    # QAT: the plain loader builds a float module, and says that keys are left over; ours rebuilds the quantizers
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Classifier.load_from_checkpoint(tmp_path / "qat.ckpt")
    loaded = lq.load_from_checkpoint(Classifier, tmp_path / "qat.ckpt")
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
    assert loaded.hparams.lr == 1e-3
    # packed: a Trainer's checkpoint of the converted model
    qmodel = host.quantize()
    packer = trainer()
    packer.validate(qmodel, datamodule=Digits(), verbose=False)
    packer.save_checkpoint(tmp_path / "packed.ckpt")
    again = lq.load_from_checkpoint(Classifier, tmp_path / "packed.ckpt")
    assert is_packed(again)
    assert torch.equal(again(images()), qmodel(images()))
    # float checkpoints still load with both
    float_host = trainer(1, limit_train_batches=1)
    float_host.fit(Classifier(), datamodule=Digits())
    float_host.save_checkpoint(tmp_path / "float.ckpt")
    assert not is_prepared(Classifier.load_from_checkpoint(tmp_path / "float.ckpt", weights_only=True))
    assert not is_prepared(lq.load_from_checkpoint(Classifier, tmp_path / "float.ckpt"))
    # a fit goes on from it, with every quantizer where it was
    resumed = trainer(3, callback(), limit_train_batches=4)
    fresh = Classifier()
    resumed.fit(fresh, datamodule=Digits(), ckpt_path=tmp_path / "qat.ckpt", weights_only=True)
    assert (resumed.current_epoch, resumed.global_step) == (3, 12)
    assert all(part.quantizing and part.has_range for part in quantizers(fresh))


@pytest.mark.parametrize("method", METHODS)
def test_regression_12896_10968_test_after_the_fit(method: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="accuracy", mode="max", save_top_k=-1)
    host = trainer(2, lq.QATCallback("w4a4", method=method), keeper, enable_checkpointing=True, limit_train_batches=6)
    model = Tested()
    host.fit(model, datamodule=TestedDigits())
    after = host.test(model, datamodule=TestedDigits(), verbose=False)[0]["test_accuracy"]
    assert after == pytest.approx(host.callback_metrics["test_accuracy"].item())
    best = host.test(datamodule=TestedDigits(), ckpt_path="best", verbose=False, weights_only=True)[0]["test_accuracy"]
    assert best == pytest.approx(keeper.best_model_score.item(), abs=1e-6)
    assert is_prepared(model)
    assert torch.isfinite(model(images())).all()


@pytest.mark.parametrize("method", METHODS)
def test_regression_7427_a_second_and_a_third_fit(method: str) -> None:
    model, data = Classifier(), Digits()
    first = trainer(1, lq.QATCallback("w8a8", method=method, freeze_bn_at=0), limit_train_batches=4)
    first.fit(model, datamodule=data)
    packed_once = first.quantize()
    weight = model.net.conv1.weight.detach().clone()
    first.fit_loop.max_epochs = 2
    first.fit(model, datamodule=data)  # the same Trainer and callback
    assert first.current_epoch == 2
    assert not torch.equal(weight, model.net.conv1.weight)
    third = trainer(1, lq.QATCallback("w8a8", method=method), limit_train_batches=4)
    third.fit(model, datamodule=data)
    assert all(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    packed = third.quantize()
    close = torch.isclose(packed(images()), model.eval()(images()), rtol=1e-5, atol=1e-4).all(dim=1)
    assert close.float().mean() >= 0.8
    assert not torch.equal(packed(images()), packed_once(images()))


def _state(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Watch(L.Callback):
    """What an evaluation, the summary's example or a tuner changes; listed last."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.evaluations = 0

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.before = _state(module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.evaluations += 1
        after = module.state_dict()
        self.changed += [name for name, value in self.before.items() if not torch.equal(value, after[name])]
        assert not any(part.observing for part in quantizers(module) if not part.is_weight)


@pytest.mark.parametrize("method", METHODS)
def test_regression_8507_8540_observers_watch_training_batches_only(method: str, tmp_path: Path) -> None:
    model = Tested()
    model.example_input_array = torch.full((1, 1, 8, 8), 1e3)
    watch, seen = Watch(), []

    class First(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.extend(part.observer.has_data for part in quantizers(module) if not part.is_weight)

    host = trainer(
        2,
        ModelSummary(),
        lq.QATCallback("w8a8", method=method),
        First(),
        watch,
        num_sanity_val_steps=2,
        val_check_interval=5,
        limit_train_batches=10,
        enable_model_summary=True,
    )
    host.fit(model, datamodule=TestedDigits())
    assert seen == [False] * 5  # neither the sanity check nor the summary's example was watched
    assert (watch.evaluations, watch.changed) == (5, [])
    before = _state(model)
    for run in (host.validate, host.test):
        run(model, datamodule=TestedDigits(), verbose=False)
    host.predict(model, DataLoader(images(), 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tune", ["lr", "batch"])
def test_regression_8507_8540_a_tuner_leaves_observers_alone(tune: str, tmp_path: Path) -> None:
    finder: L.Callback = (
        LearningRateFinder(num_training_steps=8) if tune == "lr" else BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=16)
    )
    seen: list[bool] = []

    class First(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.extend(part.observer.has_data for part in quantizers(module) if not part.is_weight)

    model, data = Classifier(), Digits()
    options = {"default_root_dir": tmp_path, "limit_train_batches": 10, "enable_checkpointing": True}
    host = trainer(1, lq.QATCallback("w8a8", method="lsq"), finder, First(), **options)
    host.fit(model, datamodule=data)
    assert seen == [False] * 5
    assert packed_modules(host.quantize())
    # and the Tuner by hand, on a model that has been through QAT
    before = _state(model)
    flags = [(part.quantizing, part.has_range) for part in quantizers(model)]
    again = trainer(1, lq.QATCallback("w8a8", method="lsq"), **options)
    if tune == "lr":
        Tuner(again).lr_find(model, datamodule=data, num_training=8)
    else:
        Tuner(again).scale_batch_size(model, datamodule=data, steps_per_trial=1, max_trials=2, init_val=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "fake_quant" in name)
    assert [(part.quantizing, part.has_range) for part in quantizers(model)] == flags


def test_regression_12890_12899_conv_and_batchnorm_found_without_a_list() -> None:
    model = Classifier()
    statistics = model.net.bn1.running_mean.clone()
    host = trainer(1, lq.QATCallback("w8a8"), limit_train_batches=5)
    host.fit(model, datamodule=Digits())
    pairs = {name: fake.folded_name for name, fake in fake_modules(model).items() if fake.folded_norm}
    assert pairs == {
        "net.stem.0": "net.stem.1",
        "net.conv1": "net.bn1",
        "net.conv2": "net.bn2",
        "net.shortcut.0": "net.shortcut.1",
    }
    # in training the BatchNorm is still there and learns; only the packed model has lost it
    assert not torch.equal(model.net.bn1.running_mean, statistics)
    assert not [part for part in host.quantize().modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("first", ["pruning", "qat"])
@pytest.mark.parametrize(("recipe", "method"), [("w8a8", "ste"), ("w4a4", "lsq"), ("w2a16", "ste")])
def test_regression_11047_pruning_beside_qat(recipe: str, method: str, first: str, tmp_path: Path) -> None:
    model = Classifier()
    taken = [(model.net.conv1, "weight"), (model.net.conv2, "weight")]  # references from before the preparation
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=taken, amount=0.4, use_lottery_ticket_hypothesis=False)
    callbacks: list[L.Callback] = [pruning, lq.QATCallback(recipe, method=method)]
    host = trainer(2, *(callbacks if first == "pruning" else callbacks[::-1]), limit_train_batches=6)
    host.fit(model, datamodule=Digits())
    zeros = {name: getattr(model.net, name).weight == 0 for name in ("conv1", "conv2")}
    assert sum(int(zero.sum()) for zero in zeros.values()) >= 0.6 * sum(zero.numel() for zero in zeros.values())
    qmodel = host.quantize()
    for name, zero in zeros.items():
        assert (getattr(qmodel.net, name).dequantized_weight()[zero] == 0).all()
    host.save_checkpoint(tmp_path / "pruned.ckpt")
    loaded = lq.load_from_checkpoint(Classifier, tmp_path / "pruned.ckpt")
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))


def test_regression_11047_checkpoints_of_a_pruned_run_resume(tmp_path: Path) -> None:
    def host(epochs: int, model: Classifier) -> lq.Trainer:
        pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(model.net.conv1, "weight")], amount=0.3)
        keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return trainer(epochs, lq.QATCallback("w8a8"), pruning, keeper, enable_checkpointing=True, limit_train_batches=4)

    first = Classifier()
    host(2, first).fit(first, datamodule=Digits())
    second = Classifier()
    resumed = host(3, second)
    resumed.fit(second, datamodule=Digits(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert resumed.current_epoch == 3
    assert (second.net.conv1.weight == 0).float().mean() > 0.29
    assert packed_modules(resumed.quantize())


def test_regression_16609_no_private_quantization_api() -> None:
    """A torch that moves or drops `torch.ao` must not break anything."""
    root = Path(lq.__file__).parent
    used: list[str] = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            used += [f"{path.name}: {name}" for name in names if name.startswith(("torch.ao", "torch.quantization", "torchao"))]
    assert used == []


@pytest.mark.parametrize("method", METHODS)
def test_regression_16170_19658_2203_layers_of_configure_model_reach_the_optimizer(method: str, tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.late: nn.Module | None = None

        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            assert self.late is not None
            return self.late(self.net(x))

    model = Late()
    host = trainer(1, lq.QATCallback("w8a8", method=method), limit_train_batches=3)
    host.fit(model, datamodule=Digits())
    assert "late" in fake_modules(model)
    assert "late" in packed_modules(host.quantize())
    optimized = {id(value) for group in host.optimizers[0].param_groups for value in group["params"]}
    assert {id(value) for value in model.parameters()} == optimized
    assert any(part.learned for part in quantizers(model)) == (method == "lsq")
    host.save_checkpoint(tmp_path / "late.ckpt")
    loaded = lq.load_from_checkpoint(Late, tmp_path / "late.ckpt")
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
