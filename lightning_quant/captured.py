"""Packed layers in a graph that torch.compile has captured."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from lightning_quant.kernels import onednn
from lightning_quant.numerics import qrange
from lightning_quant.spec import QuantSpec

_IMAGE_DIMS = (3, 4)


@dataclass(frozen=True, eq=False)
class Layer:
    """A packed linear layer or convolution with static int8 inputs, whose parameters are known.

    Args:
        op: linear or conv.
        args: the operator's, by name.
        packed, scale: of the weight.
        bias: its value, or None.
        step, zero_point: of the input, whose codes have no sign.
    """

    op: str
    args: dict[str, Any]
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    step: float
    zero_point: int

    @property
    def by_input(self) -> QuantSpec:
        return QuantSpec.decode(self.args["input_spec"])

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code of the input."""
        low, high = qrange(self.by_input)
        offset = 128 if self.by_input.signed else 0
        return low + offset, high + offset

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.args["weight_shape"]) if self.op == "conv" else (self.packed.shape[0], self.args["in_features"])

    @cached_property
    def weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points, as `onednn.unpacked` gives them."""
        return onednn.unpacked(self.packed, self.scale, self.shape, QuantSpec.decode(self.args["weight_spec"]))


def read(node: fx.Node, graph: fx.GraphModule, backend: str) -> Layer | None:
    """The layer that a node is; None if it is none, or is not to be run by a backend of `KERNELS`."""
    op = str(node.target).removeprefix("lightning_quant.").removesuffix(".default")
    if op not in ("linear", "conv") or not str(node.target).startswith("lightning_quant."):
        return None
    args: dict[str, Any] = dict(zip(_names(op), node.args)) | dict(node.kwargs)
    x = args["x"].meta.get("example_value")
    if not isinstance(x, Tensor) or not args["input_spec"] or _is_other(backend, args.get("backend", "")):
        return None
    weight_spec, by_input = QuantSpec.decode(args["weight_spec"]), QuantSpec.decode(args["input_spec"])
    dims = len(args.get("weight_shape", (0, 0)))
    if by_input.dynamic or (op == "conv" and (dims not in _IMAGE_DIMS or x.dim() != dims)) or (op == "linear" and x.dim() < 2):
        return None
    if onednn.refuses(op, x, weight_spec, by_input, args.get("weight_shape"), args.get("transposed", False)):
        return None
    names = ("weight_packed", "weight_scale", "input_scale", "input_zero_point")
    constants = [_constant(args[name], graph) for name in names]
    bias = _constant(args["bias"], graph)
    if any(value is None for value in constants) or (bias is None and args["bias"] is not None):
        return None
    packed, scale, step, zero_point = (value for value in constants if value is not None)
    return Layer(op, args, packed, scale, bias, step.item(), int(zero_point.item()) + (128 if by_input.signed else 0))


def _names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.lightning_quant, op).default._schema.arguments]


def _is_other(backend: str, asked: str) -> bool:
    forced = os.environ.get("LQ_BACKEND")
    return forced != backend if forced else asked not in ("", "native", backend)


def _constant(node: Any, graph: fx.GraphModule) -> Tensor | None:
    """The tensor behind a node, if it is an attribute of the graph."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None
