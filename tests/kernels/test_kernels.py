from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import kernels
from lightning_quant.kernels import KERNELS
from lightning_quant.packing import pack
from lightning_quant.spec import PRESETS, QuantScheme, QuantSpec
from lightning_quant.surgery import convert, prepare
from tests.helpers import assert_close, calibrate, own_values, read_codes, segments, stored_activation, stored_zero_points

STATIC = QuantSpec(8, symmetric=False, granularity="tensor")
SCHEMES = {
    **{name: preset.scheme for name, preset in PRESETS.items()},
    "tensor": QuantScheme(QuantSpec(5, symmetric=False, granularity="tensor"), STATIC),
    "unsigned": QuantScheme(QuantSpec(6, signed=False, symmetric=False), QuantSpec(8, granularity="tensor", dynamic=True)),
    "e5m2": QuantScheme(QuantSpec(8, "float8_e5m2"), QuantSpec(8, "float8_e5m2", granularity="tensor")),
    "fp4": QuantScheme(QuantSpec(4, "fp4", granularity="group", group_size=32)),
}
OPS = ("linear", "conv", "embedding", "dequantize")


@dataclass(frozen=True)
class Call:
    """One call of an operator, and its output in float64 by other means."""

    op: str
    args: tuple[Any, ...]
    specs: tuple[QuantSpec | None, ...]
    expected: Tensor

    def run(self) -> Tensor:
        return getattr(torch.ops.lightning_quant, self.op)(*self.args)


def stored_weight(module: nn.Module, shape: tuple[int, ...], axis: int) -> Tensor:
    """The float64 weight that packed words stand for."""
    moved = [shape[axis], *(size for dim, size in enumerate(shape) if dim != axis)]
    channels, columns = moved[0], math.prod(moved[1:])
    spec = module.scheme.weight
    codes = read_codes(module.weight_packed, spec, columns).flatten()
    scales, zero_points = module.weight_scale.flatten().tolist(), stored_zero_points(module, "weight", channels, spec)
    parts = zip(segments(channels, columns, spec), scales, zero_points, strict=True)
    rows = [torch.from_numpy(own_values(codes[part], scale, zero_point, spec)) for part, scale, zero_point in parts]
    return torch.cat(rows).reshape(moved).movedim(0, axis)


def packed_module(float_module: nn.Module, scheme: QuantScheme, x: Tensor) -> nn.Module:
    model = prepare(nn.Sequential(float_module), {"schemes": {"0": scheme}}, training=False)
    return convert(calibrate(model, lambda: model(x)))[0]


def linear_call(scheme: QuantScheme, dtype: torch.dtype, shape: tuple[int, ...] = (3, 5), width: int = 150) -> Call:
    x = torch.randn(*shape, width)
    module = packed_module(nn.Linear(width, 11), scheme, x)
    x = x.to(dtype)
    args = (x, *module.packed_weight(), module.bias, *module.input_args(), width, *module.spec_args)
    expected = F.linear(stored_activation(x, module), stored_weight(module, (11, width), 0), module.bias.double())
    return Call("linear", args, (module.scheme.weight, module.scheme.input), expected)


def conv_call(scheme: QuantScheme, dtype: torch.dtype, dims: int = 2, transposed: bool = False) -> Call:
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    x = torch.randn(2, 6, *(5, 4, 3)[:dims])
    module = packed_module(kind(6, 8, 3, stride=2, padding=1, groups=2), scheme, x)
    x, shape = x.to(dtype), module.packed_shape("weight")
    geometry = (module.stride, module.padding, module.dilation, module.groups, transposed, module.output_padding)
    args = (x, *module.packed_weight(), module.bias, *module.input_args(), shape, *geometry, *module.spec_args)
    run = getattr(F, f"conv{'_transpose' * transposed}{dims}d")
    weight = stored_weight(module, shape, int(transposed))
    expected = run(stored_activation(x, module, -dims - 1), weight, module.bias.double(), stride=2, padding=1, groups=2)
    return Call("conv", args, (module.scheme.weight, module.scheme.input), expected)


def embedding_call(scheme: QuantScheme, dtype: torch.dtype) -> Call:
    index = torch.randint(0, 23, (3, 2))
    module = packed_module(nn.Embedding(23, 70), scheme, index)
    args = (index, *module.packed_weight(), 70, module.spec_args[0])
    return Call("embedding", args, (module.scheme.weight, None), stored_weight(module, (23, 70), 0)[index])


