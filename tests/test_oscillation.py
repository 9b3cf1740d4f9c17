"""Oscillating weights are counted, held and drawn to their codes, and all of it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibration import quantizers, set_flags
from lightning_quant.methods import METHODS
from lightning_quant.numerics import quantize
from lightning_quant.oscillation import Freezing, add_terms, advance, dampening, start_track
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.surgery import convert, fake_modules, packed_modules, prepare
from tests.digits import Classifier, Digits, trainer
from tests.helpers import assert_close

PLAIN = [name for name, method in METHODS.items() if method.weight.transform is None]


def own_track(sequence: np.ndarray, threshold: float, momentum: float = 0.01) -> tuple[float, bool, int]:
    """The paper's algorithm 1 for one weight: frequency, frozen, code."""
    frequency, average, before, direction, frozen = 0.0, float(sequence[0]), int(sequence[0]), 0, False
    for code in sequence[1:].tolist():
        code = before if frozen else code
        move = int(np.sign(code - before))
        frequency = momentum * (move != 0 and direction != 0 and move != direction) + (1 - momentum) * frequency
        average = momentum * code + (1 - momentum) * average
        direction = move or direction
        before = code
        if frequency > threshold and not frozen:
            frozen, before = True, round(average)
    return frequency, frozen, before


def test_tracks_follow_the_papers_algorithm() -> None:
    steps = np.random.default_rng(0).integers(-3, 4, (40, 60)) * (np.random.default_rng(1).random((40, 60)) < 0.2)
    steps[:, ::2] = np.random.default_rng(2).integers(-3, 4, (40, 1))  # half of them jump back all the time
    for threshold in (0.001, 0.05, 0.2):
        codes = torch.from_numpy(steps).to(torch.int8)
        track = start_track(codes[:, 0])
        for step in range(1, codes.shape[1]):
            advance(track, codes[:, step], threshold)
        for row, sequence in enumerate(steps):
            frequency, frozen, code = own_track(sequence, threshold)
            assert track["frequency"][row].item() == pytest.approx(frequency, abs=1e-5)
            assert (track["frozen"][row].item(), track["codes"][row].item()) == (frozen, code)
    assert 0 < track["frozen"].float().mean() < 1


def prepared(kind: str, method: str) -> tuple[nn.Module, Tensor]:
    bits = METHODS[method].bits or 3
    if kind == "attention":
        model, x = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True)), torch.randn(4, 5, 12)
    else:
        model = nn.Sequential(nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6))
        x = torch.randn(8, 5, 6, 6)
        nn.init.normal_(model[1].weight)  # some are negative, and turn the folded weight round
    granularity: Any = "tensor" if kind == "tensor" else "channel"
    prepare(model, Recipe(QuantScheme(QuantSpec(bits, granularity=granularity))), method=method, call=lambda: model(x))
    set_flags(model, observing=True, following=True, quantizing=True)
    return model, x


def weights_of(model: nn.Module) -> list[tuple[Any, str]]:
    return [(fake, name) for fake in fake_modules(model).values() for name in fake.weight_axes(fake)]


@pytest.mark.parametrize("kind", ["conv", "tensor", "attention"])
@pytest.mark.parametrize("method", PLAIN)
def test_what_is_frozen_keeps_its_code(kind: str, method: str) -> None:
    """Weights are shaken; a held one has the same code ever after, whatever the scale does, and that is what is packed."""
    model, x = prepared(kind, method)
    model(x)
    freezing = Freezing(1e-3)
    freezing.step(model, 1.0)
    held: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(8):
        with torch.no_grad():
            for weight in (fake.get_weight(name) for fake, name in weights_of(model)):
                weight += torch.randn_like(weight) * weight.std() * 0.3
            for quantizer in quantizers(model):
                if quantizer.learned:
                    quantizer.scale.mul_(1.05)
        freezing.step(model, 1.0)
        for key, (frozen, codes) in held.items():
            track = freezing.tracks[key]
            assert torch.equal(track["codes"][frozen], codes[frozen])
            assert track["frozen"][frozen].all()
        held = {key: (track["frozen"].clone(), track["codes"].clone()) for key, track in freezing.tracks.items()}
    assert 0.05 < freezing.share() < 1
    for fake, name in weights_of(model.eval()):
        quantizer = getattr(fake, f"{name}_fake_quant")
        if quantizer.learned:  # else the range has followed what was put back
            codes = quantize(*fake.weight_on_grid(name), quantizer.spec, quantizer.axis)
            track = next(track for key, track in freezing.tracks.items() if key.endswith(f"{quantizer.name}"))
            assert torch.equal(codes[track["frozen"]], track["codes"][track["frozen"]])
    packed = convert(model)
    assert packed_modules(packed)
    with torch.no_grad():
        assert_close(packed(x), model(x))


