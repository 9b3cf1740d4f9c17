from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.functional import fake_quantize
from lightning_quant.methods import METHODS
from lightning_quant.numerics import calc_qparams, to_groups
from lightning_quant.spec import QuantSpec
from tests.helpers import FLOAT8, assert_same_state, spec_id

TENSOR = QuantSpec(8, symmetric=False, granularity="tensor")
FLOATS = [*(QuantSpec(8, dtype) for dtype in FLOAT8), QuantSpec(4, "nf4", granularity="group", group_size=16)]


def test_flags_change_no_state():
    quantizer = FakeQuantize(TENSOR)
    keys = list(quantizer.state_dict())
    x = torch.randn(4, 9)
    assert quantizer(x) is x
    quantizer.observing = True
    assert quantizer(x) is x
    quantizer.quantizing = True
    quantizer(x)
    assert list(quantizer.state_dict()) == keys
    assert not list(quantizer.parameters())
    quantizer.observing = quantizer.quantizing = False
    assert quantizer(x) is x


def test_observe_in_float_and_then_quantize():
    quantizer = FakeQuantize(TENSOR)
    batches = torch.randn(3, 4, 9)
    quantizer.observing = True
    for batch in batches:
        quantizer(batch)
    quantizer.observing, quantizer.quantizing = False, True
    got = quantizer(batches[0] * 2)
    want = fake_quantize(batches[0] * 2, *calc_qparams(batches.min()[None], batches.max()[None], TENSOR), TENSOR)
    assert torch.equal(got, want)
    scale, zero_point = quantizer.qparams()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("method", METHODS)
def test_an_observed_weight_has_the_range_of_now(method):
    spec = QuantSpec(4, granularity="group", group_size=16)
    weight = torch.randn(3, 50)
    quantizer = FakeQuantize(spec, weight.shape, axis=0, name="fc.weight", rule=METHODS[method].rule(True, METHODS[method].options))
    assert quantizer.scale.shape == (3, 4)
    quantizer.observe(weight)
    first = quantizer.scale.clone()
    rows = to_groups(weight, spec)
    torch.testing.assert_close(first.flatten(), calc_qparams(rows.amin(1), rows.amax(1), spec)[0])
    quantizer.observing = quantizer.quantizing = True
    quantizer(weight * 2)
    torch.testing.assert_close(quantizer.scale, first * (1 if quantizer.learned else 2))


def test_nan_names_the_tensor():
    quantizer = FakeQuantize(TENSOR, name="block.0.fc.input")
    quantizer.observing = True
    with pytest.raises(ValueError, match=r"block\.0\.fc\.input: 1 of 2 values are nan or inf.*ignore"):
        quantizer(torch.tensor([1.0, torch.nan]))
    weight = FakeQuantize(QuantSpec(), (2, 2), axis=0, name="fc.weight")
    with pytest.raises(ValueError, match=r"fc\.weight: 1 of 4"):
        weight.observe(torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]))
    assert not weight.has_range


def test_without_a_range_there_is_no_quantizing():
    quantizer = FakeQuantize(TENSOR, name="fc.input")
    quantizer.quantizing = True
    with pytest.raises(RuntimeError, match=r"fc\.input: no range was ever observed.*Calibrate.*ignore"):
        quantizer(torch.randn(3))
    with pytest.raises(RuntimeError, match=r"fc\.input"):
        quantizer.qparams()
    quantizer.observing = True
    quantizer(torch.ones(2, 3))
    assert quantizer.has_range


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("observer", ["minmax", "moving_average", "mse"])
def test_state_round_trip(observer, method):
    def fresh():
        return FakeQuantize(TENSOR, observer=observer, rule=METHODS[method].rule(False, METHODS[method].options))

    quantizer = fresh()
    quantizer.observing = True
    quantizer(torch.randn(5, 9))
    quantizer.update_qparams()
    other = fresh()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert_same_state(other.state_dict(), quantizer.state_dict())
    for one in (quantizer, other):
        one.observing, one.quantizing = False, True
    x = torch.randn(7, 9) * 2
    assert torch.equal(other(x), quantizer(x))

    never = fresh()
    never.load_state_dict(fresh().state_dict())
    assert not never.has_range


