from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_quant.functional import dynamic_fake_quantize
from lightning_quant.kernels import cpu, native, reference
from lightning_quant.numerics import calc_qparams, qparams_shape, quantize, to_groups
from lightning_quant.packing import pack, pack_zero_point
from lightning_quant.spec import PRESETS, QuantSpec

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C library is not built")

TOKEN = QuantSpec(8, granularity="token", dynamic=True)
INPUTS = {
    "float": None,
    "token": TOKEN,
    "token-asym": QuantSpec(8, symmetric=False, granularity="token", dynamic=True),
    "token4": QuantSpec(4, granularity="token", dynamic=True),
    "static": QuantSpec(8, symmetric=False, granularity="tensor"),
    "static4": QuantSpec(4, signed=False, symmetric=False, granularity="tensor"),
    "tensor": QuantSpec(8, granularity="tensor", dynamic=True),
    "e4m3": QuantSpec(8, "float8_e4m3fn", granularity="token", dynamic=True),
}


def group(bits: int, size: int, **more: bool) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=size, **more)


WEIGHTS = {
    **{name: preset.scheme.weight for name, preset in PRESETS.items()},
    **{f"int{bits}": QuantSpec(bits) for bits in (2, 3, 5, 6, 7)},
    **{f"int{bits}-group{size}-asym": group(bits, size, symmetric=False) for bits in (2, 3, 4, 8) for size in (32, 128)},
    "int4-group24": group(4, 24),
    "int3-group7-asym": group(3, 7, symmetric=False),
    "uint4-tensor": QuantSpec(4, signed=False, symmetric=False, granularity="tensor"),
    "uint8-asym": QuantSpec(8, signed=False, symmetric=False),
    "e5m2": QuantSpec(8, "float8_e5m2"),
    "e4m3-group64": QuantSpec(8, "float8_e4m3fn", granularity="group", group_size=64),
    "fp4-blocks32": QuantSpec(4, "fp4", granularity="group", group_size=32),
    "nf4-blocks50": QuantSpec(4, "nf4", granularity="group", group_size=50),
}
# [channels, features, rows]: odd ones, one, none, whole panels and tiles, and one past them
SHAPES = [
    (1, 1, 1),
    (5, 3, 2),
    (33, 150, 0),
    (33, 150, 3),
    (64, 64, 8),
    (65, 577, 9),
    (70, 1100, 23),
    (131, 576, 300),
    (3, 2500, 65),
]


