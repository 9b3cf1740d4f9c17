"""Shared by the tests: calibration, and a quantizer in numpy and float64 that shares no code with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.spec import QuantSpec
from lightning_quant.surgery import fake_modules

FLOAT8 = {"float8_e4m3fn": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}
# QLoRA, arXiv:2305.14314, appendix E
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
FP4 = np.array([-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
TABLES = {"nf4": NF4, "fp4": FP4}


def thinned(*axes: Iterable[Any], of: int) -> list[Any]:
    """All combinations; one in `of` is run by default, such that every value of each axis is in some, the others are slow."""
    lists = [list(axis) for axis in axes]
    assert of <= max(map(len, lists))
    found = []
    for index in itertools.product(*(range(len(values)) for values in lists)):
        marks = () if sum(index) % of == 0 else (pytest.mark.slow,)
        found.append(pytest.param(*(values[i] for values, i in zip(lists, index, strict=True)), marks=marks))
    return found


def spec_id(spec: QuantSpec) -> str:
    return spec.label.replace(" ", "-")


def quantizers(model: nn.Module) -> list[FakeQuantize]:
    return [quantizer for fake in fake_modules(model).values() for _, quantizer in fake.quantizers()]


def calibrate(model: nn.Module, call: Callable[[], Any]) -> nn.Module:
    """Observe one call in eval, then quantize."""
    model.eval()
    for quantizer in quantizers(model):
        quantizer.observing = True
    with torch.no_grad():
        call()
    for quantizer in quantizers(model):
        quantizer.observing, quantizer.quantizing = False, True
        quantizer.update_qparams()
    return model


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_close(got: Any, want: Any, tol: float = 1e-5) -> None:
    """Every tensor of two outputs agrees to `tol` of its largest magnitude."""
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for one, two in zip(got, want):
        assert one.shape == two.shape
        one, two = one.detach().double(), two.detach().double()
        assert torch.isfinite(one).all()
        assert (one - two).abs().max().item() <= tol * max(two.abs().max().item(), 1e-3)


def assert_same(got: Any, want: Any) -> None:
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    assert all(one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(got, want))


def assert_same_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for key in got:
        assert got[key].dtype == want[key].dtype, key
        assert torch.equal(got[key], want[key]), key


def limits(spec: QuantSpec) -> tuple[int, int]:
    return (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.signed else (0, 2**spec.bits - 1)


def segments(channels: int, columns: int, spec: QuantSpec) -> Iterator[slice]:
    """What shares a scale, as slices of the flattened `[channels, columns]`."""
    size = {"tensor": channels * columns, "channel": columns, "token": columns}.get(spec.granularity, spec.group_size)
    span = channels * columns if spec.granularity == "tensor" or spec.dtype in TABLES else columns
    for start in range(0, channels * columns, span):
        for begin in range(start, start + span, size):
            yield slice(begin, min(begin + size, start + span))


def own_qparams(values: np.ndarray, spec: QuantSpec) -> tuple[float, int]:
    """Scale and zero point of values that share them, in float64."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    largest = max(-low, high)
    if spec.dtype in TABLES:
        return largest or 1.0, 0
    if spec.dtype in FLOAT8:
        return largest / FLOAT8[spec.dtype][1] or 1.0, 0
    qmin, qmax = limits(spec)
    if spec.symmetric:
        if not spec.signed and low < high == 0:
            return float(np.finfo(np.float32).tiny), 0
        if spec.signed and spec.dynamic:
            return largest / qmax or 1.0, 0
        return (largest / ((qmax - qmin) / 2) if spec.signed else high / qmax) or 1.0, 0
    scale = (high - low) / (qmax - qmin)
    return (scale, int(np.clip(qmin - np.rint(low / scale), qmin, qmax))) if scale else (1.0, qmin)


def own_codes(values: np.ndarray, scale: float, zero_point: int, spec: QuantSpec) -> np.ndarray:
    """Codes as they are packed: from 0 on, a float8 as its byte. Ratios are float32, as ties are defined there."""
    ratio = values.astype(np.float32) * (np.float32(1) / np.float32(scale))
    if spec.dtype in TABLES:
        return np.abs(ratio[:, None].astype(np.float64) - TABLES[spec.dtype]).argmin(1)
    if spec.dtype in FLOAT8:
        dtype, bound = FLOAT8[spec.dtype]
        return torch.from_numpy(ratio).clamp(-bound, bound).to(dtype).view(torch.uint8).numpy().astype(np.int64)
    qmin, qmax = limits(spec)
    return (np.clip(np.rint(ratio) + zero_point, qmin, qmax) - qmin).astype(np.int64)


