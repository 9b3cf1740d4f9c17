from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.kernels import KERNELS, onednn
from lightning_quant.kernels.onednn import quantize_codes, refuses
from lightning_quant.packing import pack
from lightning_quant.spec import PRESETS, QuantScheme, QuantSpec
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(not onednn.is_exact(), reason="no exact int8 arithmetic on this CPU")

STATIC = QuantSpec(8, symmetric=False, granularity="tensor")
SCHEMES = {
    **{name: PRESETS[name].scheme for name in ("w8a8", "w4a4", "w3a3", "w2a2", "w8a8-dynamic")},
    "w4a8": QuantScheme(QuantSpec(4), STATIC),
    "symmetric": QuantScheme(QuantSpec(8), QuantSpec(8, granularity="tensor")),
    "unsigned": QuantScheme(QuantSpec(8), QuantSpec(8, signed=False, symmetric=False, granularity="tensor")),
    "per tensor": QuantScheme(QuantSpec(8, granularity="tensor"), STATIC),
    "dynamic per tensor": QuantScheme(QuantSpec(8), QuantSpec(8, symmetric=False, granularity="tensor", dynamic=True)),
}
CONVS: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "1d": (1, (2, 6, 11), {"padding": 1}),
    "1d strided": (1, (3, 6, 12), {"stride": 2, "dilation": 2, "groups": 3}),
    "2d": (2, (2, 6, 7, 5), {"padding": 1}),
    "odd channels": (2, (3, 5, 9, 6), {"stride": 2, "padding": (1, 0)}),
    "dilated": (2, (2, 6, 9, 9), {"dilation": (2, 1), "padding": 2, "groups": 2}),
    "depthwise": (2, (2, 9, 6, 6), {"groups": 9, "padding": 1, "bias": False}),
    "same": (2, (2, 4, 6, 6), {"padding": "same", "padding_mode": "reflect"}),
    "unbatched": (2, (6, 7, 5), {}),
    "3d": (3, (2, 4, 5, 4, 6), {"padding": 1, "stride": (1, 2, 1)}),
}


def packed(module: nn.Module, scheme: QuantScheme, x: Tensor) -> nn.Module:
    return lq.quantize(nn.Sequential(module), lq.Recipe(scheme), [x])


