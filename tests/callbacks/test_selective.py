"""QATCallback that trains only some layers: the others do not move by a bit, whatever the optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import quantizers
from lightning_quant.methods import METHODS
from lightning_quant.selection import RESTS
from lightning_quant.surgery import fake_modules, packed_modules
from tests.callbacks.selective_worker import STRATEGIES, train
from tests.digits import Classifier, Digits, accuracy, trainer
from tests.helpers import assert_same_state
from tests.launching import launch

TRAIN = ["net.conv2", "net.head"]
TRAINED = ("net.conv2.", "net.head.", "net.bn2.")


class Decaying(Classifier):
    """Weight decay that would move what has a gradient of zero, and momentum; all parameters given."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=0.5)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What training could move: parameters and BatchNorm statistics, but for quantizers'."""
    state = {name: value.clone() for name, value in model.state_dict().items() if "fake_quant" not in name}
    return {name: value for name, value in state.items() if "_extra_state" not in name and name.startswith("net.")}


def fit(model: Classifier, *callbacks: L.Callback, epochs: int = 2, **options: Any) -> lq.Trainer:
    L.seed_everything(0, verbose=False)
    host = trainer(epochs, *callbacks, **{"limit_train_batches": 8, **options})
    host.fit(model, datamodule=Digits())
    return host


def decaying(trained: Classifier) -> Decaying:
    model = Decaying(lr=1e-3)
    model.load_state_dict(trained.state_dict())
    return model


# methods that transform weights would change those of the rest
PAIRS = [(rest, name) for rest in RESTS for name, method in METHODS.items() if rest == "float" or method.weight.transform is None]


@pytest.mark.parametrize(("rest", "method"), PAIRS)
def test_the_rest_does_not_move(rest: str, method: str, trained: Classifier) -> None:
    model = decaying(trained)
    before = weights(model)
    recipe = lq.Recipe("w4a4", bits=METHODS[method].bits, edges=None)
    host = fit(model, lq.QATCallback(recipe, method=method, train=TRAIN, rest=rest))  # type: ignore[arg-type]
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(TRAINED)}
    assert all(value.requires_grad for value in model.parameters())
    assert all(quantizer.quantizing for quantizer in quantizers(model))
    names = {"net.conv2", "net.head"}
    everything = {"net.stem.0", "net.conv1", "net.shortcut.0", *names}
    assert set(fake_modules(model)) == set(packed_modules(host.quantize())) == (everything if rest == "quantized" else names)
    if method in ("ste", "lsq"):  # what takes codes away needs all layers to be trained
        assert accuracy(host.quantize()) > 60


LEARNING = [
    (name, oscillation)
    for name, method in METHODS.items()
    for oscillation in (None, "freeze", "dampen")
    if method.learns and method.weight.transform is None
]


@pytest.mark.parametrize(("method", "oscillation"), LEARNING)
def test_what_quantizers_of_the_rest_have_learned_stands_still(method: str, oscillation: Any, trained: Classifier) -> None:
    def learned(model: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.named_parameters() if "fake_quant" in name}

    begun: dict[str, Tensor] = {}

    class Watch(L.Callback):
        """Activations start from what the first batch has."""

        def on_train_epoch_start(self, host: Any, module: Any) -> None:
            if host.current_epoch == 1:
                begun.update(learned(module))

    model = decaying(trained)
    recipe = "w2a2" if METHODS[method].bits == 2 else "w4a4"
    fit(model, lq.QATCallback(recipe, method=method, train=TRAIN, oscillation=oscillation), Watch())
    moved = {name for name, value in learned(model).items() if not torch.equal(value, begun[name])}
    assert moved
    assert all(name.startswith(TRAINED) for name in moved)


def test_learned_scales_of_the_rest_stand_still_and_alone_they_learn(trained: Classifier) -> None:
    def scales(model: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in model.named_parameters() if "weight_fake_quant" in name}

    start: dict[str, Tensor] = {}

    class Start(L.Callback):
        def on_train_start(self, host: Any, module: Any) -> None:
            start.update(scales(module))

    model = decaying(trained)
    fit(model, lq.QATCallback("w4a4", method="lsq", train=TRAIN), Start())
    moved = {name for name, value in scales(model).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if name.startswith(TRAINED)}
    model = decaying(trained)
    before = weights(model)
    fit(model, lq.QATCallback("w4a4", method="lsq", train="scales"), Start())
    assert_same_state(weights(model), before)
    assert all(not torch.equal(value, start[name]) for name, value in scales(model).items())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.weight.transform is not None])