@pytest.fixture(params=native.LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.LEVEL.value
    if native.use(request.param) != request.param:
        native.use(before)
        pytest.skip(f"no {request.param} on this machine")
    yield request.param
    native.use(before)


def packed(channels: int, features: int, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = torch.randn(channels, features)
    ranges = to_groups(weight, spec)
    size = qparams_shape(weight.shape, spec)
    scale, zero_point = (value.reshape(size) for value in calc_qparams(ranges.amin(1), ranges.amax(1), spec))
    words = pack(quantize(weight, scale, zero_point, spec), spec)
    if spec.symmetric:
        return words, scale, None
    return words, scale, pack_zero_point(zero_point, spec) if zero_point.dim() == 2 else zero_point


def given(x: Tensor, spec: QuantSpec | None) -> tuple[Tensor | None, Tensor | None]:
    """A static input's scale and zero point."""
    if spec is None or spec.dynamic or x.numel() == 0:
        return (None, None) if spec is None or spec.dynamic else (torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return calc_qparams(x.float().min()[None], x.float().max()[None], spec)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_is_the_reference(weight: str, isa: str):
    choice, spec = random.Random(f"{weight} {isa}"), WEIGHTS[weight]
    shapes = choice.sample(SHAPES, len(SHAPES))
    for (channels, features, rows), input_spec in zip([*shapes, *shapes], [*INPUTS.values(), *INPUTS.values()]):
        dtype = choice.choice(list(native.DTYPES))
        args = packed(channels, features, spec)
        x = torch.randn(rows, features).to(dtype)
        bias = choice.choice([None, torch.randn(channels), torch.randn(channels).bfloat16()])
        qparams = given(x, input_spec)
        expected = reference.linear(x.float(), *args, bias, *qparams, features, spec, input_spec)
        out = cpu.linear(x, *args, bias, *qparams, features, spec, input_spec)
        assert (out.shape, out.dtype) == ((rows, channels), dtype)
        # bfloat16 has 8 bits, for the output and, with bfloat16 inputs, the weight; integers are summed exactly
        bound = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert error(out, expected) < bound, (channels, features, rows, dtype, input_spec)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("weight", ["w4a16", "w4a8-dynamic", "w8a8", "nf4"])
def test_threads_do_not_change_a_bit(weight: str, rows: int, isa: str):
    spec, input_spec = WEIGHTS[weight], PRESETS[weight].scheme.input
    args, x, outputs = packed(300, 520, spec), torch.randn(rows, 520), []
    qparams, before = given(x, input_spec), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(cpu.linear(x, *args, None, *qparams, 520, spec, input_spec))
    finally:
        torch.set_num_threads(before)
    if isa == "avx512":
        assert torch.equal(*outputs)
    else:  # torch's GEMM may sum in another order
        assert error(*outputs) < 1e-6


@pytest.mark.parametrize("weight", ["w8a8-dynamic", "int4-group24", "w4a8-dynamic"])
def test_integers_are_exact(weight: str, isa: str):
    """Against float64 sums of the codes: what is left is the last rounding to float32."""
    spec = WEIGHTS[weight]
    for channels, features, rows in SHAPES:
        args, x = packed(channels, features, spec), torch.randn(rows, features)
        values = dynamic_fake_quantize(x, TOKEN).double()
        dequantized = reference.dequantize_weight(*args, (channels, features), 0, spec).double()
        out = cpu.linear(x, *args, None, None, None, features, spec, TOKEN)
        # each group's sum is rounded once
        assert error(out, (values @ dequantized.T).float()) < 4e-7, (channels, features, rows)


@pytest.mark.parametrize("spec", [value for value in INPUTS.values() if value is not None and value.is_int], ids=lambda s: s.label)
def test_codes_of_inputs_are_those_of_the_reference(spec: QuantSpec, isa: str):
    """Through a weight that is 127 times the identity: the output shows the codes."""
    features = 96
    weight_spec = QuantSpec(8)
    identity = (torch.eye(features) * 127).to(torch.int8)
    args = (pack(identity, weight_spec), torch.full((features, 1), 1 / 127), None)
    x = torch.randn(40, features) * torch.logspace(-3, 3, 40)[:, None]
    x[3] = 0
    x[4] = torch.arange(features) - 48.0  # ties
    x[5] = 1e-42
    qparams = given(x, spec)
    for rows in (1, 8, 40):
        out = cpu.linear(x[:rows], *args, None, *qparams, features, weight_spec, spec)
        expected = reference.quantize_input(x[:rows], *qparams, spec)
        torch.testing.assert_close(out, expected, rtol=3e-6, atol=1e-38)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_dequantized_weights_are_equal(weight: str, isa: str):
    spec = WEIGHTS[weight]
    for channels, features in ((1, 1), (33, 150), (20, 600)):
        args = packed(channels, features, spec)
        for dtype in native.DTYPES:
            expected = reference.dequantize_weight(*args, (channels, features), 0, spec, dtype)
            assert torch.equal(cpu.dequantize_weight(*args, (channels, features), 0, spec, dtype), expected)
        index = torch.tensor([[0, channels - 1], [channels // 2, 0]])
        assert torch.equal(cpu.embedding(index, *args, features, spec), reference.embedding(index, *args, features, spec))


def test_embedding_checks_its_indices(isa: str):
    args = packed(10, 8, PRESETS["w8a16"].scheme.weight)
    for index in (torch.tensor([10]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="in a table of 10 rows"):
            cpu.embedding(index, *args, 8, PRESETS["w8a16"].scheme.weight)
    assert cpu.embedding(torch.empty(0, 3, dtype=torch.int64), *args, 8, PRESETS["w8a16"].scheme.weight).shape == (0, 3, 8)


@pytest.mark.parametrize("by_input", ["float", "token", "static"])
def test_layouts_of_the_input(by_input: str, isa: str):
    spec, input_spec = PRESETS["w4a16"].scheme.weight, INPUTS[by_input]
    args = packed(40, 70, spec)
    for x in (
        torch.randn(70, 12).t(),
        torch.randn(12, 140)[:, ::2],
        torch.randn(2, 3, 2, 70),
        torch.randn(70),
        torch.randn(0, 4, 70),
    ):
        qparams = given(x, input_spec)
        expected = reference.linear(x, *args, None, *qparams, 70, spec, input_spec)
        out = cpu.linear(x, *args, None, *qparams, 70, spec, input_spec)
        assert out.shape == expected.shape
        assert error(out, expected) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_row(value: float, isa: str):
    for by_input in (None, TOKEN):
        spec = PRESETS["w4a16"].scheme.weight
        args = packed(40, 70, spec)
        for rows in (4, 12):
            x = torch.randn(rows, 70)
            clean = cpu.linear(x, *args, None, None, None, 70, spec, by_input)
            x[1, 3] = value
            out = cpu.linear(x, *args, None, None, None, 70, spec, by_input)
            assert not out[1].isfinite().any()
            others = [row for row in range(rows) if row != 1]
            assert torch.equal(out[others], clean[others])


def test_float32_is_rounded_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch):
    if "bf16" not in native.isa():
        pytest.skip("no bfloat16 products on this machine")
    spec = PRESETS["w4a16"].scheme.weight
    args, x = packed(64, 256, spec), torch.randn(32, 256)
    expected = reference.linear(x, *args, None, None, None, 256, spec, None)
    exact = cpu.linear(x, *args, None, None, None, 256, spec, None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rounded = cpu.linear(x, *args, None, None, None, 256, spec, None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(exact, expected) < 1e-6
    assert 1e-4 < error(rounded, expected) < 1e-2


def test_a_weight_that_moves_is_read_where_it_is():
    """Nothing but addresses is kept between calls."""
    spec = PRESETS["w4a16"].scheme.weight
    x = torch.randn(2, 70)
    first, second = packed(40, 70, spec), packed(40, 70, spec)
    words, scale = first[0].clone(), first[1].clone()
    before = cpu.linear(x, words, scale, None, None, None, None, 70, spec, None)
    words.copy_(second[0])
    scale.copy_(second[1])
    after = cpu.linear(x, words, scale, None, None, None, None, 70, spec, None)
    assert error(after, reference.linear(x, *second, None, None, None, 70, spec, None)) < 1e-6
    assert not torch.equal(before, after)


@pytest.mark.parametrize("features", [1, 5, 33, 40, 64, 100, 127, 128, 129, 200])
@pytest.mark.parametrize("bits", [2, 4])
def test_few_rows_of_bfloat16(bits: int, features: int, isa: str):
    """Every width of a row beside the blocks of words, with one scale a channel and with groups that do and do not divide them."""
    for spec in (
        QuantSpec(bits),
        QuantSpec(bits, symmetric=False),
        *(group(bits, size, symmetric=False) for size in (8, 16, 32, 48, 64)),
    ):
        args = packed(7, features, spec)
        for rows in (1, 6):
            x = torch.randn(rows, features).bfloat16()
            expected = reference.linear(x.float(), *args, None, None, None, features, spec, None)
            assert error(cpu.linear(x, *args, None, None, None, features, spec, None), expected) < 1e-2, (spec.label, rows)


def test_no_features_and_unusual_biases(isa: str):
    spec = PRESETS["w8a16"].scheme.weight
    words, scale = torch.empty(6, 0, dtype=torch.int32), torch.ones(6, 1)
    bias = torch.randn(12, dtype=torch.float64)[::2]
    out = cpu.linear(torch.empty(3, 0), words, scale, None, bias, None, None, 0, spec, None)
    torch.testing.assert_close(out, bias.float().expand(3, 6))
    args, x = packed(6, 20, spec), torch.randn(2, 20)
    expected = reference.linear(x, *args, bias, None, None, 20, spec, None)
    assert error(cpu.linear(x, *args, bias, None, None, 20, spec, None), expected) < 1e-6
