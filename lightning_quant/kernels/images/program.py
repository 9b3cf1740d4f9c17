"""A program in the C library's form, and how it is called (see `native/lq.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_quant.kernels import native
from lightning_quant.kernels.images.graph import Graph


class Place(ctypes.Structure):
    _fields_ = [("used", ctypes.c_int32), ("tensor", ctypes.c_int32), ("offset", ctypes.c_int64)]


class TensorArgs(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "in_h", "in_w", "in_c", "out_h", "out_w", "out_c")),
        *((name, ctypes.c_int32) for name in ("stride_h", "stride_w", "window_h", "window_w")),
        *((name, ctypes.c_int32) for name in ("top", "left", "bottom", "right", "shift")),
        *((name, Place) for name in ("in_", "other", "out", "codes")),
        *((name, ctypes.c_int64) for name in ("in_row", "in_pixel", "in_channel", "other_row", "other_pixel")),
        *((name, ctypes.c_int64) for name in ("out_row", "out_pixel", "out_channel", "code_row", "code_pixel")),
        *((name, ctypes.c_float) for name in ("low", "high", "inverse", "code_low", "code_high")),
        *(("code_zero", ctypes.c_int32), ("taps", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("offsets", "weight", "start", "scale", "bias")),
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        *(("steps", ctypes.c_void_p), ("count", ctypes.c_int64), ("tensors", ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("images", "arena", "work")),
    ]


class Program:
    """Steps in the C library's form. Call `run`; safe from several threads."""

    def __init__(self, steps: Any, kept: list[Any], arena: int, work: int, graph: Graph) -> None:
        self._steps, self._kept, self._arena, self._work = steps, kept, arena, work
        self._layouts = [value.channels_last for value in graph.values if value.op == "input"]
        shapes = [graph.values[index].shape for index in graph.outputs]
        self.outputs = [
            (shape, torch.channels_last if last else torch.contiguous_format)
            for shape, last in zip(shapes, graph.channels_last, strict=True)
        ]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Float32 `[N, C, H, W]` each -> float32 `[N, C, H, W]` each."""
        count = inputs[0].shape[0]
        given = []
        for x, last in zip(inputs, self._layouts, strict=True):
            given.append(x.contiguous(memory_format=torch.channels_last) if last else x.contiguous())
        outputs = [torch.empty((count, *shape), memory_format=layout) for shape, layout in self.outputs]
        tensors = (TensorArgs * (len(given) + len(outputs)))()
        for slot, tensor in zip(tensors, (*given, *outputs), strict=True):
            slot.data, slot.stride = tensor.data_ptr(), tensor.stride(0) * 4
        program = _Program(
            ctypes.addressof(self._steps), len(self._steps), ctypes.addressof(tensors), count, self._arena, self._work
        )
        found: Any = native.library()
        if found.lq_images(ctypes.byref(program)):
            raise MemoryError(f"no memory for {self._arena} bytes of scratch in each thread")
        return outputs
