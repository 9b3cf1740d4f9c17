"""What ordinary modules do around a fit, and what once went wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.surgery import fake_modules, packed_modules
from tests.digits import Classifier, Digits, trainer


class Plain(L.LightningModule):
    """A linear layer and a BatchNorm, whose pair only an example can confirm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.mean = MeanMetric()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.mean.update(loss.detach())
        self.seen.append(len(x))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def rows(count: int = 32) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, generator=generator), index % 4) for index in range(count)]


def loader(count: int = 32) -> DataLoader:
    return DataLoader(rows(count), 4)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_an_example_through_training_step_logs_nothing_and_leaves_no_trace(recipe: str) -> None:
    model = Plain()
    host = trainer(1, lq.QATCallback(recipe))
    host.fit(model, loader())
    assert fake_modules(model)["net.0"].norm is model.net[1]
    assert model.mean.update_count == 8
    assert model.seen == [4] * 8
    assert type(model) is Plain


def test_steps_that_cannot_run_early_do_not_stop_a_fit() -> None:
    class Later(Plain):
        def on_fit_start(self) -> None:
            self.weight_of_class = torch.ones(4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], self.weight_of_class)

    model = Later()
    with pytest.warns(UserWarning, match=r"no example could be run.*weight_of_class.*example_input_array"):
        trainer(1, lq.QATCallback("w8a8")).fit(model, loader())
    assert "only an example shows" in lq.summary(model).skipped["net.1"]


def test_manual_optimization_dict_loaders_and_transfer_hooks() -> None:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    host = trainer(1, lq.QATCallback("w4a4"))
    host.fit(Manual(), loader(), loader())
    assert packed_modules(host.quantize())

    class Both(Plain):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {name: (x * 2, y) for name, (x, y) in batch.items()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = (torch.cat([batch[name][index] for name in ("a", "b")]) for index in (0, 1))
            return super().training_step((x, y), batch_idx)

        validation_step = L.LightningModule.validation_step

    both = Both()
    host = trainer(1, lq.QATCallback("w4a4"))
    host.fit(both, {"a": loader(), "b": loader(16)})
    assert fake_modules(both)["net.0"].norm is not None
    calibrated = trainer(1, limit_train_batches=1)
    fresh = Both()
    calibrated.fit(fresh, {"a": loader(), "b": loader(16)})
    assert packed_modules(calibrated.quantize(recipe="w8a8"))


def test_an_iterators_first_batch_is_not_taken() -> None:
    model = Plain()
    with pytest.warns(UserWarning, match="first batch would be lost"):
        trainer(1, lq.QATCallback("w4a4")).fit(model, iter(list(loader())))
    assert len(model.seen) == 8


class Scales(L.Callback):
    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validations: list[float] = []

    @staticmethod
    def scale(module: Any) -> float:
        return module.net[3].input_fake_quant.scale.item()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.steps.append(self.scale(module))

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validations.append(self.scale(module))


def test_learned_activation_scales_survive_validation_and_epochs() -> None:
    scales, model = Scales(), Plain()
    host = trainer(2, lq.QATCallback("w8a8", method="lsq"), scales, val_check_interval=4, limit_val_batches=1)
    host.fit(model, loader(), loader())
    assert scales.validations == [scales.steps[index] for index in (3, 7, 11, 15)]
    assert len(set(scales.steps)) > 10
    assert model.net[3].input_fake_quant.scale.item() == scales.steps[-1]


def test_batchnorm_freezes_between_validations_inside_an_epoch() -> None:
    class Modes(L.Callback):
        frozen: list[bool]

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.frozen.append(not module.net[1].training)

    modes = Modes()
    modes.frozen = []
    trainer(1, lq.QATCallback("w8a8", freeze_bn_at=0.5), modes, val_check_interval=2).fit(Plain(), loader(), loader())
    assert modes.frozen == [False] * 4 + [True] * 4


def test_fractions_of_data_of_unknown_length_go_by_epochs() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows(16))

    class Flags(L.Callback):
        seen: list[bool]

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.seen.append(next(quantizers(module)).quantizing)

    flags = Flags()
    flags.seen = []
    trainer(4, lq.QATCallback("w8a8", quantize_from=0.5), flags).fit(Plain(), DataLoader(Stream(), 4))
    assert flags.seen == [False] * 8 + [True] * 8


def test_layers_made_in_the_modules_setup_are_listed() -> None:
    class Late(Plain):
        def setup(self, stage: str) -> None:
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

    model = Late()
    with pytest.warns(UserWarning, match="head stay in float"):
        trainer(1, lq.QATCallback("w8a8-dynamic")).fit(model, loader())
    assert "configure_model" in lq.summary(model).skipped["head"]


