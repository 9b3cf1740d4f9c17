"""The package's own CPU kernels, in the C library `kernels/native`.

It reads packed words as they are, so nothing is prepacked and no memory is taken but scratch. Few rows go through kernels that
unpack codes in registers; many rows through panels that are unpacked into the cache once and multiplied by int8, bfloat16 or
float32 dot products. Where a machine lacks AVX512, and for float inputs where it has AMX, tiles of the weight are dequantized
and multiplied by torch.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels import images, native, onednn, reference
from lightning_quant.kernels.native import DTYPES, LinearArgs, WeightArgs
from lightning_quant.numerics import CODEBOOKS, FLOAT8, dynamic_qparams, max_value, qrange
from lightning_quant.packing import stored_values
from lightning_quant.spec import QuantSpec

# a tile of a weight that is dequantized for torch's GEMM, in elements
_TILE = 1 << 21
# weights whose description is kept, for each pair of specs
_PREPARED = 8192


def rounds_float32() -> bool:
    """Whether float32 products may be those of bfloat16: `torch.set_float32_matmul_precision("medium")`, or `"high"`."""
    return torch.get_float32_matmul_precision() != "highest"


def _template(weight_spec: QuantSpec, input_spec: QuantSpec | None) -> LinearArgs:
    """The fields that only specs decide."""
    args = LinearArgs()
    weight = args.weight
    weight.bits, weight.kind = weight_spec.bits, native.KINDS[weight_spec.dtype]
    weight.low = qrange(weight_spec)[0] if weight_spec.is_int else 0
    weight.swapped = weight_spec.dtype in CODEBOOKS
    if weight_spec.bits <= 4:
        low, high = qrange(weight_spec)
        values = range(low, high + 1) if weight_spec.is_int else stored_values(weight_spec.dtype)
        weight.table[:] = [values[code % len(values)] for code in range(16)]
    if not weight_spec.symmetric:
        weight.zero_kind = native.ONE_ZERO if weight_spec.granularity == "tensor" else native.PACKED_ZERO
    if input_spec is not None and input_spec.is_int:
        args.input = native.DYNAMIC_INPUT if input_spec.granularity == "token" else native.STATIC_INPUT
        args.in_low, args.in_high = qrange(input_spec)
        args.in_symmetric = input_spec.symmetric
    return args


def _fill(weight: WeightArgs, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, spec: QuantSpec) -> None:
    weight.n, weight.row_words, weight.k = packed.shape[0], packed.shape[1], columns
    weight.words, weight.scale = packed.data_ptr(), scale.data_ptr()
    weight.group = columns
    if spec.granularity == "group":
        size = spec.group_size or 1
        weight.group = size
        if spec.flat_groups and columns % size:
            weight.flat = 1
        else:
            weight.scale_stride = -(-columns // size)
    elif spec.granularity == "channel":
        weight.scale_stride = 1
    if zero_point is not None and weight.zero_kind:
        weight.zero = zero_point.data_ptr()
        weight.zero_stride = weight.scale_stride


def refuses(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> str:
    """Why this backend does not run a call; empty if it does."""
    if native.library() is None:
        return "the C library was not built: no C compiler at installation"
    if x.device.type != "cpu":
        return f"for CPU tensors, not {x.device.type}"
    if op == "linear" and x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if op == "conv" and images.refuses(x, weight_spec, input_spec) and not onednn.refuses(op, x, weight_spec, input_spec):
        return "oneDNN convolves in integers"
    return ""


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors)


def describe(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> tuple[str, str]:
    """How this backend computes a call, and where it is slow."""
    isa = native.isa()
    if op == "embedding":
        return "only the rows asked for are dequantized", ""
    if op == "conv" and not images.refuses(x, weight_spec, input_spec):
        return f"int8 dot products, image by image ({isa})", ""
    if op in ("conv", "dequantize"):
        return f"dequantized at every call ({isa}), then torch's float operator", "slower than float, but smaller"
    slow = "" if native.LEVEL.value == "avx512" else f"{isa}: no AVX512 with VNNI, or it is masked: no faster than float"
    if input_spec is not None and input_spec.is_int:
        return f"codes multiplied as integers ({isa})", slow
    rounded = x.dtype == torch.bfloat16 or rounds_float32()
    if native.LEVEL.value != "avx512" or (native.LEVEL.amx and rounded):
        many = f"tiles for torch's {'bfloat16' if rounded else str(x.dtype).removeprefix('torch.')} GEMM"
    else:
        many = f"panels in {'bfloat16' if rounded and native.LEVEL.bf16 else 'float32'}"
    if not slow and not rounded and native.LEVEL.bf16 and input_spec is None:
        slow = (
            "many rows are multiplied in float32, slower than a bfloat16 model: use model.bfloat16(), "
            'or torch.set_float32_matmul_precision("medium")'
        )
    return f"up to 8 rows: unpacked in registers; more: {many} ({isa})", slow


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    axis: int,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.dequantize_weight`, the same values."""
    moved = [shape[axis], *(size for dim, size in enumerate(shape) if dim != axis)]
    out = torch.empty(moved, dtype=dtype if dtype in DTYPES else torch.float32)
    _rows(packed, scale, zero_point, math.prod(moved[1:]), spec, None, out)
    return out.movedim(0, axis).to(dtype)


