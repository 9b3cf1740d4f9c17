from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.adaround import apply_adaround
from lightning_quant.algorithms.bias_correction import apply_bias_correction
from lightning_quant.blocks import Unit
from lightning_quant.spec import QuantScheme, QuantSpec
from tests.algorithms.units import make_unit, quantized, unit_error

W3A8 = QuantScheme(QuantSpec(3), QuantSpec(8, symmetric=False, granularity="tensor"))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(24, 12), lambda: torch.rand(64, 24)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.rand(8, 6, 6, 6)),
    "no bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), lambda: torch.rand(8, 6, 6, 6)),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3, bias=False), lambda: torch.rand(8, 6, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2), lambda: torch.rand(8, 6, 6, 6)),
}


def mean_errors(unit: Unit) -> Tensor:
    """Of a single layer's outputs, `[channels]`."""
    axis = getattr(unit.root, "output_axis", -1)
    with quantized(unit):
        errors = [unit.output(index) - unit.targets[index] for index in range(len(unit.calls))]
    return torch.cat([error.movedim(axis, -1).flatten(0, -2) for error in errors]).mean(0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_outputs_goes_away_and_the_error_shrinks(name: str) -> None:
    make, data = LAYERS[name]
    layer = make()
    weight, bias = layer.weight.data, None if layer.bias is None else layer.bias.data
    kept = [None if value is None else value.clone() for value in (weight, bias)]
    unit = make_unit([layer], [data() for _ in range(4)], W3A8)
    before, error = mean_errors(unit), unit_error(unit)
    apply_bias_correction(unit)
    after = mean_errors(unit)
    assert before.abs().max() > 0.01
    assert after.abs().max() < 1e-4 * before.abs().max() + 1e-6
    count = unit.targets[0].numel() * len(unit.calls)
    wanted = error - before.square().mean().item() * count  # the variance is left
    assert unit_error(unit) == pytest.approx(wanted, rel=1e-3)
    assert not unit.notes
    assert torch.equal(weight, kept[0])  # what shares the storage of a parameter keeps its values
    assert bias is None or torch.equal(bias, kept[1])


class Block(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.second = nn.Linear(24, 12, bias=bias)  # runs second
        self.first = nn.Linear(12, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_blocks_come_no_farther_from_the_float_output(bits: int, bias: bool) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        scheme = QuantScheme(QuantSpec(bits), W3A8.input)
        unit = make_unit([Block(bias=bias), Block(bias=bias)], [torch.randn(16, 12) + 1 for _ in range(3)], scheme)
        error = unit_error(unit)
        apply_bias_correction(unit)
        assert unit_error(unit) <= error * (1 + 1e-6)
        assert set(unit.notes) < set(unit.modules)  # not all taken back


def test_a_correction_that_does_harm_is_taken_back_and_noted() -> None:
    unit = make_unit([Block(bias=True), Block(bias=True)], [torch.randn(16, 12) for _ in range(3)], W3A8)
    error, biases = unit_error(unit), [module.bias.detach().clone() for module in unit.modules.values()]
    for name in unit.modules:
        unit.statistics["outputs"][name][:-1] += 1000  # means that the float layer never had
    apply_bias_correction(unit)
    assert unit_error(unit) == pytest.approx(error)
    assert all(torch.equal(module.bias, bias) for module, bias in zip(unit.modules.values(), biases, strict=True))
    assert all("bias_correction: not corrected, the output" in note for note in unit.notes.values())
    assert set(unit.notes) == set(unit.modules)


def test_after_a_rounder() -> None:
    unit = make_unit([nn.Conv2d(6, 8, 3)], [torch.rand(8, 6, 6, 6) for _ in range(4)], W3A8)
    apply_adaround(unit, iterations=50)
    error = unit_error(unit)
    apply_bias_correction(unit)
    assert unit_error(unit) <= error
    assert mean_errors(unit).abs().max() < 1e-5


class Mixed(nn.Module):
    """A stem, blocks, a recurrent layer, a head, and a layer that no data reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 12, bias=False)
        self.layers = nn.Sequential(Block(bias=False), Block(bias=False), Block(bias=False))
        self.rnn = nn.LSTM(12, 12, batch_first=True)
        self.head = nn.Linear(12, 4)
        self.unreached = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.layers(torch.relu(self.stem(x)))))[0])


@pytest.mark.parametrize("rounder", [[], ["gptq"]])
def test_a_model(rounder: list[str], tmp_path: Path) -> None:
    model, batches = Mixed().eval(), [torch.rand(4, 6, 8) for _ in range(4)]
    errors = {}
    for algorithms in (rounder, [*rounder, "bias_correction"]):
        recipe = lq.Recipe(QuantScheme(QuantSpec(3)), algorithms=algorithms)
        qmodel = lq.quantize(model, recipe, batches)
        with torch.no_grad():
            outputs = [qmodel(batch) for batch in batches]
        errors[len(algorithms)] = sum(
            (one - model(batch)).square().sum().item() for one, batch in zip(outputs, batches, strict=True)
        )
    if not rounder:  # what gptq does well leaves little of a mean
        assert errors[1] < 0.9 * errors[0]
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    assert "bias_correction: not corrected, it has more than one weight" in notes["rnn"]
    assert "bias_correction: not corrected, calibration has not reached it" in notes["unreached"]
    assert "bias_correction" not in notes["stem"]
    assert qmodel.stem.bias is not None
    lq.save_quantized(qmodel, tmp_path)
    loaded = lq.load_quantized(Mixed(), tmp_path)
    with torch.no_grad():
        assert all(torch.equal(loaded(batch), one) for batch, one in zip(batches, outputs, strict=True))


def test_a_resumed_run_has_the_biases_of_the_first(tmp_path: Path) -> None:
    model, batches = Mixed().eval(), [torch.rand(4, 6, 8) for _ in range(4)]
    recipe = lq.Recipe(QuantScheme(QuantSpec(3)), algorithms=["bias_correction"])
    first = lq.quantize(model, recipe, batches, work_dir=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    files[-1].unlink()
    again = lq.quantize(model, recipe, batches, work_dir=tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    assert "layers.0.first.bias" in again.state_dict()


def test_after_a_transform_the_means_are_those_of_the_rescaled_layers() -> None:
    torch.manual_seed(3)
    layers = [Block(bias=True) for _ in range(3)]
    for layer in layers:  # channels far apart: something to rescale
        layer.first.weight.data *= torch.logspace(-1, 1, 24)[:, None]
        layer.second.weight.data /= torch.logspace(-1, 1, 24)
    model, batches = nn.Sequential(*layers).eval(), [torch.rand(16, 12) for _ in range(3)]
    recipe = lq.Recipe(W3A8, algorithms=["smoothquant", "bias_correction"], algorithm_options={"smoothquant": {"alpha": 0.1}})
    qmodel = lq.quantize(model, recipe, batches)
    means: dict[str, list[Tensor]] = {}
    for net in (model, qmodel):
        for name in ("0.first", "0.second"):
            see = lambda _, args, output, name=name: means.setdefault(name, []).append(output.mean(0))  # noqa: E731
            net.get_submodule(name).register_forward_hook(see)
        with torch.no_grad():
            net(torch.cat(batches))
    scale = means["0.first"][0] / means["0.first"][1]
    assert scale.max() / scale.min() > 3  # it was rescaled
    assert torch.allclose(means["0.second"][0], means["0.second"][1], atol=1e-4)
    assert not any("bias_correction" in row.note for row in lq.summary(qmodel).rows)