@pytest.mark.parametrize("kind", ["conv", "tensor", "attention"])
@pytest.mark.parametrize("method", PLAIN)
def test_dampening_is_the_squared_distance_to_what_is_packed(kind: str, method: str) -> None:
    model, x = prepared(kind, method)
    model(x)
    for fake, name in weights_of(model):
        quantizer = getattr(fake, f"{name}_fake_quant")
        whole = next(value for key, value in fake.named_parameters() if key in (name, "in_proj_weight"))
        (gradient,) = torch.autograd.grad(dampening(fake, name, quantizer), [whole])
        target = fake.latent_weight(name, quantizer(fake.effective_weight(name)))
        (expected,) = torch.autograd.grad((target.detach() - fake.get_weight(name)).square().sum(), [whole])
        inside = gradient != 0
        least = 0.2 if whole.shape != fake.get_weight(name).shape else 0.5
        assert inside.float().mean() > least * (0.6 if method == "binary" else 1.0)  # whose scale is the mean magnitude
        torch.testing.assert_close(gradient[inside], expected[inside], rtol=1e-3, atol=1e-5)


def test_terms_reach_the_gradients_of_their_optimizer_only() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    prepare(model, Recipe("w4a4", edges=None), method="pact", method_options={"regularization": 0.5})
    set_flags(model, observing=True, following=True, quantizing=True)
    model(torch.randn(4, 6)).sum().backward()
    before = {name: value.grad.clone() for name, value in model.named_parameters()}
    add_terms(model, torch.optim.SGD(model[0].parameters(), 0.1), 0.0)
    for name, value in model.named_parameters():
        expected = value.detach() if name == "0.input_fake_quant.scale" else torch.zeros(())
        torch.testing.assert_close(value.grad, before[name] + expected)


def test_options_are_checked() -> None:
    for options, message in (
        ({"oscillation": "shake"}, "freeze, dampen"),
        ({"oscillation": "freeze", "method": "dorefa"}, "'dorefa' transforms"),
        ({"oscillation_threshold": 0.0}, "threshold=0.0"),
        ({"oscillation_strength": float("inf")}, "strength=inf"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            lq.QATCallback("w4a4", **options)
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    host = trainer(1, lq.QATCallback("w4a4", oscillation="dampen"), strategy=strategy)
    with pytest.raises(MisconfigurationException, match=r"oscillation='dampen': under ModelParallelStrategy"):
        lq.QATCallback("w4a4", oscillation="dampen").setup(host, Classifier(), "fit")


class Shares(L.Callback):
    def __init__(self) -> None:
        self.distances: list[float] = []

    def on_train_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            fakes = fake_modules(module).values()
            found = [(fake.fake_weight() - fake.effective_weight("weight")).square().mean().item() for fake in fakes]
        self.distances.append(sum(found))


@pytest.mark.parametrize("method", PLAIN)
def test_in_training(trained: Classifier, method: str) -> None:
    recipe = "w2a2" if METHODS[method].bits == 2 else "w3a3"
    state, results = {key: value.clone() for key, value in trained.state_dict().items()}, {}
    for oscillation in (None, "freeze", "dampen"):
        model = Classifier(lr=2e-3)
        model.load_state_dict(state)
        shares = Shares()
        callback = lq.QATCallback(
            recipe, method=method, oscillation=oscillation, oscillation_threshold=0.005, oscillation_strength=1.0
        )
        host = trainer(2, callback, shares)
        host.fit(model, datamodule=Digits())
        results[oscillation] = shares.distances[0]
        tracks = callback.state_dict()["tracks"]
        assert bool(tracks) == (oscillation == "freeze")
        if tracks:
            assert sum(int(track["frozen"].sum()) for track in tracks.values()) > 0
        x = torch.rand(16, 1, 8, 8)
        assert torch.equal(host.quantize()(x).argmax(1), model.eval()(x).argmax(1))
    assert results["dampen"] < 0.7 * results[None]


def test_the_state_of_a_checkpoint_loads_anywhere(tmp_path: Path) -> None:
    """A checkpoint with tracks validates under another callback, and without one in training it starts counting anew."""
    host = trainer(1, lq.QATCallback("w4a4", oscillation="freeze"), limit_train_batches=3)
    host.fit(Classifier(), datamodule=Digits())
    host.save_checkpoint(tmp_path / "last.ckpt")
    trainer(1, lq.QATCallback("w4a4")).validate(
        Classifier(), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert lq.load_from_checkpoint(Classifier, tmp_path / "last.ckpt") is not None