def _rows(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, spec: QuantSpec, rows: Tensor | None, out: Tensor
) -> None:
    """Fill `out` `[rows, columns]` with dequantized rows: the first ones, or those whose int64 numbers are given."""
    found = native.library()
    assert found is not None
    packed, scale, zero_point = _contiguous(packed, scale, zero_point)  # type: ignore[assignment]
    weight = WeightArgs.from_buffer_copy(_template(spec, None).weight)
    _fill(weight, packed, scale, zero_point, columns, spec)
    count = len(out) if rows is None else rows.numel()
    index = None if rows is None else rows.data_ptr()
    if count and columns:
        found.lq_dequantize(ctypes.byref(weight), index, count, DTYPES[out.dtype], out.data_ptr())


def embedding(
    indices: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    embedding_dim: int,
    weight_spec: QuantSpec,
) -> Tensor:
    """`reference.embedding`: float32 rows, of which only those asked for are dequantized."""
    flat = indices.reshape(-1).to(torch.int64).contiguous()
    if flat.numel():
        low, high = torch.aminmax(flat)
        if int(low) < 0 or int(high) >= weight_packed.shape[0]:
            raise IndexError(f"embedding: indices from {int(low)} to {int(high)} in a table of {weight_packed.shape[0]} rows")
    out = torch.empty(flat.numel(), embedding_dim)
    _rows(weight_packed, weight_scale, weight_zero_point, embedding_dim, weight_spec, flat, out)
    return out.reshape(*indices.shape, embedding_dim)


def conv(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
) -> Tensor:
    """`reference.conv`: static int8 in integers, the rest in float with a weight that is dequantized at every call."""
    rest: Any = (weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, weight_shape)
    rest = (*rest, stride, padding, dilation, groups, transposed, output_padding, weight_spec, input_spec)
    in_float: Any = reference.conv
    if x.numel() and not images.refuses(x, weight_spec, input_spec):
        if not images.misfit(weight_shape, groups, transposed):
            return images.conv(x, *rest[:2], *rest[3:10], *rest[-2:])
        if not onednn.refuses("conv", x, weight_spec, input_spec, weight_shape, transposed):
            return onednn.conv(x, *rest)
    return in_float(x, *rest, dequantize=dequantize_weight)


