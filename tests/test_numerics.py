from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_quant.numerics import (
    calc_qparams,
    code_dtype,
    dequantize,
    dynamic_qparams,
    from_groups,
    qparams_shape,
    qrange,
    quantize,
    to_groups,
)
from lightning_quant.spec import QuantSpec
from tests.helpers import FLOAT8, limits, own_codes, own_qparams, own_values, segments, spec_id

FORMATS = [(bits, signed, symmetric) for bits in range(2, 9) for signed in (True, False) for symmetric in (True, False)]
GRANULARITIES = [("tensor", None), ("channel", None), ("group", 16), ("group", 1), ("group", 64), ("token", None)]
GROUPED = [
    QuantSpec(granularity="tensor"),
    QuantSpec(),
    QuantSpec(4, granularity="group", group_size=16),
    QuantSpec(4, granularity="group", group_size=7),
    QuantSpec(4, "nf4", granularity="group", group_size=16),
]


def rows_qparams(x: torch.Tensor, spec: QuantSpec, axis: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.dynamic:
        return dynamic_qparams(x, spec, axis)
    rows = to_groups(x, spec, axis)
    return calc_qparams(rows.amin(1), rows.amax(1), spec)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_integers_are_those_of_an_independent_computation(bits, signed, symmetric, granularity, group_size):
    spec = QuantSpec(bits, "int", signed, symmetric, granularity, group_size, dynamic=granularity == "token")
    x = torch.randn(5, 50) * torch.logspace(-3, 3, 5)[:, None] + 0.3
    scale, zero_point = rows_qparams(x, spec, -1 if spec.dynamic else 0)
    codes = quantize(x, scale, zero_point, spec, -1 if spec.dynamic else 0)
    values = dequantize(codes, scale, zero_point, spec, -1 if spec.dynamic else 0)
    assert codes.dtype == code_dtype(spec)
    assert qrange(spec) == limits(spec)

    flat, parts = x.flatten().numpy(), list(segments(5, 50, spec))
    assert len(parts) == scale.numel()
    for part, one_scale, one_zero_point in zip(parts, scale.flatten().tolist(), zero_point.flatten().tolist()):
        own_scale, own_zero_point = own_qparams(flat[part], spec)
        assert one_scale == pytest.approx(own_scale, rel=3e-7)
        assert one_zero_point == own_zero_point
        own = own_codes(flat[part], one_scale, own_zero_point, spec)
        np.testing.assert_array_equal(codes.flatten().numpy()[part].astype(np.int64) - limits(spec)[0], own)
        np.testing.assert_allclose(
            values.flatten().numpy()[part], own_values(own, one_scale, own_zero_point, spec), rtol=2e-7, atol=0
        )


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_channel_may_be_any_dimension(axis, symmetric):
    x = torch.randn(4, 6, 5)
    for spec in (QuantSpec(4, symmetric=symmetric), QuantSpec(4, symmetric=symmetric, granularity="group", group_size=7)):
        moved = x.movedim(axis, 0).contiguous()
        got = quantize(x, *rows_qparams(x, spec, axis), spec, axis)
        want = quantize(moved, *rows_qparams(moved, spec), spec)
        assert torch.equal(got.movedim(axis, 0), want)
        assert got.shape == x.shape


@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_round_trips_equal_torchs_fused_ops_to_the_bit(bits, signed, symmetric):
    qmin, qmax = limits(QuantSpec(bits, signed=signed))
    for step in (0.25, 0.1):
        ties = (torch.arange(-300, 300) + 0.5) * step
        x = torch.cat([ties, torch.randn(600) * 3 * step * qmax]).reshape(6, -1)
        spec = QuantSpec(bits, "int", signed, symmetric, "tensor")
        zero_point = torch.tensor([0 if symmetric else (qmin + qmax) // 2 + 1], dtype=torch.int32)
        scale = torch.tensor([step])
        got = dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)
        assert torch.equal(got, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax))

        spec = QuantSpec(bits, "int", signed, symmetric)
        scale = step * torch.linspace(0.5, 2, 6)
        zero_point = zero_point.expand(6).contiguous()
        got = dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)
        assert torch.equal(got, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, qmin, qmax))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_equals_torchs_cast(dtype):
    torch_dtype, bound = FLOAT8[dtype]
    every = torch.arange(256, dtype=torch.uint8).view(torch_dtype).float()
    every = every[every.isfinite()].sort().values
    x = torch.cat([every, (every[1:] + every[:-1]) / 2, torch.randn(500) * 10, torch.tensor([1e9, -1e9])])
    spec = QuantSpec(8, dtype, granularity="tensor")
    for scale in (1.0, 0.125):
        args = (torch.tensor([scale]), torch.tensor([0]), spec)
        codes = quantize(x * scale, *args)
        want = x.clamp(-bound, bound).to(torch_dtype)
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(dequantize(codes, *args), want.float() * scale)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_maps_the_largest_magnitude_to_the_largest_code(dtype):
    spec = QuantSpec(8, dtype)
    x = torch.randn(4, 33)
    scale, zero_point = rows_qparams(x, spec)
    torch.testing.assert_close(scale, x.abs().amax(1) / FLOAT8[dtype][1])
    codes = quantize(x, scale, zero_point, spec).float()
    assert torch.equal(codes.abs().amax(1), torch.full((4,), FLOAT8[dtype][1]))


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(4, 64), (3, 50), (1, 7), (5, 77), (2, 3, 31)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_codebooks_equal_bitsandbytes_to_the_bit(dtype, shape, blocksize):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(shape)
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its fallback for ragged sizes
        packed, state = functional.quantize_4bit(x.flatten(), blocksize=blocksize, quant_type=dtype)
        theirs = functional.dequantize_4bit(packed, state).reshape(shape)
    spec = QuantSpec(4, dtype, granularity="group", group_size=blocksize)
    scale, zero_point = rows_qparams(x, spec)
    assert torch.equal(scale, state.absmax)
    assert torch.equal(dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec), theirs)


