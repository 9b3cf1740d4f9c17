from __future__ import annotations

import pytest
import torch

from lightning_quant.kernels import KERNELS, triton
from lightning_quant.spec import QuantSpec
from tests.helpers import assert_close
from tests.kernels.test_kernels import SCHEMES, linear_call
from tests.kernels.triton import only_interpreted

only_interpreted()


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("LQ_BACKEND", "triton")


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5), torch.bfloat16), ((), torch.float32)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme, shape, dtype):
    call = linear_call(SCHEMES[scheme], dtype, shape)
    out = call.run()
    assert out.dtype == dtype
    assert_close(out, call.expected, 2e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_reference(scheme):
    call = linear_call(SCHEMES[scheme], torch.float32)
    x, bias = (call.args[index].detach().clone().requires_grad_() for index in (0, 4))
    args = (x, *call.args[1:4], bias, *call.args[5:])
    out = torch.ops.lightning_quant.linear(*args)
    direct = triton.linear(*args[:-3], *call.specs)
    want = KERNELS["reference"].ops["linear"](*args[:-3], *call.specs)
    direction = torch.randn_like(out)
    expected = torch.autograd.grad(want, (x, bias), direction)
    assert_close(torch.autograd.grad(out, (x, bias), direction), expected)
    assert_close(torch.autograd.grad(direct, (x, bias), direction), expected)


def test_the_gradient_decodes_within_the_product(monkeypatch):
    called = []
    own = triton.grad_input
    monkeypatch.setattr(triton, "grad_input", lambda *args: called.append(1) or own(*args))
    call = linear_call(SCHEMES["w4a16"], torch.float32)
    x = call.args[0].detach().requires_grad_()
    torch.ops.lightning_quant.linear(x, *call.args[1:]).sum().backward()
    assert called == [1]


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-dynamic", "w8a8"])
def test_compiled_forward_and_backward(scheme):
    call = linear_call(SCHEMES[scheme], torch.float32)
    x, rest = (
        call.args[0].detach().requires_grad_(),
        [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in call.args[1:]],
    )
    compiled = torch.compile(lambda x: torch.ops.lightning_quant.linear(x, *rest), fullgraph=True, backend="aot_eager")
    outs = [function(x, *more) for function, more in ((compiled, ()), (torch.ops.lightning_quant.linear, rest))]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in outs))


def test_float64_goes_by_the_reference(monkeypatch):
    monkeypatch.delenv("LQ_BACKEND")
    call = linear_call(SCHEMES["w4a16"], torch.float64)
    x = call.args[0].detach().requires_grad_()
    out = torch.ops.lightning_quant.linear(x, *call.args[1:])
    direction = torch.randn_like(out)
    want = KERNELS["reference"].ops["linear"](x, *call.args[1:-3], *call.specs)
    assert torch.equal(out, want)
    assert_close(*(torch.autograd.grad(value, x, direction)[0] for value in (out, want)), 1e-12)


def test_the_gradients_operator_is_well_formed():
    call = linear_call(SCHEMES["w4a16"], torch.float32)
    args = (torch.randn(3, 11), *(value.detach() for value in call.args[1:3]), None, 150, call.specs[0].encode())
    torch.library.opcheck(torch.ops.lightning_quant.triton_grad_input, args)


def test_what_it_refuses():
    x, spec = torch.ones(2, 32), QuantSpec(8)
    assert triton.refuses("linear", x, spec, None) == ""
    assert triton.refuses("linear", x.double(), spec, None) == "takes float32, bfloat16 and float16, not float64"
    assert triton.refuses("conv", x, spec, None) == "has no conv"
    assert "not meta" in triton.refuses("dequantize", x.to("meta"), spec, None)
    assert not triton.refuses("dequantize", x.int(), spec, None)
    with pytest.raises(ValueError, match="'triton' cannot run linear"):
        linear_call(SCHEMES["w8a8"], torch.float64).run()
