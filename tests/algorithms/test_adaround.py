from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.adaround import SoftRounding, apply_adaround
from lightning_quant.blocks import Unit
from lightning_quant.grids import minmax_qparams, nearest
from lightning_quant.numerics import calc_qparams, qrange, to_groups
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.statistics import weight_matrix
from lightning_quant.surgery import packed_modules
from tests.algorithms.units import make_unit, unit_error

INPUT8 = QuantSpec(8, symmetric=False, granularity="tensor")
SPECS = [
    QuantSpec(4),
    QuantSpec(3, symmetric=False),
    QuantSpec(4, granularity="tensor"),
    QuantSpec(2, granularity="group", group_size=16, symmetric=False),
]
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(24, 12), lambda: torch.randn(64, 24) @ torch.randn(24, 24)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(8, 6, 6, 6) + torch.randn(8, 6, 1, 1)),
}


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> bool:
    rows = to_groups(weight, spec)
    codes = rows / scale.reshape(-1, 1) + zero_point.reshape(-1, 1)
    low, high = qrange(spec)
    return bool(((codes - codes.round()).abs() < 1e-3).all() and (codes.round() >= low).all() and (codes.round() <= high).all())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label.replace(" ", "-"))
def test_starts_as_the_float_weight_and_ends_next_to_it_on_the_grid(spec: QuantSpec) -> None:
    weight = torch.randn(6, 40)
    scale, zero_point = minmax_qparams(weight, spec)
    learned = SoftRounding(weight, scale, zero_point, spec, rate=0.1)
    rows, (low, high) = to_groups(weight, spec), qrange(spec)
    codes = rows / scale.reshape(-1, 1) + zero_point.reshape(-1, 1)
    inside = (codes >= low) & (codes <= high)  # the others are clipped
    assert torch.allclose(to_groups(learned(), spec)[inside], rows[inside], atol=1e-4)
    for _ in range(30):
        learned.step(torch.randn(6, 40), None, 1.0)
    rounded, *qparams = learned.result()
    assert on_grid(rounded, *qparams, spec)
    step = (rows - to_groups(rounded, spec)).abs() / scale.reshape(-1, 1)
    assert step[inside].max() < 1.001  # up or down, and no further


def test_the_pull_alone_decides_every_weight_as_rounding_to_nearest_would() -> None:
    spec, weight = QuantSpec(4), torch.randn(4, 50)
    scale, zero_point = calc_qparams(weight.amin(1, True), weight.amax(1, True), spec)
    learned = SoftRounding(weight, scale, zero_point, spec, rate=0.05)
    for step in range(300):
        learned.step(torch.zeros(4, 50), 20 - 18 * step / 300, 1.0)
    up = learned.up().detach()
    decided = (up < 1e-3) | (up > 1 - 1e-3)
    assert decided.float().mean() > 0.95
    assert torch.allclose(learned.result()[0][decided], nearest(weight, scale, zero_point, spec)[decided], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_output_errors_against_nearest(name: str, bits: int) -> None:
    make, data = LAYERS[name]
    unit = make_unit([make()], [data() for _ in range(4)], QuantScheme(QuantSpec(bits), INPUT8))
    module = unit.modules["0"]
    plain = unit_error(unit)
    apply_adaround(unit)
    spec, qparams = module.scheme.weight, module.weight_fake_quant.qparams()
    assert on_grid(weight_matrix(module), *qparams, spec)
    assert unit_error(unit) < 0.85 * plain


def test_soft_and_hard_rounding_agree_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SoftRounding] = []
    start = SoftRounding.__init__
    monkeypatch.setattr(SoftRounding, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])
    unit = make_unit([nn.Conv2d(8, 16, 3)], [torch.randn(8, 8, 6, 6) for _ in range(4)], QuantScheme(QuantSpec(4), INPUT8))
    apply_adaround(unit)
    up = made[0].up().detach()
    assert ((up < 0.01) | (up > 0.99)).float().mean() > 0.9


def test_scales_of_inputs_are_learned_or_left() -> None:
    scheme = QuantScheme(QuantSpec(4), QuantSpec(3, symmetric=False, granularity="tensor"))
    data = [torch.randn(64, 24) ** 3 for _ in range(4)]  # outliers: the whole range is far too wide
    errors, scales = {}, {}
    for learn in (False, True):
        torch.manual_seed(1)
        unit = make_unit([nn.Linear(24, 12)], data, scheme)
        quantizer = unit.modules["0"].input_fake_quant
        before = quantizer.scale.clone()
        apply_adaround(unit, learn_inputs=learn, input_rate=0.003)
        errors[learn], scales[learn] = unit_error(unit), (quantizer.scale / before).item()
        assert not quantizer.learned
        assert not quantizer.scale.requires_grad
    assert scales[False] == 1
    assert 0.3 < scales[True] < 0.95
    assert errors[True] < errors[False]


def test_one_that_ends_worse_is_rounded_to_nearest() -> None:
    unit = make_unit([nn.Linear(24, 12)], [torch.randn(32, 24)], QuantScheme(QuantSpec(4), INPUT8))
    module = unit.modules["0"]
    plain = nearest(weight_matrix(module), *module.weight_fake_quant.qparams(), module.scheme.weight)
    apply_adaround(unit, iterations=3, rate=50.0)  # each weight flies off to one side
    assert torch.equal(weight_matrix(module), plain)
    assert "rounded to nearest, which comes closer" in unit.notes["0"]


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class ResNet(nn.Module):
    """A stem, two stages with a downsampling convolution between them, a grouped convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(ConvBlock(8), ConvBlock(8))
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.stage2 = nn.Sequential(ConvBlock(8), ConvBlock(8))
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(torch.relu(self.stem(x)))))
        return self.head(self.grouped(x).mean((2, 3)))


def test_a_model_of_chains_and_single_layers_comes_closer_to_the_float_one() -> None:
    model, batches = ResNet().eval(), [torch.randn(8, 3, 10, 10) for _ in range(4)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = {}
    for algorithms in ([], ["adaround"]):
        recipe = lq.Recipe(QuantScheme(QuantSpec(3), INPUT8), algorithms=algorithms)
        if algorithms:
            recipe = lq.Recipe(
                recipe.scheme, algorithms=algorithms, algorithm_options={"adaround": {"iterations": 100, "rate": 0.05}}
            )
        qmodel = lq.quantize(model, recipe, batches)
        with torch.no_grad():
            errors[bool(algorithms)] = sum((qmodel(batch) - model(batch)).square().sum().item() for batch in batches)
    assert errors[True] < 0.8 * errors[False]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    notes = {row.name: row.note for row in lq.summary(qmodel).rows}
    assert set(packed_modules(qmodel)) >= {"stem", "stage1.0.conv1", "down", "stage2.1.conv2", "grouped", "head"}
    assert "adaround: rounded to nearest, not for grouped convolutions" in notes["grouped"]
    assert not any("adaround" in notes[name] for name in ("stem", "stage1.0.conv1", "down", "stage2.1.conv2", "head"))


def test_without_data_it_is_noted() -> None:
    unit = make_unit([nn.Linear(4, 4)], [torch.randn(3, 4)], QuantScheme(QuantSpec(4), INPUT8))
    alone = Unit(unit.name, unit.root, unit.modules, unit.run)
    apply_adaround(alone)
    assert "adaround: rounded to nearest, calibration has not reached it" in alone.notes["0"]