def own_values(codes: np.ndarray, scale: float, zero_point: int, spec: QuantSpec) -> np.ndarray:
    """float64 values of codes as they are packed."""
    if spec.dtype in TABLES:
        return TABLES[spec.dtype].astype(np.float32)[codes] * np.float64(scale)
    if spec.dtype in FLOAT8:
        table = torch.from_numpy(codes.astype(np.uint8)).view(FLOAT8[spec.dtype][0]).double().numpy()
        return table * np.float64(scale)
    return (codes + limits(spec)[0] - zero_point) * np.float64(scale)


def read_words(words: Tensor, bits: int, columns: int) -> np.ndarray:
    """Unsigned codes `[rows, columns]` of int32 words, bit by bit."""
    raw = np.ascontiguousarray(words.detach().numpy()).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : columns * bits]
    return stream.reshape(len(words), columns, bits).astype(np.int64) @ (1 << np.arange(bits))


# bitsandbytes' fp4: a sign bit, and three bits that stand for these magnitudes, times 12
FP4_MAGNITUDES = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def read_codes(words: Tensor, spec: QuantSpec, columns: int) -> np.ndarray:
    """Codes as they are stored, but for nf4 and fp4: the index of the value, in ascending order."""
    if spec.dtype not in ("nf4", "fp4"):
        return read_words(words, spec.bits, columns)
    raw = np.ascontiguousarray(words.detach().numpy()).view(np.uint8)
    codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(len(words), -1)[:, :columns]
    if spec.dtype == "nf4":
        return codes.astype(np.int64)
    values = [(-1 if code & 8 else 1) * FP4_MAGNITUDES[code & 7] for code in range(16)]
    ascending = sorted(set(values))
    return np.array([ascending.index(value) for value in values])[codes]


def stored_zero_points(module: nn.Module, name: str, channels: int, spec: QuantSpec) -> np.ndarray:
    """The flat zero points of a packed weight, one a scale."""
    scales = getattr(module, f"{name}_scale")
    stored = getattr(module, f"{name}_zero_point", None)
    if stored is None:
        return np.zeros(scales.numel(), dtype=np.int64)
    if stored.dim() == 1:
        return stored.detach().numpy().astype(np.int64)
    return (read_words(stored.detach().t(), spec.bits, channels).T + limits(spec)[0]).flatten()


def own_weight(module: nn.Module, weight: Tensor, axis: int, name: str = "weight") -> Tensor:
    """The float64 weight on its grid, from the float weight; scale, zero point and codes must be those that `module` stores."""
    spec = module.scheme.weight
    moved = weight.detach().float().movedim(axis, 0)
    channels, columns = len(moved), math.prod(moved.shape[1:])
    flat = moved.reshape(-1).numpy()
    scales = getattr(module, f"{name}_scale").detach().numpy().flatten()
    zero_points = stored_zero_points(module, name, channels, spec)
    codes, values = np.zeros(flat.size, dtype=np.int64), np.zeros(flat.size)
    parts = list(segments(channels, columns, spec))
    assert len(parts) == len(scales) == len(zero_points)
    for part, stored, zero_point in zip(parts, scales, zero_points):
        scale, own_zero_point = own_qparams(flat[part], spec)
        np.testing.assert_allclose(stored, scale, rtol=3e-7)
        assert zero_point == own_zero_point
        codes[part] = own_codes(flat[part], stored, zero_point, spec)
        values[part] = own_values(codes[part], stored, zero_point, spec)
    found = read_codes(getattr(module, f"{name}_packed"), spec, columns).flatten()
    np.testing.assert_array_equal(found, codes)
    return torch.from_numpy(values).reshape(moved.shape).movedim(0, axis)


def own_activation(x: Tensor, spec: QuantSpec | None, scale: Tensor | None, zero_point: Tensor | None, axis: int = -1) -> Tensor:
    """The float64 activation on its grid: static with the stored range, or dynamic by token, whose features start at `axis`."""
    if spec is None:
        return x.detach().double()
    flat = x.detach().float().reshape(-1).numpy()
    columns = math.prod(x.shape[axis:]) if spec.granularity == "token" else flat.size
    out = np.zeros(flat.size)
    for start in range(0, flat.size, columns):
        part = slice(start, start + columns)
        if spec.dynamic:
            step, shift = own_qparams(flat[part], spec)
        else:
            step, shift = scale.item(), int(zero_point.item())
        out[part] = own_values(own_codes(flat[part], np.float32(step), shift, spec), np.float32(step), shift, spec)
    return torch.from_numpy(out).reshape(x.shape)


def stored_activation(x: Tensor, module: nn.Module, axis: int = -1) -> Tensor:
    scale, zero_point = getattr(module, "input_scale", None), getattr(module, "input_zero_point", None)
    return own_activation(x, module.scheme.input, scale, zero_point, axis)
