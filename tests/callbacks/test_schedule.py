from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_quant as lq
from lightning_quant.calibration import quantizers, set_bits, set_flags, set_share
from lightning_quant.methods import METHODS
from lightning_quant.nn import FakeModule
from lightning_quant.surgery import convert, fake_modules, prepare
from tests.digits import Classifier, Digits, accuracy, trainer

WIDTHS: dict[int | float, int] = {0: 8, 1: 4, 0.75: 2}
LOW = lq.Recipe("w2a2", edges=None)


class Watch(L.Callback):
    """What quantizers are like at the start and at the end of each training batch; listed after QATCallback."""

    def __init__(self) -> None:
        self.bits: list[set[int]] = []
        self.active: list[tuple[bool, bool]] = []  # weights, activations
        self.fresh: list[bool] = []  # whether scales of weights are those of the weights as they are
        self.ranges: list[tuple[bool, bool]] = []  # of activations, at the start and at the end

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        parts = list(quantizers(module))
        self.bits.append({part.spec.bits for part in parts})
        weights = [(part, fake) for fake in fake_modules(module).values() for _, part in fake.quantizers() if part.is_weight]
        expected = [(part.scale, part.measure(fake.effective_weight("weight"))[0]) for part, fake in weights]
        self.fresh.append(all(torch.equal(scale, new) for scale, new in expected))
        self._start = all(part.has_range for part in parts if not part.is_weight)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        parts = list(quantizers(module))
        activations = [part for part in parts if not part.is_weight]
        self.active.append((all(part.quantizing for part in parts if part.is_weight), all(part.quantizing for part in activations)))
        self.ranges.append((self._start, all(part.has_range for part in activations)))


@pytest.mark.parametrize("method", METHODS)
def test_widths_fall_and_ranges_start_anew(method: str, trained: Classifier) -> None:
    watch = Watch()
    trained.hparams.lr = 1e-4
    callback = lq.QATCallback(LOW, method=method, bits=WIDTHS, freeze_observers_at=0.9)  # type: ignore[arg-type]
    host = trainer(4, callback, watch, limit_train_batches=3)
    host.fit(trained, datamodule=Digits())
    assert watch.bits == [{8}] * 3 + [{4}] * 6 + [{2}] * 3
    for batch in (3, 9):
        assert watch.fresh[batch]
        learns = METHODS[method].activation.fake is not None
        assert watch.ranges[batch] == (not learns, True)
        assert not METHODS[method].weight.fake or not watch.fresh[batch + 1]
    assert all(end for _, end in watch.ranges)
    qmodel, x = host.quantize(), torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(qmodel(x).argmax(1), trained.eval()(x).argmax(1))


def test_at_the_end_nothing_is_wide_but_what_the_recipe_has(trained: Classifier) -> None:
    watch = Watch()
    trainer(2, lq.QATCallback("w2a2", bits={0: 4, 1: 2}), watch, limit_train_batches=1).fit(trained, datamodule=Digits())
    assert watch.bits == [{8, 4}, {8, 2}]
    assert all(part.spec == part.final_spec for part in quantizers(trained))