def _as_float8(x: Tensor, scale: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """A float8 input `[rows, features]` as bfloat16 values, which hold its codes exactly, and a factor for each row."""
    if spec.dynamic:
        scale, _ = dynamic_qparams(x, spec)
    assert scale is not None
    factors = scale.reshape(-1, 1).float()
    bound = max_value(spec)
    codes = (x.float() * (1.0 / factors)).clamp(-bound, bound).to(FLOAT8[spec.dtype])
    return codes.to(torch.bfloat16), factors.expand(len(x), 1).contiguous()


_buffers = threading.local()


def _buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """A thread's scratch for tiles, kept between calls."""
    held = getattr(_buffers, "tile", None)
    if held is None or held.numel() < elements * dtype.itemsize:
        held = _buffers.tile = torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
    return held[: elements * dtype.itemsize].view(dtype)


def _tiles(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], spec: QuantSpec, bias: Tensor | None, out: Tensor, exact: bool
) -> None:
    """`out = x @ weight.T + bias`, with one tile of the weight dequantized at a time."""
    packed, scale, zero_point = weight
    channels, columns = packed.shape[0], x.shape[1]
    dtype = torch.bfloat16 if not exact and (native.LEVEL.bf16 or native.LEVEL.amx) else x.dtype
    if exact:
        dtype = torch.float32
    x = x.to(dtype)
    # whole words of packed zero points, and whole blocks of a flattened weight
    unit = spec.group_size or 1 if spec.flat_groups else 32
    tile = max(_TILE // max(columns, 1) // unit * unit, unit)
    for start in range(0, channels, tile):
        stop = min(start + tile, channels)
        part, scales, zeros = packed[start:stop], scale, zero_point
        if spec.flat_groups:
            scales = scale[start * columns // unit :]
        elif spec.granularity != "tensor":
            scales = scale[start:stop]
            if zero_point is not None:
                zeros = zero_point[start * spec.bits // 32 : -(-stop * spec.bits // 32)]
        values = _buffer((stop - start) * columns, dtype).view(stop - start, columns)
        _rows(part, scales, zeros, columns, spec, None, values)
        product = F.linear(x, values, None if bias is None else bias[start:stop].to(dtype))
        out[:, start:stop] = product


class Linear:
    """`linear` for one pair of specs: what only they decide is kept, and for each weight the C structure that describes it."""

    def __init__(self, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> None:
        self.weight_spec, self.input_spec = weight_spec, input_spec
        self.template = _template(weight_spec, input_spec)
        # codes of float8 inputs and of weights with one scale a channel are bfloat16 values, others' are not
        self.fine = weight_spec.granularity == "group" or weight_spec.dtype in CODEBOOKS
        # by addresses and shapes, which are all that the structure holds
        self.prepared: dict[tuple[Any, ...], LinearArgs] = {}
        found = native.library()
        assert found is not None
        self.run = found.lq_linear

    def _prepare(
        self, key: tuple[Any, ...], packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, columns: int
    ) -> LinearArgs:
        args = LinearArgs.from_buffer_copy(self.template)
        _fill(args.weight, packed, scale, zero_point, columns, self.weight_spec)
        if bias is not None:
            args.bias, args.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        if len(self.prepared) >= _PREPARED:
            self.prepared.clear()
        self.prepared[key] = args
        return args

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        in_features: int,
    ) -> Tensor:
        out = x.new_empty((*x.shape[:-1], packed.shape[0]))
        if not (x.is_contiguous() and packed.is_contiguous() and scale.is_contiguous()):
            x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
        if bias is not None and (bias.dtype not in DTYPES or not bias.is_contiguous()):
            bias = bias.to(x.dtype).contiguous()
        key = (
            packed.data_ptr(),
            packed.shape,
            scale.data_ptr(),
            in_features,
            0 if zero_point is None else zero_point.data_ptr(),
            None if bias is None else (bias.data_ptr(), bias.dtype),
        )
        args = self.prepared.get(key) or self._prepare(key, packed, scale, zero_point, bias, in_features)
        args = LinearArgs.from_buffer_copy(args)  # calls of other threads have their own
        rows = x.numel() // in_features if in_features else math.prod(x.shape[:-1])
        factors, spec = None, self.input_spec
        if spec is not None:
            if not spec.is_int:
                x, factors = _as_float8(x.reshape(rows, in_features), input_scale, spec)
                args.x_scale = factors.data_ptr()
            elif args.input == native.STATIC_INPUT:
                if spec.dynamic:
                    input_scale, input_zero_point = dynamic_qparams(x, spec)
                assert input_scale is not None
                assert input_zero_point is not None
                args.in_scale, args.in_zero = input_scale.data_ptr(), input_zero_point.data_ptr()
        args.x, args.m, args.x_stride, args.y = x.data_ptr(), rows, in_features, out.data_ptr()
        args.dtype, args.y_dtype = DTYPES[x.dtype], DTYPES[out.dtype]
        exact = self.fine if factors is not None else x.dtype != torch.bfloat16 and not rounds_float32()
        args.exact = exact
        by_tiles = False
        if native.LEVEL.amx and rows >= 16 and not exact:  # torch's GEMMs have it
            if args.input and not onednn.refuses("linear", x, self.weight_spec, spec, (len(packed), in_features)):
                weight = (packed, scale, zero_point)
                return onednn.linear(x, *weight, bias, input_scale, input_zero_point, in_features, self.weight_spec, spec)
            by_tiles = not args.input and factors is None
        status = native.REFUSED if by_tiles else self.run(ctypes.byref(args))
        if status == 0:
            return out
        if status != native.REFUSED:
            raise MemoryError(f"linear of {rows} rows and {in_features} features: no memory for scratch")
        flat, weight = x.reshape(rows, in_features), (packed, scale, zero_point)
        if args.input:
            exact, flat = True, reference.quantize_input(flat, input_scale, input_zero_point, spec)
        if factors is None:
            _tiles(flat, weight, self.weight_spec, bias, out.view(rows, -1), exact)
            return out
        _tiles(flat, weight, self.weight_spec, None, out.view(rows, -1), exact=True)
        out.view(rows, -1).mul_(factors)
        return out if bias is None else out.add_(bias)


@lru_cache(maxsize=256)
def bind(weight_spec: QuantSpec, input_spec: QuantSpec | None) -> Linear:
    """`linear` without its last two arguments."""
    return Linear(weight_spec, input_spec)


def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    in_features: int,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
) -> Tensor:
    """`F.linear` of the quantized input and the packed weight: `[..., in_features]` -> `[..., out_features]`.

    Integer inputs are multiplied as integers, exactly. From the ninth row on, bfloat16 inputs meet weights rounded to bfloat16
    (4- and 2-bit codes at any number of rows); float32 and float16 inputs do if `rounds_float32()`, and are multiplied in float32
    otherwise.
    """
    run = bind(weight_spec, input_spec)
    return run(x, weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, in_features)
