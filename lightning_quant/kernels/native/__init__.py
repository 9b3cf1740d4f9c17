"""The package's C library (`*.c` beside this file), built at installation and called through ctypes.

`LQ_ISA` masks instruction sets: `avx512`, `avx2` or `portable`, the highest to use.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("liblq.so")
LEVELS = ("portable", "avx2", "avx512")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"int": 0, "nf4": 1, "fp4": 1, "float8_e4m3fn": 2, "float8_e5m2": 3}
NO_ZERO, PACKED_ZERO, ONE_ZERO = 0, 1, 2
FLOAT_INPUT, DYNAMIC_INPUT, STATIC_INPUT = 0, 1, 2
REFUSED = 1


class WeightArgs(ctypes.Structure):
    _fields_ = [
        *(("n", ctypes.c_int64), ("k", ctypes.c_int64)),
        *(("words", ctypes.c_void_p), ("row_words", ctypes.c_int64)),
        *(("scale", ctypes.c_void_p), ("scale_stride", ctypes.c_int64), ("group", ctypes.c_int64)),
        *(("zero", ctypes.c_void_p), ("zero_stride", ctypes.c_int64), ("zero_kind", ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("flat", "bits", "kind", "low", "swapped")),
        ("table", ctypes.c_float * 16),
    ]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("weight", WeightArgs),
        *(("x", ctypes.c_void_p), ("m", ctypes.c_int64), ("x_stride", ctypes.c_int64), ("y", ctypes.c_void_p)),
        *((name, ctypes.c_int32) for name in ("dtype", "y_dtype", "exact")),
        *(("bias", ctypes.c_void_p), ("bias_dtype", ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("input", "in_low", "in_high", "in_symmetric")),
        *((name, ctypes.c_void_p) for name in ("in_scale", "in_zero", "x_scale")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The C library, or None if it was not built."""
    if not LIBRARY.exists():
        return None
    found = ctypes.CDLL(str(LIBRARY))
    pointer = ctypes.c_void_p
    found.lq_linear.argtypes = [pointer]
    found.lq_dequantize.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    found.lq_dequantize.restype = None
    found.lq_quantize_tensor.argtypes = [
        *(pointer, ctypes.c_int32, ctypes.c_int64, ctypes.c_float),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, pointer),
    ]
    found.lq_quantize_tensor.restype = None
    found.lq_images.argtypes = [pointer]
    use(os.environ.get("LQ_ISA", LEVELS[-1]), found)
    return found


def use(isa: str, found: ctypes.CDLL | None = None) -> str:
    """Take an instruction set of `LEVELS`, or the best below it that this machine has; returns which.

    Raises:
        ValueError: no such instruction set.
    """
    if isa not in LEVELS:
        raise ValueError(f"LQ_ISA={isa!r}: no such instruction set; valid: {', '.join(LEVELS)}")
    found = found or library()
    level = LEVELS[found.lq_use(LEVELS.index(isa))] if found is not None else LEVELS[0]
    LEVEL.value = level
    LEVEL.bf16 = bool(found is not None and found.lq_has_bf16())
    LEVEL.amx = level == "avx512" and _has_amx()
    return level


class Level:
    """What `use` found."""

    value = LEVELS[0]
    bf16 = False
    amx = False


LEVEL = Level()


def _has_amx() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check is not None and check())


def isa() -> str:
    """The instruction set in use, a word of `LEVELS`; with what matters beside it."""
    library()
    return LEVEL.value + (" bf16" if LEVEL.bf16 else "") + (" amx" if LEVEL.amx else "")


def quantize(x: Tensor, scale: float, zero_point: int, limits: tuple[int, int]) -> Tensor:
    """`clamp(round(x * (1 / scale)) + zero_point, *limits)` as uint8, in one pass and, if `x` is dense, in its layout."""
    found = library()
    assert found is not None
    out = torch.empty_like(x, dtype=torch.uint8)
    if out.stride() != x.stride():
        x = x.contiguous()
        out = torch.empty_like(x, dtype=torch.uint8)
    found.lq_quantize_tensor(x.data_ptr(), DTYPES[x.dtype], x.numel(), scale, zero_point, *limits, out.data_ptr())
    return out