def test_widths_after_frozen_observers(trained: Classifier) -> None:
    """Ranges that were frozen at the width before are found anew, once."""
    watch = Watch()
    callback = lq.QATCallback(LOW, bits={0: 8, 2: 2}, freeze_observers_at=1)
    trainer(3, callback, watch, limit_train_batches=2).fit(trained, datamodule=Digits())
    assert watch.fresh == [True, False, True, False, True, False]  # at the start, when they are frozen, and at the switch


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_before_the_last_width_a_model_is_evaluated_as_it_is_and_not_packed(
    method: Any, trained: Classifier, tmp_path: Path
) -> None:
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = lq.QATCallback("w2a2", method=method, bits={0: 8, 1: 2})
    host = trainer(2, callback, keeper, limit_train_batches=4, enable_checkpointing=True)
    host.fit(trained, datamodule=Digits())
    seen = {epoch: lq.load_from_checkpoint(Classifier, tmp_path / f"epoch={epoch}.ckpt") for epoch in (0, 1)}
    assert {part.spec.bits for part in quantizers(seen[0])} == {8}
    assert accuracy(seen[0]) > accuracy(seen[1])
    again = trainer(2, lq.QATCallback("w2a2", method=method, bits={0: 8, 1: 2}))
    found = again.validate(Classifier(), datamodule=Digits(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
    assert found[0]["accuracy"] * 100 == pytest.approx(accuracy(seen[0]), abs=0.21)
    with pytest.raises(RuntimeError, match=r"net\.conv1: its training is at 8 bits so far, and its recipe has 2"):
        convert(seen[0])
    convert(seen[1])
    seen[0].load_state_dict(Classifier().state_dict(), strict=False)  # a float checkpoint: the recipe's widths
    assert {part.spec.bits for part in quantizers(seen[0])} == {8, 2}


def test_a_second_fit_starts_at_the_first_width(trained: Classifier) -> None:
    watch = Watch()
    for _ in range(2):
        trainer(2, lq.QATCallback(LOW, method="lsq", bits={0: 8, 1: 2}), watch, limit_train_batches=1).fit(
            trained, datamodule=Digits()
        )
    assert watch.bits == [{8}, {2}] * 2
    assert watch.fresh[2]


def test_averages_take_part(trained: Classifier) -> None:
    scales: list[tuple[set[int], bool]] = []

    class Averages(L.Callback):
        def on_validation_end(self, host: Any, module: Any) -> None:
            average = host.callbacks[1]._average_model
            pairs = list(zip(quantizers(module), quantizers(average), strict=True))
            close = all(torch.allclose(mine.scale, theirs.scale, rtol=0.5) for mine, theirs in pairs)
            scales.append(({theirs.spec.bits for _, theirs in pairs}, close))

    trained.hparams.lr = 1e-4
    callback = lq.QATCallback(LOW, method="lsq", bits={0: 8, 1: 4, 2: 2})
    host = trainer(3, callback, EMAWeightAveraging(decay=0.9), Averages(), limit_train_batches=4, num_sanity_val_steps=0)
    host.fit(trained, datamodule=Digits())
    assert scales == [({8}, True), ({4}, True), ({2}, True)]
    host.quantize()


@pytest.mark.parametrize("options", [{"bits": {0: 8, 2: 4}}, {"quantize_activations_from": 2}], ids=["bits", "activations"])
def test_monitors_start_afresh(options: dict[str, Any], trained: Classifier) -> None:
    best: list[float] = []

    class Falling(Classifier):
        def on_validation_epoch_end(self) -> None:
            self.log("score", 1.0 - 0.1 * self.current_epoch)

    class Best(L.Callback):
        def on_train_epoch_end(self, host: Any, module: Any) -> None:
            best.append(round(float(stopping.best_score), 3))

    stopping = EarlyStopping("score", mode="max", patience=9)
    callbacks = [lq.QATCallback(lq.Recipe("w4a4", edges=None), **options), Best(), stopping]
    trainer(4, *callbacks, limit_train_batches=1, num_sanity_val_steps=0).fit(Falling(), datamodule=Digits())
    assert best[1:] == [1.0, -torch.inf, 0.8]  # each before that epoch's own


@pytest.mark.parametrize("method", METHODS)
def test_activations_follow_later(method: str, trained: Classifier) -> None:
    watch = Watch()
    callback = lq.QATCallback(LOW, method=method, quantize_from=1, quantize_activations_from=0.5)  # type: ignore[arg-type]
    host = trainer(4, callback, watch, limit_train_batches=2)
    host.fit(trained, datamodule=Digits())
    assert watch.active == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 4
    assert watch.ranges[2:] == [(True, True)] * 6  # observed in the float phase
    host.quantize()


def test_activations_that_never_followed_warn(trained: Classifier, tmp_path: Path) -> None:
    host = trainer(1, lq.QATCallback("w8a8", quantize_activations_from=5), limit_train_batches=2)
    host.fit(trained, datamodule=Digits())
    with pytest.warns(UserWarning, match="fake quantization of activations never started.*quantize_activations_from"):
        host.quantize()
    host.save_checkpoint(tmp_path / "end.ckpt")
    again = lq.load_from_checkpoint(Classifier, tmp_path / "end.ckpt")
    assert all(part.quantizing == part.is_weight for part in quantizers(again))


def test_recurrent_layers_follow_widths_and_delays() -> None:
    model = nn.Sequential(nn.LSTM(8, 16))
    prepare(model, lq.Recipe("w4a8-dynamic", group_size=8))
    x = torch.randn(5, 2, 8)
    outputs = {}
    for bits, activations in ((8, True), (8, False), (4, True), (4, False)):
        set_bits(model, bits)
        set_flags(model.eval(), quantizing=True, activations=activations)
        outputs[bits, activations] = model[0](x)[0]
    packed = convert(model)
    set_flags(model, quantizing=True)
    assert torch.allclose(packed[0](x)[0], outputs[4, True], atol=1e-5)
    exact = nn.LSTM(8, 16)
    exact.load_state_dict(
        {name: value for name, value in model[0].state_dict().items() if "fake" not in name and "extra" not in name}
    )
    error = {key: (value - exact(x)[0]).square().mean().item() for key, value in outputs.items()}
    assert error[8, False] < error[8, True] < error[4, True]
    assert error[8, False] < error[4, False]


# --- noise --------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 64)), (4, 64)),
    "conv-bn": (lambda: nn.Sequential(nn.Conv2d(8, 32, 3, bias=False), nn.BatchNorm2d(32)), (4, 8, 6, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(64, 64)), (4, 64)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_each_weight_is_quantized_in_training_only(method: str, layer: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = prepare(make(), lq.Recipe(None, schemes={"0": lq.Recipe("w2a16", symmetric=True).scheme}), method=method)
    set_flags(model.train(), following=True, quantizing=True)
    fake: Any = model[0]
    assert isinstance(fake, FakeModule)
    everything, weight = fake.fake_weight(), fake.effective_weight("weight")
    set_share(model, 0.3)
    torch.manual_seed(1)
    mixed = fake.fake_weight()
    chosen = mixed == everything
    assert torch.equal(torch.where(chosen, everything, weight), mixed)
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(fake.fake_weight(), mixed)
    torch.manual_seed(1)
    assert torch.equal(fake.fake_weight(), mixed)
    mixed.square().sum().backward()
    assert all(value.grad is not None for value in fake.weight_fake_quant.parameters())
    assert fake.weight.grad.ne(0).float().mean() > 0.7  # what is not quantized has its gradient wherever it lies
    x = torch.randint(0, 64, shape) if layer == "embedding" else torch.rand(shape)
    state = torch.get_rng_state()
    expected = model.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(convert(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fake.fake_weight(), everything) or layer == "conv-bn"


def test_noise_lasts_for_the_fit(trained: Classifier) -> None:
    seen: list[set[float]] = []

    class Shares(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append({part.share for part in quantizers(trained) if part.is_weight})

    host = trainer(2, lq.QATCallback("w4a4", quant_noise=0.5), Shares(), limit_train_batches=2)
    host.fit(trained, datamodule=Digits())
    assert seen == [{0.5}] * 4
    assert {part.share for part in quantizers(trained)} == {1.0}
    assert accuracy(host.quantize()) == pytest.approx(accuracy(trained), abs=0.21)


def test_frozen_weights_have_no_noise(trained: Classifier) -> None:
    prepare(trained, "w4a4")
    set_flags(trained, following=True, quantizing=True)
    set_share(trained, 0.5)
    trained.requires_grad_(False)
    fake: Any = fake_modules(trained)["net.conv1"]
    assert torch.equal(fake.fake_weight(), fake.fake_weight())


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": {}}, "from 0 on"),
        ({"bits": 4}, "from 0 on"),
        ({"bits": {1: 4}}, "from 0 on"),
        ({"bits": {0: 9}}, "9 is no width"),
        ({"bits": {0: True}}, "True is no width"),
        ({"bits": {0: 8, -1: 4}}, "time=-1"),
        ({"bits": {0: 8, 1.5: 4}}, "time=1.5"),
        ({"bits": {0: 4, 2: 8}}, "must fall.*4, 8"),
        ({"bits": {0: 8, 0.2: 2, 0.5: 4}}, "must fall.*8, 2, 4"),
        ({"quantize_activations_from": None}, "quantize_activations_from=None"),
        ({"quantize_activations_from": -1}, "quantize_activations_from=-1"),
        ({"quant_noise": 0.0}, "quant_noise=0.0"),
        ({"quant_noise": 1.5}, "quant_noise=1.5"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"QATCallback.*{message}"):
        lq.QATCallback("w4a4", **options)


@pytest.mark.parametrize(
    ("recipe", "bits", "message"),
    [
        ("w4a4", {0: 8, 1: 2}, "ends at 2 bits, and the recipe's narrowest integers have 4: end with 4"),
        ("w2a2", {0: 8, 1: 4}, "ends at 4 bits, and the recipe's narrowest integers have 2: end with 2"),
        ("fp8", {0: 8, 1: 4}, "the recipe has no integers: leave bits out"),
        ("w2a2", {0: 8, 1: 4, 0.2: 2}, "must fall.*8, 2, 4"),
    ],
)
def test_widths_that_do_not_fit_stop_before_anything_is_touched(recipe: str, bits: Any, message: str, trained: Classifier) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(4, lq.QATCallback(recipe, bits=bits)).fit(trained, datamodule=Digits())
    assert not fake_modules(trained)


def test_widths_that_do_not_fit_a_prepared_model(trained: Classifier) -> None:
    prepare(trained, "w4a4")
    with pytest.raises(MisconfigurationException, match="end with 4"):
        trainer(2, lq.QATCallback("w4a4", bits={0: 8, 1: 3})).fit(trained, datamodule=Digits())


def test_a_fraction_of_an_endless_training_raises() -> None:
    with pytest.raises(MisconfigurationException, match=r"bits at 0.5=0.5 .*has no end"):
        trainer(-1, lq.QATCallback("w4a4", bits={0: 8, 0.5: 4})).fit(Classifier(), datamodule=Digits())


def test_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = lq.QATCallback("w4a4", bits={0: 8, 1: 4}, quantize_activations_from=1)
    trainer(2, callback, logger=logger, limit_train_batches=1).fit(Classifier(), datamodule=Digits())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    found = [(float(row["quant/bits"]), float(row["quant/activations"])) for row in rows if row.get("quant/bits")]
    assert found == [(8, 0), (4, 1)]