def both(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The outputs of this backend and of the reference."""
    found = []
    for backend in ("onednn", "reference"):
        monkeypatch.setenv("LQ_BACKEND", backend)
        with torch.no_grad():
            found.append(model(x))
    return found[0], found[1]


def conv(name: str) -> tuple[nn.Module, Tensor]:
    dims, shape, options = CONVS[name]
    channels = shape[-dims - 1]
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    # not around 0: the padding's zeros are a code of their own
    return kind(channels, options.get("groups", 1) * 2 + (0 if "groups" in options else 5), 3, **options), torch.randn(shape) + 0.7


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolutions_equal_the_reference(scheme, name, monkeypatch):
    module, x = conv(name)
    model = packed(module, SCHEMES[scheme], x)
    mine, reference = both(model, x, monkeypatch)
    assert_close(mine, reference, 2e-6)
    mine, reference = both(model, 3 * x, monkeypatch)  # most inputs saturate
    assert_close(mine, reference, 2e-6)


@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33), (33,), (1, 33)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_equal_the_reference(scheme, bias, shape, monkeypatch):
    x = torch.randn(shape) + 0.7
    mine, reference = both(packed(nn.Linear(33, 10, bias), SCHEMES[scheme], x), x, monkeypatch)
    assert_close(mine, reference, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w4a4"])
def test_half_precision_is_rounded_once(scheme, dtype, monkeypatch):
    for module, x in ((nn.Linear(33, 10), torch.randn(4, 33)), conv("2d"), conv("1d")):
        x = x.to(dtype)
        model = packed(module, SCHEMES[scheme], x.float())
        mine, _ = both(model, x, monkeypatch)
        assert mine.dtype == dtype
        exact, _ = both(model, x.float(), monkeypatch)
        assert_close(mine, exact, torch.finfo(dtype).eps)


def test_sums_are_exact_integers():
    x, weight = torch.full((1, 64, 5, 5), 255.0), torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    spec, by_input = QuantSpec(8), QuantSpec(8, signed=False, symmetric=False, granularity="tensor")
    words = pack(weight.flatten(1), spec)
    args = (torch.ones(16, 1), None, None, torch.ones(1), torch.zeros(1, dtype=torch.int32), [16, 64, 3, 3])
    geometry = ((1, 1), (0, 0), (1, 1), 1, False, (0, 0))
    assert (onednn.conv(x, words, *args, *geometry, spec, by_input) == 255 * 127 * 64 * 9).all()


@pytest.mark.parametrize("name", ["2d", "1d", "3d"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_an_empty_batch(scheme, name, monkeypatch):
    module, x = conv(name)
    mine, reference = both(packed(module, SCHEMES[scheme], x), x[:0], monkeypatch)
    assert mine.shape == reference.shape
    assert mine.shape[0] == 0


@pytest.mark.parametrize("name", ["2d", "depthwise", "3d"])
def test_the_output_is_laid_out_as_torchs(name):
    module, x = conv(name)
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    model = packed(module, SCHEMES["w8a8"], x)
    wanted = model(x)
    assert wanted.is_contiguous()
    out = model(x.contiguous(memory_format=last))
    assert out.is_contiguous(memory_format=last)
    assert torch.equal(out, wanted)
    models = [model.to(memory_format=last)]
    if name != "depthwise":  # a weight of one input channel is in both layouts
        models.append(packed(module.to(memory_format=last), SCHEMES["w8a8"], x))
    for asked in models:
        out = asked(x)
        assert out.is_contiguous(memory_format=last)
        assert_close(out, wanted)
    assert not model.double().float().to(memory_format=torch.contiguous_format)(x).is_contiguous(memory_format=last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["1d", "2d"])
def test_the_operator_is_well_formed(name, memory_format):
    module, x = conv(name)
    x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
    inner = packed(module, SCHEMES["w8a8"], x)[0]
    geometry = (inner.stride, inner.padding, inner.dilation, inner.groups, False, inner.output_padding)
    shape = inner.packed_shape("weight")
    args = (x, *inner.packed_weight(), inner.bias, *inner.input_args(), shape, *geometry, *inner.spec_args)
    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(torch.ops.lightning_quant.conv, args)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("limits", [(0, 255), (120, 135)], ids=str)
@pytest.mark.parametrize("zero_point", [0, 128, 77, 255])
def test_codes_are_rounded_before_the_zero_point_is_added(zero_point, limits, layout, monkeypatch):
    scale = torch.tensor(0.037)
    x = torch.randint(-300, 300, (4, 5, 7, 9)) * (scale / 2) * (1 + torch.randn(4, 5, 7, 9) * 1e-7)  # next to a tie
    x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    x = x.contiguous(memory_format=layout)
    wanted = ((x * (1 / scale)).round() + zero_point).clamp(*limits)
    for fused in (True, False):
        monkeypatch.setattr(onednn, "_fused", lambda fused=fused: fused)
        codes = quantize_codes(x, scale.item(), zero_point, limits)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.float(), wanted)
        assert codes.is_contiguous(memory_format=layout)


def test_what_is_refused_and_why():
    x, weight = torch.ones(2, 4), QuantSpec(8)
    token = QuantSpec(8, symmetric=False, granularity="token", dynamic=True)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("", ("conv", x, weight, STATIC)),
        ("", ("linear", x, weight, SCHEMES["w8a8-dynamic"].input)),
        ("no embedding", ("embedding", x, weight, None)),
        ("float inputs", ("linear", x, weight, None)),
        ("not integers", ("linear", x, PRESETS["fp8"].scheme.weight, PRESETS["fp8"].scheme.input)),
        ("groups", ("linear", x, PRESETS["w4a8-dynamic"].scheme.weight, STATIC)),
        ("with a zero point", ("conv", x, QuantSpec(8, symmetric=False), STATIC)),
        ("for each token", ("conv", x, weight, token)),
        ("meta", ("linear", x.to("meta"), weight, STATIC)),
        ("float64", ("linear", x.double(), weight, STATIC)),
        ("transposed", ("conv", x, weight, STATIC, (4, 4, 3, 3), True)),
        ("products", ("conv", x, weight, STATIC, (4, 65795, 1, 1))),
    ]
    for reason, args in cases:
        found = refuses(*args)
        assert (reason in found) if reason else (found == ""), args


def test_what_is_refused_runs_on_the_reference(monkeypatch):
    x = torch.randn(2, 6, 5, 5)
    model = packed(nn.ConvTranspose2d(6, 4, 3), SCHEMES["w8a8"], x)
    mine, reference = both(model, x, monkeypatch)
    assert torch.equal(mine, reference)
    assert not KERNELS["onednn"].refuses("conv", x, QuantSpec(8), STATIC)


def test_gradients_are_the_references(monkeypatch):
    module, x = conv("2d")
    model = packed(module, SCHEMES["w8a8"], x)
    found = []
    for backend in ("onednn", "reference"):
        monkeypatch.setenv("LQ_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert_close(found[0], found[1])