@pytest.mark.parametrize("other", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3)])
def test_averaging_listed_first_raises(other: Any) -> None:
    host = trainer(1, other(), lq.QATCallback("w8a8"))
    with pytest.raises(MisconfigurationException, match="list QATCallback before it"):
        host.fit(Plain(), loader())
    trainer(1, lq.QATCallback("w8a8-dynamic"), other()).fit(Plain(), loader())


def test_freezing_ranges_before_any_was_seen_raises() -> None:
    model = Plain()
    with pytest.raises(MisconfigurationException, match="freeze_observers_at=0"):
        trainer(1, lq.QATCallback("w8a8", freeze_observers_at=0)).fit(model, loader())
    assert not fake_modules(model)
    trainer(1, lq.QATCallback("w4a16", freeze_observers_at=0)).fit(Plain(), loader())


@pytest.mark.parametrize(
    "options", [{"observer": "magic"}, {"weight_observer": "magic"}, {"observer": "mse", "observer_options": {"x": 1}}]
)
def test_a_wrong_observer_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = Plain()
    with pytest.raises(ValueError, match="valid: "):
        trainer(1, lq.QATCallback(lq.Recipe("w8a8", **options))).fit(model, loader())
    assert not fake_modules(model)


def test_what_a_training_cannot_do_raises_before_it_starts() -> None:
    with pytest.raises(MisconfigurationException, match=r"algorithms=\['gptq'\].*lq.quantize"):
        lq.QATCallback(lq.Recipe("w4a16", algorithms=["gptq"]))
    model = Plain()
    with pytest.raises(ValueError, match=r"net\.0.*nf4.*method='ste'"):
        trainer(1, lq.QATCallback("nf4", method="lsq")).fit(model, loader())
    assert not fake_modules(model)


def test_an_endless_second_fit_with_fractions_raises() -> None:
    model = Plain()
    trainer(1, lq.QATCallback("w8a8")).fit(model, loader())
    with pytest.raises(MisconfigurationException, match="has no end"):
        trainer(-1, lq.QATCallback("w8a8", freeze_bn_at=0.5)).fit(model, loader())


def test_calibration_leaves_a_trainer_without_a_datamodule_without_one() -> None:
    host = trainer()
    before = getattr(host, "datamodule", None)
    host.quantize(Classifier(), datamodule=Digits(), recipe="w8a8")
    assert getattr(host, "datamodule", None) is before


def test_float_weights_loaded_after_preparation_are_ranged_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    state = {name: 3 * value for name, value in model.state_dict().items()}
    lq.prepare(model, "w8a16")
    model.load_state_dict(state)
    assert torch.allclose(lq.convert(model)[0].weight, state["0.weight"], atol=0.01)


def test_replaced_batchnorms_are_found_again() -> None:
    model = Classifier()
    lq.prepare(model, "w8a8-dynamic", call=lambda: model(torch.rand(2, 1, 8, 8)))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    qmodel = lq.convert(model)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in qmodel.modules())
    del model.net.stem[1]
    with pytest.raises(RuntimeError, match=r"'net\.stem\.1' that is folded into it is no longer"):
        lq.convert(model)


def test_checkpoints_made_with_hparams_in_one_argument_and_the_callbacks_recipe(tmp_path: Path) -> None:
    class Configured(Plain):
        def __init__(self, config: dict[str, int]) -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.late: nn.Module | None = None

        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert self.late is not None
            return self.late(self.net(x))

    host = trainer(1, lq.QATCallback("w8a8"))
    host.fit(Configured({"a": 1}), loader())
    host.save_checkpoint(tmp_path / "qat.ckpt")
    again = lq.load_from_checkpoint(Configured, tmp_path / "qat.ckpt", config={"a": 1})
    with pytest.raises(MisconfigurationException, match="another recipe"):
        trainer(1, lq.QATCallback("w4a4")).fit(again, loader())
    trainer(1, lq.QATCallback("w8a8")).fit(again, loader())


def test_quantize_after_validate_in_a_fresh_process(tmp_path: Path) -> None:
    first = Classifier()
    host = trainer(1, lq.QATCallback("w4a4"), limit_train_batches=4)
    host.fit(first, datamodule=Digits())
    host.save_checkpoint(tmp_path / "qat.ckpt")
    second = Classifier()
    trainer(1, lq.QATCallback("w4a4")).validate(
        second, datamodule=Digits(), ckpt_path=tmp_path / "qat.ckpt", verbose=False, weights_only=True
    )
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(lq.convert(second)(x), host.quantize(first)(x))