def dequantize_call(scheme: QuantScheme, dtype: torch.dtype) -> Call:
    module = packed_module(nn.ConvTranspose2d(6, 8, 3, groups=2), scheme, torch.randn(1, 6, 4, 4))
    shape = [6, 4, 3, 3]
    args = (*module.packed_weight(), shape, 1, module.spec_args[0])
    return Call("dequantize", args, (module.scheme.weight, None), stored_weight(module, tuple(shape), 1))


CALLS: dict[str, Callable[[QuantScheme, torch.dtype], Call]] = {
    "linear": linear_call,
    "linear-row": lambda scheme, dtype: linear_call(scheme, dtype, ()),
    "linear-one": lambda scheme, dtype: linear_call(scheme, dtype, (1,), 7),
    **{
        f"conv{dims}d{'-transposed' * transposed}": lambda scheme, dtype, d=dims, t=transposed: conv_call(scheme, dtype, d, t)
        for dims in (1, 2, 3)
        for transposed in (False, True)
    },
    "embedding": embedding_call,
    "dequantize": dequantize_call,
}


def test_every_operator_is_called():
    assert {make(PRESETS["w8a16"].scheme, torch.float32).op for make in CALLS.values()} == set(OPS)
    assert {op for kernel in KERNELS.values() for op in kernel.ops} == set(OPS)
    assert set(KERNELS["reference"].ops) == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", KERNELS)
def test_backends_compute_what_the_words_say(backend, scheme, name, dtype, monkeypatch):
    call = CALLS[name](SCHEMES[scheme], dtype)
    kernel = KERNELS[backend]
    monkeypatch.setenv("LQ_BACKEND", backend)
    if call.op not in kernel.ops or kernel.refuses(call.op, call.args[0], *call.specs):
        with pytest.raises(ValueError, match=f"{backend}.*cannot run {call.op}"):
            call.run()
        return
    out = call.run()
    assert out.dtype == (dtype if call.op in ("linear", "conv") else torch.float32)
    # bfloat16 has 8 bits: weights, inputs and the sum are each rounded to them
    assert_close(out, call.expected, 2e-5 if out.dtype == torch.float32 else 0.03)


def test_an_unknown_backend_lists_the_valid_ones(monkeypatch):
    call = linear_call(PRESETS["w8a16"].scheme, torch.float32)
    monkeypatch.setenv("LQ_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="'cudnn'") as error:
        call.run()
    assert all(name in str(error.value) for name in KERNELS)
    monkeypatch.setenv("LQ_BACKEND", "")
    assert call.run().shape == call.expected.shape


def test_the_first_backend_that_supports_a_call_runs_it(monkeypatch):
    ran = []
    ops = {"linear": lambda *args: ran.append("first") or KERNELS["reference"].ops["linear"](*args)}
    describe = KERNELS["reference"].describe
    first = kernels.Kernel(ops, lambda op, x, weight, given: "" if x.dtype == torch.float32 else "wants float32", describe)
    monkeypatch.setattr(kernels, "KERNELS", {"first": first, **KERNELS})
    scheme = PRESETS["w8a16"].scheme
    linear_call(scheme, torch.bfloat16).run()
    assert ran == []
    linear_call(scheme, torch.float32).run()
    assert "first" in ran
    monkeypatch.setenv("LQ_BACKEND", "first")
    with pytest.raises(ValueError, match="'first' cannot run linear with weight int8 channel, input float"):
        torch.ops.lightning_quant.linear(*linear_args_bf16(scheme, monkeypatch))


def linear_args_bf16(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    with monkeypatch.context() as context:
        context.delenv("LQ_BACKEND")
        return linear_call(scheme, torch.bfloat16).args


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d-transposed", "embedding", "dequantize"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-dynamic", "w3a16"])
def test_operators_are_well_formed(scheme, name):
    call = CALLS[name](SCHEMES[scheme], torch.float32)
    args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in call.args]
    if call.op in ("linear", "conv"):
        args[0] = args[0].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.lightning_quant, call.op), tuple(args))


