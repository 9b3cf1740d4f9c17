from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.nn import PackedModule
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.surgery import fake_modules, packed_modules
from tests.digits import Classifier, Digits, accuracy, trainer


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 6))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 24, generator=generator) for _ in range(count)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def input_scales(model: nn.Module) -> dict[str, float]:
    return {name: part.input_scale.item() for name, part in packed_modules(model).items()}


def test_ptq_w8a8_keeps_accuracy(trained: Classifier) -> None:
    qmodel = trainer().quantize(trained, datamodule=Digits(), recipe="w8a8")
    assert isinstance(qmodel, Classifier)
    assert abs(accuracy(qmodel) - accuracy(trained)) <= 0.3
    assert not any(isinstance(part, nn.BatchNorm2d) for part in qmodel.modules())


@pytest.mark.parametrize("recipe", list(lq.PRESETS))
def test_every_preset_end_to_end(trained: Classifier, recipe: str) -> None:
    before, kinds = snapshot(trained), [type(part) for part in trained.modules()]
    qmodel = lq.quantize(trained, recipe, datamodule=Digits())
    assert accuracy(qmodel) > (60 if recipe != "w2a16" else 5)  # 2-bit weights rounded to nearest keep next to nothing
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert kinds == [type(part) for part in trained.modules()]
    assert len(packed_modules(qmodel)) == 5
    assert not fake_modules(qmodel)


@pytest.mark.parametrize("give", ["list", "generator", "tuple", "dict", "forward", "loader"])
def test_batches_of_every_kind(give: str) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.net(x) * scale

    model, data = TwoInputs(), batches()
    sources: dict[str, Any] = {
        "list": data,
        "generator": (batch for batch in data),
        "tuple": [(batch, 2.0) for batch in data],
        "dict": [{"x": batch, "scale": 2.0} for batch in data],
        "forward": [(batch, "label") for batch in data],
        "loader": DataLoader(torch.cat(data), batch_size=8),
    }
    forward = (lambda model, batch: model(batch[0])) if give == "forward" else None
    found = lq.quantize(model, "w8a8", sources[give], forward=forward)
    expected = lq.quantize(model, "w8a8", data)
    assert input_scales(found) == input_scales(expected)


def test_calibration_batches_limits_the_data() -> None:
    data = [torch.ones(4, 24), 100 * torch.ones(4, 24)]
    few, all_of_it = (lq.quantize(mlp(), "w8a8", data, calibration_batches=count) for count in (1, 2))
    assert input_scales(all_of_it)["0"] == pytest.approx(100 * input_scales(few)["0"])


def test_static_ranges_are_those_of_the_data() -> None:
    data = batches()
    qmodel = lq.quantize(mlp(), "w8a8", data)
    seen = torch.cat(data)
    assert qmodel[0].input_scale.item() == pytest.approx((seen.max() - seen.min()).item() / 255)


def test_weight_only_and_dynamic_need_no_data() -> None:
    for recipe in ("w8a16", "w4a16", "w8a8-dynamic", "fp8", "nf4"):
        assert packed_modules(lq.quantize(mlp(), recipe))


def test_static_without_data_raises_before_work() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"static activations \(0, 2\).*batches, dataloaders or a datamodule"):
        lq.quantize(model, "w8a8")
    assert not any(isinstance(part, QuantizedModule) for part in model.modules())


