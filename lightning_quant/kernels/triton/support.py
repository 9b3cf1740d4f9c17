"""What the Triton kernels run on, and how a packed weight is described to them. Free of Triton itself."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.numerics import qrange
from lightning_quant.spec import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# where the zero point of an integer weight is
NO_ZERO, PACKED_ZERO, PLAIN_ZERO = 0, 1, 2


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _interpreter() -> bool:
    """Whether Triton was imported under `TRITON_INTERPRET=1`: setting the variable later changes only half of it."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.sum, JITFunction)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed() and _interpreter()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def refuses_device(x: Tensor) -> str:
    """Why the kernels cannot run on a tensor's device, in a few words; empty if they can."""
    if x.device.type == "cpu":
        return "" if interpreted() else "needs CUDA tensors, or TRITON_INTERPRET=1 before Triton is imported"
    if x.device.type != "cuda" or torch.version.hip:
        return f"needs CUDA tensors, not {'ROCm' if x.device.type == 'cuda' else x.device.type}"
    if not _installed():
        return "triton is not installed"
    return "" if _capability(x.device.index or 0) >= (8, 0) else "needs compute capability 8.0"


def fuses(*tensors: Tensor) -> bool:
    """Whether fake quantization runs here: on CUDA, unless `LQ_BACKEND` names another; interpreted only if it names this one."""
    x, backend = tensors[0], os.environ.get("LQ_BACKEND")
    if (backend or "triton" * x.is_cuda) != "triton" or x.dtype not in DTYPES:
        return False
    # what traces, batches or shards sees plain operators
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(value) in (Tensor, nn.Parameter) for value in tensors) and not refuses_device(x)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def weight_meta(spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, columns: int) -> dict[str, Any]:
    """Compile-time facts of a packed weight, by the names of the kernels' parameters.

    Args:
        spec: of the weight.
        scale, zero_point: as the operators take them.
        columns: codes in a row.

    Returns:
        KIND, BITS, OFFSET (what a stored integer is lowered by), ZERO (none, packed or plain), GROUP (0 per tensor, -1 per channel,
        else elements) and FLAT (groups run over ends of rows).
    """
    zero = NO_ZERO if zero_point is None else PLAIN_ZERO if spec.granularity == "tensor" else PACKED_ZERO
    size = spec.group_size or 1
    return {
        "KIND": spec.dtype,
        "BITS": spec.bits,
        "OFFSET": -qrange(spec)[0] if spec.is_int else 0,
        "ZERO": zero,
        "GROUP": {"tensor": 0, "channel": -1}.get(spec.granularity, size),
        "FLAT": spec.flat_groups and columns % size != 0,
    }


def tile_group(spec: QuantSpec, columns: int) -> int:
    """The group size that tiles have to fit in: 0 if a row has one scale, 1 if groups run over the ends of rows."""
    if spec.group_size is None:
        return 0
    return 1 if spec.flat_groups and columns % spec.group_size else spec.group_size


def group_count(spec: QuantSpec, columns: int) -> int:
    """Scales of a row.

    Example:
        >>> group_count(QuantSpec(4, granularity="group", group_size=64), 100)
        2
    """
    return -(-columns // spec.group_size) if spec.group_size else 1