@pytest.mark.parametrize("name", ["linear", "linear-row", "conv1d", "conv2d", "conv3d-transposed", "embedding", "dequantize"])
def test_meta_shapes_are_those_of_the_output(name):
    call = CALLS[name](SCHEMES["w4a16"], torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(torch.ops.lightning_quant, call.op)(
            *(mode.from_tensor(arg.detach()) if isinstance(arg, Tensor) else arg for arg in call.args)
        )
    assert (fake.shape, fake.dtype) == (call.expected.shape, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-transposed"])
def test_gradients_by_input_and_bias(name, scheme):
    call = CALLS[name](SCHEMES[scheme], torch.float32)
    x, bias = (call.args[index].detach().clone().requires_grad_() for index in (0, 4))
    args = (x, *call.args[1:4], bias, *call.args[5:])
    out = getattr(torch.ops.lightning_quant, call.op)(*args)
    direction = torch.randn_like(out)
    by_x, by_bias = torch.autograd.grad(out, (x, bias), direction)
    summed = direction.flatten(0, -2).sum(0) if call.op == "linear" else direction.sum((0, 2, 3))
    assert_close(by_bias, summed)
    reference = KERNELS["reference"].ops[call.op](*args[:-3], *call.specs)
    assert_close(by_x, torch.autograd.grad(reference, x, direction)[0])
    only_x = getattr(torch.ops.lightning_quant, call.op)(x, *args[1:4], None, *args[5:])
    assert_close(torch.autograd.grad(only_x, x, direction)[0], by_x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-transposed"])
def test_gradients_by_the_scale(name, scheme):
    """The reference differentiated by autograd; and codes times the direction, where the input is in float."""
    call = CALLS[name](SCHEMES[scheme], torch.float32)
    scale = call.args[2].detach().clone().requires_grad_()
    args = (*call.args[:2], scale, *call.args[3:])
    out = getattr(torch.ops.lightning_quant, call.op)(*args)
    direction = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, scale, direction)
    reference = KERNELS["reference"].ops[call.op](*args[:-3], *call.specs)
    assert_close(found, torch.autograd.grad(reference, scale, direction)[0])
    assert found.shape == scale.shape
    # with the input's
    x = call.args[0].detach().clone().requires_grad_()
    out = getattr(torch.ops.lightning_quant, call.op)(x, *args[1:])
    by_x, by_scale = torch.autograd.grad(out, (x, scale), direction)
    assert_close(by_scale, found)
    assert by_x.abs().sum() > 0


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "mlp": (nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 5)), torch.randn(4, 20)),
        "conv": (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2)), torch.randn(2, 3, 6, 5)),
    }


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16"])
def test_compile_and_export(name, recipe):
    model, x = networks()[name]
    prepare(model, recipe, training=False)
    packed = convert(calibrate(model, lambda: model(x)))
    want = packed(x)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    exported = torch.export.export(packed, (x,))
    assert any("lightning_quant" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), want)


def test_export_of_a_dynamic_batch():
    model, x = networks()["mlp"]
    prepare(model, "w8a8", training=False)
    packed = convert(calibrate(model, lambda: model(x)))
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.randn(7, 20)
    assert torch.equal(exported.module()(more), packed(more))


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_autocast(preset):
    model, x = networks()["mlp"]
    prepare(model, preset, training=False)
    packed = convert(calibrate(model, lambda: model(x)))
    with torch.autocast("cpu", torch.bfloat16):
        out = packed(x)
    assert out.dtype == torch.bfloat16
    assert_close(out, packed(x), 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 48), (48, 80), (24, 48), (7, 16), (5, 6), (33, 192), (9, 7)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_rows_that_are_no_whole_blocks(kind, shape, dtype):
    pytest.importorskip("bitsandbytes")
    spec = QuantSpec(4, kind, granularity="group", group_size=64)
    codes = torch.randint(0, 15, shape, dtype=torch.uint8)
    scale = torch.rand(-(-shape[0] * shape[1] // 64)) + 0.5
    args = (pack(codes, spec), scale, None, shape, 0, spec, dtype)
    assert torch.equal(KERNELS["bitsandbytes"].ops["dequantize"](*args), KERNELS["reference"].ops["dequantize"](*args))


def test_inductor_calls_the_kernel_past_the_dispatcher():
    from torch._inductor.utils import run_and_get_code

    module = packed_module(nn.Linear(40, 24), PRESETS["w4a16"].scheme, torch.randn(3, 40)).eval()
    x = torch.randn(3, 40)
    with torch.no_grad():
        out, code = run_and_get_code(torch.compile(module), x)
        assert torch.equal(out, module(x))
    assert any("extern_kernels.lightning_quant_linear(" in text for text in code)