def test_nan_in_calibration_names_the_module() -> None:
    data = batches(2)
    data[1][3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"0\.input: 1 of 192 values are nan or inf"):
        lq.quantize(mlp(), "w8a8", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "w9a9"}, "unknown recipe 'w9a9'; give a preset"),
        ({"recipe": None}, "a float model needs a recipe"),
        ({"recipe": lq.Recipe("w8a8", observer="magic")}, "unknown observer 'magic'; valid: minmax"),
        ({"recipe": lq.Recipe("w8a8", observer_options={"magic": 1}, observer="mse")}, "no option 'magic'; valid: norm, steps"),
        ({"recipe": lq.Recipe("w8a8", algorithms=["magic"])}, "unknown algorithm 'magic'"),
        ({"recipe": "w8a8", "batches": []}, "calibration got no batch"),
        ({"recipe": "w8a8", "batches": torch.zeros(2, 24)}, "batches is a Tensor"),
        ({"recipe": "w8a8", "batches": [(torch.zeros(2, 24), torch.zeros(2))]}, "does not fit Sequential.forward"),
        ({"recipe": "w8a8", "batches": [], "dataloaders": []}, "choose one source"),
        ({"recipe": "w8a8", "calibration_batches": 0}, "calibration_batches=0"),
        ({"recipe": lq.Recipe("w8a8", ignore=["*"])}, "quantizes nothing.*ignored by"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    options.setdefault("batches", batches()) if "dataloaders" not in options else None
    with pytest.raises(ValueError, match=message):
        lq.quantize(mlp(), **options)


def test_dry_run_tells_and_does_nothing(trained: Classifier) -> None:
    before = snapshot(trained)
    plan = trainer().quantize(trained, datamodule=Digits(), recipe="w4a4", dry_run=True)
    assert [row.name for row in plan.rows] == ["net.stem.0", "net.conv1", "net.conv2", "net.shortcut.0", "net.head"]
    assert plan.rows[1].scheme.startswith("w: int4")
    assert plan.rows[0].scheme.startswith("w: int8")  # first layer
    assert "folded into net.conv1" in plan.skipped["net.bn1"]
    assert plan.bytes_after < plan.bytes_before
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_calibration_leaves_trainer_model_and_data_as_they_were(trained: Classifier) -> None:
    class Counter(L.Callback):
        calls = 0

        def on_validation_batch_end(self, *args: Any) -> None:
            Counter.calls += 1

    model, data = copy.deepcopy(trained), Digits()
    host = trainer(1, Counter(), limit_val_batches=1)
    host.validate(model, datamodule=data, verbose=False)
    calls, metrics = Counter.calls, dict(host.callback_metrics)
    callbacks, datasets = list(host.callbacks), (data.train, data.val)
    model.accuracy.update(torch.tensor([1]), torch.tensor([1]))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    qmodel = host.quantize(model, datamodule=data, recipe="w8a8")
    assert torch.equal(torch.rand(3), expected)
    assert Counter.calls == calls
    assert dict(host.callback_metrics) == metrics
    assert host.callbacks == callbacks
    assert host.limit_val_batches == 1
    assert host.lightning_module is model
    assert host.datamodule is data
    assert (data.train, data.val) == datasets
    # what the step wrote into the copy is undone
    assert qmodel.seen == model.seen
    assert qmodel.accuracy.update_count == model.accuracy.update_count == 1
    assert type(qmodel) is Classifier


class Steps(L.LightningModule):
    """Counts which of its steps ran, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.net.append(nn.Dropout(0.5))
        self.register_buffer("unused", torch.zeros(1))

    ran: list[tuple[str, bool, bool]]

    def run(self, name: str, batch: Any) -> Tensor:
        Steps.ran.append((name, self.training, torch.is_grad_enabled()))
        return self.net(batch).square().mean()


def with_steps(*names: str, automatic: bool = True) -> type[Steps]:
    def make(name: str) -> Any:
        return lambda self, batch, index: self.run(name, batch)

    def init(self: Any) -> None:
        Steps.__init__(self)
        self.automatic_optimization = automatic

    return type("WithSteps", (Steps,), {"__init__": init, **{name: make(name) for name in names}})


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("training_step",), "training_step"),
        (("training_step", "predict_step"), "predict_step"),
        (("training_step", "predict_step", "validation_step"), "validation_step"),
        (("training_step", "validation_step", "calibration_step"), "calibration_step"),
    ],
)
def test_the_step_is_found(names: tuple[str, ...], chosen: str) -> None:
    Steps.ran = []
    model = with_steps(*names)()
    before = snapshot(model)
    qmodel = lq.quantize(model, "w8a8", dataloaders=DataLoader(torch.cat(batches()), 8))
    assert Steps.ran == [(chosen, False, False)] * 3
    assert input_scales(qmodel) == {
        f"net.{name}": value for name, value in input_scales(lq.quantize(mlp(), "w8a8", batches())).items()
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_manual_optimization_without_another_step_raises() -> None:
    model = with_steps("training_step", automatic=False)()
    with pytest.raises(MisconfigurationException, match=r"define calibration_step\(batch, batch_idx\)"):
        lq.quantize(model, "w8a8", dataloaders=DataLoader(torch.cat(batches()), 8))


def test_forward_overrides_the_step() -> None:
    Steps.ran = []
    model = with_steps("validation_step")()
    loader = DataLoader(torch.cat(batches()), 8)
    qmodel = lq.quantize(model, "w8a8", dataloaders=loader, forward=lambda model, batch: model.net(2 * batch))
    assert not Steps.ran
    plain = lq.quantize(mlp(), "w8a8", batches())
    assert qmodel.net[0].input_scale.item() == pytest.approx(2 * plain[0].input_scale.item())


def test_calibration_dataloader_is_preferred() -> None:
    class Calibrated(Digits):
        def calibration_dataloader(self) -> DataLoader:
            return DataLoader([(torch.full((1, 8, 8), 7.0), 0)] * 4, 4)

    qmodel = lq.quantize(Classifier(), "w8a8", datamodule=Calibrated())
    assert qmodel.net.stem[0].input_scale.item() == pytest.approx(7 / 255)


def test_plain_module_with_a_datamodule(trained: Classifier) -> None:
    qmodel = lq.quantize(trained.net, "w8a8", datamodule=Digits(), forward=lambda model, batch: model(batch[0]))
    assert input_scales(qmodel)["stem.0"] == pytest.approx(1 / 255)


def test_modules_own_dataloader_and_fit_dataloaders() -> None:
    class Own(with_steps("training_step")):  # type: ignore[misc]
        def train_dataloader(self) -> DataLoader:
            return DataLoader(torch.cat(batches()), 8)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    Steps.ran = []
    expected = lq.quantize(mlp(), "w8a8", batches())
    qmodel = lq.quantize(Own(), "w8a8")
    assert qmodel.net[0].input_scale.item() == expected[0].input_scale.item()

    class Fitted(Own):  # type: ignore[misc, valid-type]
        train_dataloader = L.LightningModule.train_dataloader

    host, model = trainer(1), Fitted()
    host.fit(model, DataLoader(torch.cat(batches()), 8))
    qmodel = host.quantize(recipe="w8a8")
    assert qmodel.net[0].input_scale.item() == expected[0].input_scale.item()


def test_trainer_without_a_model_raises() -> None:
    with pytest.raises(MisconfigurationException, match="needs a model"):
        trainer().quantize(recipe="w8a8")


def test_plain_trainer_gives_the_same(trained: Classifier) -> None:
    L.seed_everything(0, verbose=False)
    ours = trainer().quantize(trained, datamodule=Digits(), recipe="w8a8")
    L.seed_everything(0, verbose=False)
    plain = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    theirs = lq.quantize(trained, "w8a8", datamodule=Digits(), trainer=plain)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_packed_model_is_refused() -> None:
    with pytest.raises(ValueError, match="packed already"):
        lq.quantize(lq.quantize(mlp(), "w8a16"), "w8a16")


def test_fast_dev_run_calibrates_on_one_batch(trained: Classifier) -> None:
    host = lq.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False)
    model = copy.deepcopy(trained)
    qmodel = host.quantize(model, datamodule=Digits(), recipe="w8a8")
    assert isinstance(qmodel.net.head, PackedModule)


def test_observers_and_options_are_used() -> None:
    data = [*batches(), 50 * torch.ones(1, 24)]
    clipped = lq.quantize(mlp(), lq.Recipe("w8a8", observer="percentile", observer_options={"percentile": 90.0}), data)
    full = lq.quantize(mlp(), "w8a8", data)
    assert clipped[0].input_scale.item() < full[0].input_scale.item() / 2


def test_torch_compile_and_bf16() -> None:
    qmodel = lq.quantize(mlp(), "w8a8", batches())
    x = batches()[0]
    compiled = torch.compile(qmodel, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), qmodel(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = qmodel(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - qmodel(x)).abs().max() < 0.05


def test_a_plain_module_is_calibrated_in_evaluation_mode_whatever_mode_it_is_in():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    data = [torch.randn(16, 8) + 3 for _ in range(4)]
    recipe = lq.Recipe("w8a8", schemes={"0": None})  # the BatchNorm has nothing to be folded into
    states = [lq.quantize(net.train(mode), recipe, data).state_dict() for mode in (False, True)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert all(part.training for part in net.modules())