@pytest.mark.parametrize("method", METHODS)
def test_a_float_checkpoint_resets(method):
    quantizer = FakeQuantize(TENSOR, rule=METHODS[method].rule(False, METHODS[method].options))
    holder = nn.ModuleDict({"fc": nn.Linear(3, 3), "fc_fake_quant": quantizer})
    before = {key: (value.shape, value.dtype) for key, value in holder.state_dict().items()}
    quantizer.observing = True
    quantizer(torch.randn(5, 9) * 100)
    quantizer.update_qparams()
    plain = nn.ModuleDict({"fc": nn.Linear(3, 3)}).state_dict()
    holder.load_state_dict(plain, strict=True)
    assert {key: (value.shape, value.dtype) for key, value in holder.state_dict().items()} == before
    assert not quantizer.has_range
    assert not quantizer.observer.has_data
    quantizer.quantizing = True
    quantizer(torch.tensor([0.0, 1.0]))
    assert quantizer.qparams()[0].item() == pytest.approx(1 / 255)


def test_half_a_state_is_missing_keys():
    quantizer = FakeQuantize(TENSOR)
    state = quantizer.state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match="scale"):
        quantizer.load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casts_keep_the_scale(cast, method):
    for observer in ("minmax", "percentile"):
        quantizer = FakeQuantize(TENSOR, observer=observer, rule=METHODS[method].rule(False, METHODS[method].options))
        quantizer.observing = True
        quantizer(torch.randn(50))
        quantizer.update_qparams()
        before = {key: value.clone() for key, value in quantizer.state_dict().items()}
        cast(quantizer)
        assert quantizer.scale.dtype == torch.float32
        assert_same_state(quantizer.state_dict(), before)
        assert [name for name, _ in quantizer.named_parameters()] == (
            [] if not quantizer.learned else ["scale", "zero_point"] if quantizer.rule.learns_zero_point else ["scale"]
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(copied, method):
    quantizer = FakeQuantize(TENSOR, observer="mse", rule=METHODS[method].rule(False, METHODS[method].options))
    quantizer.observing = quantizer.quantizing = True
    x = torch.randn(50)
    quantizer(x)
    other = copied(quantizer)
    assert torch.equal(other(x), quantizer(x))
    assert (other.observing, other.quantizing, other.has_range, other.spec) == (True, True, True, TENSOR)
    with torch.no_grad():
        other.scale.fill_(9)
    assert quantizer.scale.item() != 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "spec",
    [TENSOR, QuantSpec(8, granularity="token", dynamic=True), QuantSpec(8, "float8_e4m3fn", granularity="tensor")],
    ids=spec_id,
)
def test_the_inputs_dtype_comes_out(spec, dtype):
    for method in METHODS.values():
        quantizer = FakeQuantize(spec, rule=method.rule(False, method.options))
        x = torch.randn(4, 9, dtype=dtype)
        quantizer.observing = True
        quantizer(x)
        quantizer.observing, quantizer.quantizing = False, True
        out = quantizer(x)
        assert out.dtype == dtype
        again = quantizer(x.float())
        assert torch.equal(out, again.to(dtype))


def test_a_learned_activation_learns():
    quantizer = FakeQuantize(QuantSpec(4, symmetric=False, granularity="tensor"), rule=METHODS["lsq"].activation)
    x = torch.randn(16, 8)
    quantizer.observing = quantizer.quantizing = True
    quantizer(x)
    start = quantizer.scale.detach().clone()
    quantizer(x * 100)
    assert torch.equal(quantizer.scale, start)
    (quantizer(x) - x).square().sum().backward()
    assert quantizer.scale.grad.abs().item() > 0
    with torch.no_grad():
        quantizer.scale.neg_()
    assert torch.equal(quantizer.qparams()[0], start)
    assert torch.isfinite(quantizer(x)).all()


def test_a_symmetric_learned_zero_point_is_no_parameter():
    quantizer = FakeQuantize(QuantSpec(4, granularity="tensor"), rule=METHODS["lsq"].activation)
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]