EXTREMES = {
    "zero": torch.zeros(3, 50),
    "positive": torch.full((3, 50), 0.7),
    "negative": torch.full((3, 50), -0.7),
    "huge": torch.randn(3, 50).sign() * 1e38,
    "largest": torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]).repeat(3, 25),
    "denormal": torch.randn(3, 50).sign() * 1e-42,
    "one-of-many": torch.nn.functional.one_hot(torch.arange(3), 50).float() * 1e-30,
}
EXTREME_SPECS = [
    *(QuantSpec(bits, "int", signed, symmetric) for bits, signed, symmetric in FORMATS if bits in (2, 4, 8)),
    QuantSpec(8, symmetric=False, granularity="tensor"),
    QuantSpec(4, symmetric=False, granularity="group", group_size=16),
    QuantSpec(8, granularity="token", dynamic=True),
    QuantSpec(8, "float8_e4m3fn"),
    QuantSpec(8, "float8_e5m2"),
    QuantSpec(4, "nf4", granularity="group", group_size=64),
    QuantSpec(4, "fp4", granularity="group", group_size=64),
]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("spec", EXTREME_SPECS, ids=spec_id)
def test_extremes_have_a_usable_scale(name, spec):
    x = EXTREMES[name]
    axis = -1 if spec.dynamic else 0
    scale, zero_point = rows_qparams(x, spec, axis)
    assert (torch.isfinite(scale) & (scale > 0) & torch.isfinite(1 / scale)).all()
    qmin, qmax = qrange(spec)
    assert spec.dtype in FLOAT8 or ((zero_point >= min(qmin, 0)) & (zero_point <= qmax)).all()
    values = dequantize(quantize(x, scale, zero_point, spec, axis), scale, zero_point, spec, axis)
    assert not values.isnan().any()
    if name == "zero":
        assert torch.equal(values, x)
    if name != "largest":  # there, the outermost code of an 8-bit range is a hundredth past the largest float
        assert torch.isfinite(values).all()
    if name in ("positive", "negative", "huge") and spec.signed:
        steps = {4: 7, 2: 1}.get(spec.bits, 7)
        assert ((values - x).abs() <= x.abs() / steps).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranges_that_are_not_finite_raise(bad):
    good = torch.tensor([-1.0, 1.0])
    for low, high in ((torch.tensor([-1.0, bad]), good), (-good.abs(), torch.tensor([bad, 1.0]))):
        with pytest.raises(ValueError, match="not a finite range"):
            calc_qparams(low, high, QuantSpec())
    with pytest.raises(ValueError, match="not a finite range"):
        calc_qparams(torch.tensor([1.0]), torch.tensor([0.5]), QuantSpec())


def test_a_nan_token_spoils_only_itself():
    spec = QuantSpec(8, granularity="token", dynamic=True)
    x = torch.randn(3, 8)
    spoilt = x.clone()
    spoilt[1, 2] = torch.nan
    scale, _ = dynamic_qparams(spoilt, spec)
    keep = torch.tensor([0, 2])
    assert torch.equal(scale[keep], dynamic_qparams(x, spec)[0][keep])


@pytest.mark.parametrize("shape", [(5, 50), (3, 4, 3, 3), (6, 1), (7,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("spec", GROUPED, ids=spec_id)
def test_groups_round_trip(spec, shape):
    for axis in range(-len(shape), len(shape)):
        x = torch.randn(shape)
        rows = to_groups(x, spec, axis)
        assert rows.shape[0] == math.prod(qparams_shape(shape, spec, axis % len(shape)))
        assert torch.equal(from_groups(rows, x.shape, spec, axis), x)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_tokens_round_trip(axis):
    spec = QuantSpec(granularity="token", dynamic=True)
    x = torch.randn(2, 3, 4, 5)
    rows = to_groups(x, spec, axis)
    assert rows.shape == (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    assert torch.equal(from_groups(rows, x.shape, spec, axis), x)


def test_a_group_holds_neighbours_of_one_channel():
    x = torch.arange(12.0).reshape(2, 6)
    rows = to_groups(x, QuantSpec(granularity="group", group_size=4), pad=-1.0)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, 9], [10, 11, -1, -1]]
    flat = to_groups(x, QuantSpec(4, "nf4", granularity="group", group_size=8))
    assert flat.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("spec", "axis", "shape"),
    [
        (QuantSpec(granularity="tensor"), 0, (1,)),
        (QuantSpec(), 0, (6, 1)),
        (QuantSpec(), 1, (10, 1)),
        (QuantSpec(granularity="group", group_size=16), 0, (6, 6)),
        (QuantSpec(granularity="group", group_size=16), 1, (10, 4)),
        (QuantSpec(4, "nf4", granularity="group", group_size=64), 0, (9,)),
    ],
    ids=str,
)
def test_qparams_shape(spec, axis, shape):
    assert qparams_shape((6, 10, 3, 3), spec, axis) == shape


def test_tokens_have_no_static_shape():
    with pytest.raises(ValueError, match="per-token"):
        qparams_shape((6, 10), QuantSpec(granularity="token", dynamic=True))
