"""Int8 convolutions and what lies between them, run image by image in the C library (CPU).

A `Graph` says what is computed: convolutions with static int8 inputs, additions, clamps (ReLU), pools. `compile_graph` makes a
`Program` of it: an addition, a clamp and the next layer's quantization become the end of the convolution that they follow, and
what lies between two steps is in a thread's arena, a few hundred kilobytes that stay in the cache. Values are those of the single
operators: sums are exact, and what is added, clamped and quantized is float32.

The backend `cpu` runs single convolutions in the same way, as a program of one; `lightning_quant.regions` finds larger ones.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.kernels import native, onednn
from lightning_quant.kernels.images.compiler import compile_graph
from lightning_quant.kernels.images.graph import ConvWeight, Graph, Grid
from lightning_quant.kernels.images.program import Program
from lightning_quant.kernels.prepack import prepacked
from lightning_quant.numerics import qrange
from lightning_quant.spec import QuantSpec

# programs by their content: compiled code that is kept on disk finds the same one again, or none
_PROGRAMS: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()


def register(graph: Graph) -> tuple[str, Program]:
    """The key of a graph's program for the operator `lightning_quant::images`, and the program, which lives while it is held."""
    digest = hashlib.blake2b(digest_size=20)
    for value in graph.values:
        weight = value.conv
        digest.update(repr((value.op, value.inputs, value.shape, value.numbers, value.channels_last)).encode())
        if weight is not None:
            digest.update(repr((weight.grid, weight.stride, weight.padding, weight.dilation, weight.codes.shape)).encode())
            for tensor in (weight.codes, weight.scale, weight.bias):
                digest.update(b"" if tensor is None else tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((graph.outputs, graph.channels_last)).encode())
    key = digest.hexdigest()
    program = _PROGRAMS.get(key)
    if program is None:
        program = _PROGRAMS[key] = compile_graph(graph)
    return key, program


@torch.library.custom_op("lightning_quant::images", mutates_args=())
def images(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    """Run a program that `register` has made: float32 `[N, C, H, W]` each -> float32 `[N, C, H, W]` each."""
    return run_images(inputs, program)


def run_images(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    """The operator `images`, past torch's dispatcher."""
    return _PROGRAMS[program].run(inputs)


@images.register_fake
def _images_fake(inputs: Sequence[Tensor], program: str) -> list[Tensor]:
    count = inputs[0].shape[0]
    return [inputs[0].new_empty((count, *shape)).to(memory_format=layout) for shape, layout in _PROGRAMS[program].outputs]


# --- a single convolution -------------------------------------------------------------------------------------------

# sizes of images for which a layer keeps a program: some hundred bytes each
_SIZES = 64


def refuses(x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> str:
    """Why no convolution of such inputs is run here; empty if some are."""
    if native.library() is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return "convolves float32 on CPUs"
    if input_spec is None or input_spec.dynamic or not input_spec.is_int or input_spec.granularity != "tensor":
        return "convolves static integers"
    if not weight_spec.is_int or weight_spec.granularity not in ("tensor", "channel") or not weight_spec.symmetric:
        return "weights in groups or with a zero point"
    if native.LEVEL.amx:
        return "oneDNN has AMX"
    return "" if native.LEVEL.value == "avx512" or not onednn.is_exact() else "oneDNN has int8 dot products"


def misfit(weight_shape: Sequence[int], groups: int, transposed: bool) -> str:
    """Why a geometry is not run here; empty if it is."""
    if transposed or groups != 1 or len(weight_shape) not in (3, 4):
        return "groups, transposed and 3-D convolutions"
    return onednn.too_long(weight_shape)


class _Layer:
    """A convolution, and its programs by the size and layout of images."""

    def __init__(self, weight: ConvWeight) -> None:
        self.weight = weight
        self.programs: OrderedDict[tuple[torch.Size, bool], Program] = OrderedDict()

    def program(self, size: torch.Size, last: bool) -> Program:
        found = self.programs.get((size, last))
        if found is None:
            graph = Graph()
            channels, height, width = size
            graph.outputs = [graph.conv(graph.add("input", (), (channels, height, width), channels_last=last), self.weight)]
            graph.channels_last = [last]
            found = self.programs[size, last] = compile_graph(graph)
            while len(self.programs) > _SIZES:
                self.programs.popitem(last=False)
        return found


def conv(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    weight_spec: QuantSpec,
    input_spec: QuantSpec,
) -> Tensor:
    """`reference.conv` in integers, where neither `refuses` nor `misfit` has a reason. The output has the layout of `x`."""
    shape, numbers = tuple(weight_shape), tuple(tuple(values) for values in (stride, padding, dilation))

    def build() -> _Layer:
        codes, scale, _ = onednn.unpacked(weight_packed, weight_scale, shape, weight_spec)
        flat = [(neutral, *values) for neutral, values in zip((1, 0, 1), numbers, strict=True)] if len(shape) == 3 else numbers
        codes = codes[:, :, None] if len(shape) == 3 else codes
        low, high = qrange(input_spec)
        offset = 128 if input_spec.signed else 0
        grid = Grid(input_scale.item(), int(input_zero_point.item()) + offset, low + offset, high + offset)
        return _Layer(ConvWeight(codes, scale, None if bias is None else bias.detach().clone(), grid, *flat))

    tensors = (weight_packed, weight_scale, input_scale, input_zero_point)
    key = ("images", shape, numbers, weight_spec, input_spec)
    layer = prepacked(build, key, *tensors, *(() if bias is None else (bias,)))
    batch = x.detach() if x.dim() == len(shape) else x.detach()[None]
    batch = batch if len(shape) == 4 else batch[:, :, None]
    last = len(shape) == 4 and onednn.is_channels_last(batch)
    (out,) = layer.program(batch.shape[1:], last).run([batch])
    out = out if len(shape) == 4 else out.squeeze(2)
    return out if x.dim() == len(shape) else out[0]