def test_weights_that_stand_still_are_not_transformed(method: str) -> None:
    for chosen in (TRAIN, "scales"):
        way = "another" if chosen == "scales" else "rest='float', or another"
        with pytest.raises(MisconfigurationException, match=f"method='{method}', which transforms weights.*Use {way}.*lsq"):
            lq.QATCallback("w4a4", method=method, train=chosen)  # type: ignore[arg-type]


def test_a_ranking_names_the_layers(trained: Classifier) -> None:
    model = decaying(trained)
    before = weights(model)
    found = lq.sensitivity(model, ["w2a16"], datamodule=Digits(), calibration_batches=1)
    fit(model, lq.QATCallback("w4a4", train=found.worst(1)))
    after = weights(model)
    (worst,) = found.worst(1)
    moved = {name for name in before if name.endswith(".weight") and not torch.equal(before[name], after[name])}
    assert f"{worst}.weight" in moved
    assert len(moved) <= 2  # and its BatchNorm's
    assert lq.QATCallback("w4a4", train=found).selection.patterns == found.worst(0.9)


class Stop(Exception):
    pass


class Raises(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise Stop


def test_everything_is_given_back_after_an_exception_and_in_the_next_fit(trained: Classifier) -> None:
    model = decaying(trained)
    model.net.bn1.bias.requires_grad_(False)
    callback = lq.QATCallback("w4a4", method="lsq", train=TRAIN)
    with pytest.raises(Stop):
        fit(model, callback, Raises())
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["net.bn1.bias"]
    before = weights(model)
    fit(model, callback)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(TRAINED)}
    # and without a selection all of it trains
    fit(model, lq.QATCallback("w4a4", method="lsq"))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.endswith("weight")} <= moved
    assert "net.bn1.bias" not in moved
    copy.deepcopy(model)


def test_statistics_of_the_rest_stand_still_through_validations_and_averages(trained: Classifier) -> None:
    model = decaying(trained)
    before = weights(model)
    callbacks = (lq.QATCallback("w4a4", train=TRAIN, quantize_from=1, freeze_bn_at=0.7), EMAWeightAveraging(decay=0.8))
    fit(model, *callbacks, epochs=3, val_check_interval=0.5)
    # an average of equal numbers is equal but for rounding
    moved = {name for name, value in weights(model).items() if not torch.allclose(value, before[name], rtol=1e-5, atol=1e-6)}
    assert moved == {name for name in before if name.startswith(TRAINED)}
    assert all(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.parametrize("options", [{"train": TRAIN}, {"train": TRAIN, "rest": "float"}, {"train": "scales"}], ids=str)
def test_a_resumed_run_ends_to_the_bit(options: dict[str, Any], trained: Classifier, tmp_path: Path) -> None:
    def run(folder: str, model: Classifier, resume: str | None = None) -> dict[str, Tensor]:
        L.seed_everything(0 if resume is None else 1, verbose=False)
        saves = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        callbacks = (lq.QATCallback("w4a4", method="lsq", **options), lq.RandomStateCallback(), saves)
        host = trainer(3, *callbacks, enable_checkpointing=True, limit_train_batches=4, num_sanity_val_steps=0)
        host.fit(model, datamodule=Digits(), ckpt_path=resume)
        return model.state_dict()

    whole = run("whole", decaying(trained))
    path = str(tmp_path / "whole" / "epoch=0.ckpt")
    assert_same_state(run("again", Decaying(lr=1e-3), path), whole)
    loaded = lq.load_from_checkpoint(Decaying, path)
    assert all(value.requires_grad for value in loaded.parameters())
    host = trainer(1, lq.QATCallback("w4a4", method="lsq", **options))
    host.validate(Decaying(), datamodule=Digits(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["conv9"]}, "QATCallback 'conv9' names no module of Decaying"),
        ({"train": ["conv9"], "rest": "float"}, "QATCallback 'conv9' names no module of Decaying"),
        ({"train": "scales"}, "QATCallback train='scales' leaves nothing to be trained"),
        ({"train": ["net.stem.1"], "rest": "float"}, "names no layer that the recipe quantizes"),
    ],
    ids=str,
)
def test_what_cannot_work_raises_before_the_first_batch(options: dict[str, Any], message: str) -> None:
    seen: list[int] = []

    class Watch(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            seen.append(1)

    model = Decaying()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, lq.QATCallback("w8a8", **options), Watch())
    assert seen == []
    assert all(value.requires_grad for value in model.parameters())


