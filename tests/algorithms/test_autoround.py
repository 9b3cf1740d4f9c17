from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms.autoround import SignedRounding
from lightning_quant.algorithms.reconstruction import autocast_dtype
from lightning_quant.grids import minmax_qparams, nearest
from lightning_quant.numerics import dequantize, quantize
from lightning_quant.spec import QuantSpec
from tests.algorithms.test_gptq import MODELS, logits

SPECS = [
    QuantSpec(4),
    QuantSpec(3, symmetric=False),
    QuantSpec(8, granularity="tensor"),
    QuantSpec(2, granularity="group", group_size=16, symmetric=False),
    QuantSpec(4, signed=False, symmetric=False, granularity="group", group_size=24),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label.replace(" ", "-"))
def test_it_starts_at_nearest_and_stays_on_the_grid(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 60)
    qparams = minmax_qparams(weight, spec)
    learned = SignedRounding(weight, *qparams, spec)
    assert torch.allclose(learned(), nearest(weight, *qparams, spec), atol=1e-5)
    for _ in range(20):
        learned.step(torch.randn(8, 60), 0.05)
    rounded, scale, zero_point = learned.result()
    scale, zero_point = scale.reshape(qparams[0].shape), zero_point.reshape(qparams[1].shape).int()
    assert torch.allclose(dequantize(quantize(rounded, scale, zero_point, spec), scale, zero_point, spec), rounded, atol=1e-5)
    assert (learned.offset.abs() <= 0.5).all()
    assert ((learned.ends >= 0) & (learned.ends <= 1)).all()


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.label.replace(" ", "-"))
def test_gradients_are_those_of_autograd(spec: QuantSpec) -> None:
    """The signs of the offset's and the range's gradients, against a straight-through estimator written with autograd."""
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 40), torch.randn(6, 40)
    learned = SignedRounding(weight, *minmax_qparams(weight, spec), spec)
    learned.ends.fill_(0.8)
    offset = torch.zeros(6, 40, requires_grad=True)
    ends = learned.ends.clone().requires_grad_()
    qmin, qmax = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1

    def through(value: Tensor, rounded: Tensor) -> Tensor:
        return value + (rounded - value).detach()

    if spec.symmetric:
        scale = learned.high * ends[1] / ((qmax - qmin) / 2)
        zero: Any = 0.0
    else:
        low, high = learned.low * ends[0], learned.high * ends[1]
        scale = (high - low) / (qmax - qmin)
        zero = through(qmin - low / scale, (qmin - low / scale).round())
    ratio = weight / scale + offset
    level = (through(ratio, ratio.round()) + zero).clamp(qmin, qmax)
    (((level - zero) * scale) * grad).sum().backward()
    before = learned.offset.clone(), learned.ends.clone()
    learned.step(grad, 0.01)
    assert offset.grad is not None
    assert ends.grad is not None
    moved = before[0] - learned.offset
    assert torch.equal(moved.sign(), offset.grad.sign())
    wanted = ends.grad[1].sign() if spec.symmetric else ends.grad.sign()
    agreed = ((before[1] - learned.ends).sign() == wanted).float().mean()
    assert agreed >= 0.9  # of an asymmetric range the zero point is rounded, which moves what is clipped by half a step


@pytest.mark.parametrize("algorithm", ["autoround", "adaround"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "blocks"])
def test_models_come_closer_to_the_float_one(name: str, algorithm: str) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options: dict[str, Any] = {"iterations": 40 if algorithm == "autoround" else 120}
    errors = []
    for algorithms in ([], [algorithm]):
        recipe = lq.Recipe("w3a16", group_size=16, algorithms=algorithms, algorithm_options=dict.fromkeys(algorithms, options))
        qmodel = lq.quantize(model, recipe, batches)
        errors.append(sum((logits(qmodel, batch) - logits(model, batch)).square().sum().item() for batch in batches))
    assert errors[1] < errors[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_static_activations_are_quantized_while_it_learns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    errors = []
    for algorithms in ([], ["autoround"]):
        qnet = lq.quantize(net, lq.Recipe("w4a4", edges=None, algorithms=algorithms), data)
        errors.append(sum((qnet(x) - net(x)).square().sum().item() for x in data))
    assert errors[1] < errors[0]


def test_dtypes_of_autocast() -> None:
    assert autocast_dtype(None, torch.device("cpu")) is None
    assert autocast_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert autocast_dtype("auto", torch.device("cpu")) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match="'int8' is no floating dtype"):
        autocast_dtype("int8", torch.device("cpu"))
