from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.block_ap import TrainedGrid, apply_block_ap
from lightning_quant.grids import minmax_qparams, nearest
from lightning_quant.numerics import dequantize, from_groups, qrange, quantize, to_groups
from lightning_quant.spec import QuantSpec
from tests.algorithms.test_autoround import SPECS
from tests.algorithms.test_gptq import MODELS, logits
from tests.algorithms.units import make_unit, unit_error

IDS = [spec.label.replace(" ", "-") for spec in SPECS]


def made(spec: QuantSpec, columns: int = 60) -> tuple[TrainedGrid, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    weight = torch.randn(8, columns)
    qparams = minmax_qparams(weight, spec)
    return TrainedGrid(weight, *qparams, spec), weight, qparams


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_it_starts_at_nearest_and_stays_on_the_grid(spec: QuantSpec) -> None:
    learned, weight, qparams = made(spec)
    assert torch.allclose(learned(), nearest(weight, *qparams, spec), atol=1e-5)
    for _ in range(20):
        learned.step(torch.randn(8, 60), (0.2, 0.05, 0.3))
    rounded, scale, zero_point = learned.result()
    scale, zero_point = scale.reshape(qparams[0].shape), zero_point.reshape(qparams[1].shape).int()
    assert not torch.equal(scale, qparams[0])
    assert spec.symmetric == torch.equal(zero_point, qparams[1])
    assert torch.allclose(dequantize(quantize(rounded, scale, zero_point, spec), scale, zero_point, spec), rounded, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_step_is_that_of_autograd_and_torchs_adam(spec: QuantSpec) -> None:
    """Equations 1 and 2 with straight-through rounding, differentiated by autograd."""
    learned, weight, (scale, zero_point) = made(spec)
    unit = scale.reshape(-1, 1)
    codes = (to_groups(weight, spec) / unit).requires_grad_()
    factor, zero = torch.full_like(unit, 0.8, requires_grad=True), zero_point.reshape(-1, 1).float().requires_grad_()
    learned.factor.fill_(0.8)  # so that some are clipped
    rates = (0.05, 0.01, 0.02)
    groups = [{"params": [value], "lr": rate} for value, rate in zip((codes, factor, zero), rates)]
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    low, high = qrange(spec)
    for _ in range(5):
        grad = torch.randn(8, 60)
        through = lambda x: x + (x.round() - x).detach()  # noqa: E731
        level = (through(codes / factor) + through(zero)).clamp(low, high)
        rounded = from_groups((level - through(zero)) * factor * unit, weight.shape, spec)
        assert torch.allclose(learned(), rounded, atol=1e-5)
        optimizer.zero_grad()
        (rounded * grad).sum().backward()
        if spec.symmetric:
            zero.grad = None
        for mine, theirs in zip(learned.gradients(grad), (codes.grad, factor.grad, zero.grad)):
            assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-4)
        optimizer.step()
        learned.step(grad, rates)
        for mine, theirs in zip((learned.codes, learned.factor, learned.zero), (codes, factor, zero)):
            assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "blocks"])
def test_models_come_closer_to_the_float_one(name: str) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = []
    for algorithms in ([], ["block_ap"]):
        options = {name: {"iterations": 40} for name in algorithms}
        recipe = lq.Recipe("w2a16", group_size=16, algorithms=algorithms, algorithm_options=options)
        qmodel = lq.quantize(model, recipe, batches)
        errors.append(sum((logits(qmodel, batch) - logits(model, batch)).square().sum().item() for batch in batches))
    assert errors[1] < (0.5 if name != "blocks" else 1.0) * errors[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_a_unit_ends_nearer_and_never_farther_than_it_began() -> None:
    errors = {}
    for rate in (None, 1.0):  # with a rate of a whole code nothing is learned, and the start is taken
        torch.manual_seed(0)
        layers, data = [nn.Linear(16, 32), nn.Linear(32, 16)], [torch.randn(64, 3) @ torch.randn(3, 16) for _ in range(4)]
        unit = make_unit(layers, data, lq.Recipe("w3a16", group_size=16).scheme)
        errors["start"] = unit_error(unit)
        apply_block_ap(unit, iterations=60, rate=rate, dtype=None)
        errors[rate] = unit_error(unit)
    assert errors[None] < 0.8 * errors["start"]
    assert errors[1.0] <= 1.001 * errors["start"]


def test_static_activations_are_quantized_while_it_learns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    errors = []
    for algorithms in ([], ["block_ap"]):
        qnet = lq.quantize(net, lq.Recipe("w4a4", edges=None, algorithms=algorithms), data)
        errors.append(sum((qnet(x) - net(x)).square().sum().item() for x in data))
    assert errors[1] < errors[0]