def test_bad_values_raise_at_once() -> None:
    with pytest.raises(MisconfigurationException, match="QATCallback rest='int8': valid are quantized, float"):
        lq.QATCallback("w8a8", train=["a"], rest="int8")


def test_beside_distillation(trained: Classifier) -> None:
    model = decaying(trained)
    before = weights(model)
    fit(model, lq.QATCallback("w2a2", method="lsq", train=TRAIN), lq.DistillationCallback(alpha=1.0))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(TRAINED)}


# --- scales of packed models ----------------------------------------------------------------------------------------


class Still(Decaying):
    """Takes only what is to be trained, as an optimizer with a state for every weight would not fit."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([value for value in self.parameters() if value.requires_grad], 1e-3)


def packed(trained: Classifier, algorithm: bool = True) -> Any:
    model = Still(lr=1e-3)
    model.load_state_dict(trained.state_dict())
    options = {"block_ap": {"iterations": 20}}
    kept = {"algorithms": ["block_ap"], "algorithm_options": options} if algorithm else {}
    recipe = lq.Recipe(lq.QuantScheme(lq.QuantSpec(2, symmetric=False)), **kept)
    return lq.quantize(model, recipe, datamodule=Digits(), calibration_batches=4)


def test_scales_of_a_packed_model_train_end_to_end(trained: Classifier, tmp_path: Path) -> None:
    """EfficientQAT: blocks first, then the scales of what is packed; codes and everything else stay."""
    model = packed(trained)
    before, start = {name: value.clone() for name, value in model.state_dict().items()}, accuracy(model)
    host = fit(model, lq.QATCallback(train="scales"), epochs=3, limit_train_batches=1.0, gradient_clip_val=1.0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    names = {f"{name}.weight_scale" for name in packed_modules(model)}
    assert moved - {name for name in moved if name.startswith("accuracy")} == names
    assert len(names) == 5
    assert not any(value.requires_grad for name, value in model.named_parameters() if name in names)
    assert accuracy(model) > start
    path = tmp_path / "packed.ckpt"
    host.save_checkpoint(path)
    assert accuracy(lq.load_from_checkpoint(Still, path)) == accuracy(model)


def test_a_packed_run_resumes_to_the_bit(trained: Classifier, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> dict[str, Tensor]:
        model = packed(trained, algorithm=False)
        L.seed_everything(0 if resume is None else 1, verbose=False)
        saves = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        callbacks = (lq.QATCallback(train="scales"), lq.DistillationCallback(trained, alpha=0.5), lq.RandomStateCallback(), saves)
        host = trainer(3, *callbacks, enable_checkpointing=True, limit_train_batches=4, num_sanity_val_steps=0)
        host.fit(model, datamodule=Digits(), ckpt_path=resume)
        return model.state_dict()

    whole = run("whole")
    assert_same_state(run("again", str(tmp_path / "whole" / "epoch=0.ckpt")), whole)


def test_a_packed_model_without_such_scales_says_so() -> None:
    class Table(Decaying):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.EmbeddingBag(10, 10)

    model = lq.quantize(Table(), lq.Recipe("w8a16", schemes={"net": "w8a16"}))
    with pytest.raises(MisconfigurationException, match=r"or a packed model has none that could learn \(linear layers"):
        fit(model, lq.QATCallback(train="scales"))


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("tests.callbacks.selective_worker", tmp_path_factory.mktemp("selective"))


@pytest.mark.xdist_group("selective")
@pytest.mark.parametrize("what", ["head", "scales"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy: str, what: str, ranks: Any) -> None:
    alone = train(what)
    first, second = (rank[strategy, what] for rank in ranks)
    assert_same_state(first, second)
    assert first.keys() == alone.keys()
    moved = False
    for name, value in first.items():
        start = alone[name] if name.startswith("start.") else None
        if strategy != "fsdp2":  # whose first batch goes through with inputs in float
            assert torch.allclose(value.float(), alone[name].float(), rtol=2e-3, atol=2e-3), name
        if start is not None:
            end = first[name.removeprefix("start.")]
            trains = name.startswith("start.head.") if what == "head" else "fake_quant" in name
            assert trains or torch.equal(end, value), name
            moved |= not torch.equal(end, value)
    assert moved
