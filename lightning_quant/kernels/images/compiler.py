"""Graph -> program: which step computes what, and where it lies in the arena."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lightning_quant.kernels.images.graph import INFINITY, LANES, TAP, ConvWeight, Graph, Grid, Value, up
from lightning_quant.kernels.images.program import Place, Program, Step

_CONV, _QUANTIZE, _COPY, _MAX_POOL, _MEAN, _STORE = range(6)


@dataclass
class _Buffer:
    """Bytes of the arena that live from one step to another."""

    size: int
    first: int = -1
    last: int = -1
    offset: int = 0

    def touch(self, step: int) -> None:
        self.first, self.last = (step if self.first < 0 else self.first), step


@dataclass
class _Map:
    """Where a value's floats are, and how far apart."""

    where: _Buffer | int
    row: int
    pixel: int
    channel: int = 1


@dataclass
class _Frame:
    """Where a value's codes are, with a border of `top` and `left`, on both sides."""

    where: _Buffer
    row: int
    pixel: int
    top: int
    left: int


def compile_graph(graph: Graph) -> Program:
    """The program of a graph: see the module."""
    return _Compiler(graph).compile()


class _Compiler:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.values = graph, graph.values
        self.users: list[list[int]] = [[] for _ in self.values]
        for index, value in enumerate(self.values):
            for given in value.inputs:
                self.users[given].append(index)
        for index in graph.outputs:
            self.users[index].append(-1)
        self.steps: list[tuple[Step, dict[str, _Buffer | int]]] = []
        self.buffers: list[_Buffer] = []
        self.kept: list[Any] = []
        self.maps: dict[int, _Map] = {}
        self.frames: dict[tuple[int, Grid], _Frame] = {}
        self.work = 0
        self.tensors = [index for index, value in enumerate(self.values) if value.op == "input"]
        self.absorbed: dict[int, list[int]] = {}  # the last value of a convolution and what follows it -> all of them
        self._fuse()

    def _fuse(self) -> None:
        """Give each convolution the addition and the clamp that follow it, if nothing else reads what is between."""
        taken: set[int] = set()
        for index, value in enumerate(self.values):
            if value.op != "conv":
                continue
            chain = [index]
            for wanted in ("add", "clamp"):
                users = self.users[chain[-1]]
                if len(users) != 1 or users[0] < 0 or users[0] in taken or self.values[users[0]].op != wanted:
                    continue
                chain.append(users[0])
            taken.update(chain)
            self.absorbed[chain[-1]] = chain

    def compile(self) -> Program:
        inside = {index for chain in self.absorbed.values() for index in chain[:-1]}
        for index, value in enumerate(self.values):
            if index in self.absorbed:
                self._conv(index, self.absorbed[index])
            elif index not in inside:
                getattr(self, f"_{value.op}")(index, value)
            self._more_codes(index)
        self._store()
        arena = self._allocate()
        steps = (Step * len(self.steps))()
        for number, (step, places) in enumerate(self.steps):
            for name, where in places.items():
                tensor, offset = (where, 0) if isinstance(where, int) else (-1, where.offset)
                setattr(step, name, Place(1, tensor, offset))
            steps[number] = step
        return Program(steps, self.kept, arena, max(self.work, 1), self.graph)

    # --- where values are ---

    def _buffer(self, size: int) -> _Buffer:
        self.buffers.append(_Buffer(up(size, 64) + 64))
        return self.buffers[-1]

    def _emit(self, kind: int, places: dict[str, _Buffer | int], **numbers: Any) -> None:
        fields = {"low": -INFINITY, "high": INFINITY, "stride_h": 1, "stride_w": 1, "in_channel": 1, "out_channel": 1, **numbers}
        step = Step(kind=kind, **{name: value for name, value in fields.items() if value is not None})
        for where in places.values():
            if isinstance(where, _Buffer):
                where.touch(len(self.steps))
        self.steps.append((step, places))

    def _reads_floats(self, index: int) -> bool:
        """Whether a value is returned, or used by more than convolutions."""
        return any(user < 0 or self.values[user].op != "conv" for user in self.users[index])

    def _direct(self, index: int) -> int | None:
        """The tensor that a value is written to at once: an output whose pixels lie as those of a map."""
        for place, (output, last) in enumerate(zip(self.graph.outputs, self.graph.channels_last, strict=True)):
            if output == index and last and self.values[index].shape[0] % LANES == 0:
                return len(self.tensors) + place
        return None

    def _new_map(self, index: int) -> _Map:
        channels, height, width = self.values[index].shape
        pixel = up(channels, LANES)
        direct = self._direct(index)
        found = _Map(self._buffer(4 * pixel * height * width) if direct is None else direct, pixel * width, pixel)
        self.maps[index] = found
        return found

    def _frame(self, index: int, grid: Grid) -> _Frame:
        channels, height, width = self.values[index].shape
        weights = [self.values[user].conv for user in self.users[index] if user >= 0]
        paddings = [weight.padding for weight in weights if weight is not None and weight.grid == grid]
        top, left = (max(padding[axis] for padding in paddings) for axis in range(2))
        pixel = up(channels, TAP)
        row = pixel * (width + 2 * left)
        frame = _Frame(self._buffer(row * (height + 2 * top)), row, pixel, top, left)
        self.frames[index, grid] = frame
        return frame

    def _grids(self, index: int) -> list[Grid]:
        """The grids on which convolutions read a value."""
        found = [self.values[user].conv for user in self.users[index] if user >= 0]
        return list(dict.fromkeys(weight.grid for weight in found if weight is not None))

    def _code_fields(self, frame: _Frame, grid: Grid) -> dict[str, Any]:
        inverse = float(torch.tensor(1.0) / torch.tensor(grid.scale))
        limits = {"code_low": float(grid.low - grid.zero_point), "code_high": float(grid.high - grid.zero_point)}
        border = {"top": frame.top, "bottom": frame.top, "left": frame.left, "right": frame.left}
        return {
            **border,
            **limits,
            "inverse": inverse,
            "code_zero": grid.zero_point,
            "code_row": frame.row,
            "code_pixel": frame.pixel,
        }

    def _layout(self, index: int) -> tuple[int, int, int]:
        """Row, pixel and channel distance of an input tensor."""
        channels, height, width = self.values[index].shape
        return (width * channels, channels, 1) if self.values[index].channels_last else (width, 1, height * width)

    # --- steps ---

    def _sizes(self, index: int) -> dict[str, int]:
        channels, height, width = self.values[index].shape
        return {"out_c": channels, "out_h": height, "out_w": width}

    def _input(self, index: int, value: Value) -> None:
        row, pixel, channel = self._layout(index)
        tensor = self.tensors.index(index)
        if channel == 1 and pixel % LANES == 0:
            self.maps[index] = _Map(tensor, row, pixel)
        elif self._reads_floats(index):
            found = self._new_map(index)
            given = {"in_row": row, "in_pixel": pixel, "in_channel": channel, "in_c": value.shape[0]}
            own = {"out_row": found.row, "out_pixel": found.pixel}
            self._emit(_COPY, {"in_": tensor, "out": found.where}, **given, **own, **self._sizes(index))

    def _more_codes(self, index: int) -> None:
        """Codes of a value that no convolution has written."""
        for grid in self._grids(index):
            if (index, grid) in self.frames:
                continue
            frame = self._frame(index, grid)
            found = self.maps.get(index)
            if found is None:
                row, pixel, channel = self._layout(index)
                found = _Map(self.tensors.index(index), row, pixel, channel)
            given = {"in_row": found.row, "in_pixel": found.pixel, "in_channel": found.channel}
            places: dict[str, _Buffer | int] = {"in_": found.where, "codes": frame.where}
            self._emit(_QUANTIZE, places, **given, **self._code_fields(frame, grid), **self._sizes(index))

    def _conv(self, index: int, chain: list[int]) -> None:
        conv = self.values[chain[0]]
        weight: Any = conv.conv
        frame = self.frames[conv.inputs[0], weight.grid]
        places: dict[str, _Buffer | int] = {"in_": frame.where}
        fields: dict[str, Any] = {"stride_h": weight.stride[0], "stride_w": weight.stride[1], **self._weight(weight, frame)}
        fields |= {"in_row": frame.row, "in_pixel": frame.pixel}
        for before, number in pairwise(chain):
            value = self.values[number]
            if value.op == "add":
                other = self.maps[value.inputs[0] if value.inputs[1] == before else value.inputs[1]]
                places["other"] = other.where
                fields |= {"other_row": other.row, "other_pixel": other.pixel}
            else:
                fields |= {"low": value.numbers[0], "high": value.numbers[1]}
        grids = self._grids(index)
        if self._reads_floats(index) or len(grids) > 1:
            found = self._new_map(index)
            places["out"] = found.where
            fields |= {"out_row": found.row, "out_pixel": found.pixel}
        if grids:
            own = self._frame(index, grids[0])
            places["codes"] = own.where
            fields |= self._code_fields(own, grids[0])
        self._emit(_CONV, places, **fields, **self._sizes(index))
        channels, height, width = conv.shape
        self.work += channels * height * width * weight.codes[0].numel()

    def _weight(self, weight: ConvWeight, frame: _Frame) -> dict[str, Any]:
        """A convolution's weight, and where its inputs are."""
        kernel_h, kernel_w = weight.codes.shape[2:]
        rows = torch.arange(kernel_h) * weight.dilation[0] + frame.top - weight.padding[0]
        columns = torch.arange(kernel_w) * weight.dilation[1] + frame.left - weight.padding[1]
        offsets = (rows * frame.row)[:, None, None] + (columns * frame.pixel)[:, None] + torch.arange(0, frame.pixel, TAP)
        tensors = {"offsets": offsets.flatten().int(), **weight.arranged}
        self.kept.extend(tensors.values())
        return {"taps": offsets.numel(), **{name: tensor.data_ptr() for name, tensor in tensors.items()}}

    def _copied(self, index: int, value: Value, kind: int = _COPY, **fields: Any) -> None:
        given, found = self.maps[value.inputs[0]], self._new_map(index)
        channels, height, width = self.values[value.inputs[0]].shape
        sizes = {"in_c": channels, "in_h": height, "in_w": width, **self._sizes(index)}
        strides = {"in_row": given.row, "in_pixel": given.pixel, "out_row": found.row, "out_pixel": found.pixel}
        places: dict[str, _Buffer | int] = {"in_": given.where, "out": found.where}
        if value.op == "add":
            other = self.maps[value.inputs[1]]
            places["other"] = other.where
            strides |= {"other_row": other.row, "other_pixel": other.pixel}
        self._emit(kind, places, **sizes, **strides, **fields)

    def _add(self, index: int, value: Value) -> None:
        self._copied(index, value)

    def _clamp(self, index: int, value: Value) -> None:
        self._copied(index, value, low=value.numbers[0], high=value.numbers[1])

    def _slice(self, index: int, value: Value) -> None:
        self._copied(index, value, stride_h=value.numbers[0], stride_w=value.numbers[1])

    def _pad(self, index: int, value: Value) -> None:
        self._copied(index, value, shift=value.numbers[0])

    def _max_pool(self, index: int, value: Value) -> None:
        (window_h, window_w), (stride_h, stride_w), (top, left) = value.numbers
        window = {"window_h": window_h, "window_w": window_w, "top": top, "left": left}
        self._copied(index, value, _MAX_POOL, stride_h=stride_h, stride_w=stride_w, **window)

    def _mean(self, index: int, value: Value) -> None:
        given = self.maps[value.inputs[0]]
        _, height, width = self.values[value.inputs[0]].shape
        tensor = len(self.tensors) + self.graph.outputs.index(index)
        strides = {"in_row": given.row, "in_pixel": given.pixel, "in_h": height, "in_w": width}
        self._emit(_MEAN, {"in_": given.where, "out": tensor}, **strides, **self._sizes(index))

    def _store(self) -> None:
        """Write the outputs that no step has written yet."""
        for place, (index, last) in enumerate(zip(self.graph.outputs, self.graph.channels_last, strict=True)):
            tensor = len(self.tensors) + place
            if self.values[index].op == "mean" or self.maps[index].where == tensor:
                continue
            channels, height, width = self.values[index].shape
            row, pixel, channel = (width * channels, channels, 1) if last else (width, 1, height * width)
            given = {"in_row": self.maps[index].row, "in_pixel": self.maps[index].pixel}
            own = {"out_row": row, "out_pixel": pixel, "out_channel": channel}
            self._emit(_STORE, {"in_": self.maps[index].where, "out": tensor}, **given, **own, **self._sizes(index))

    def _allocate(self) -> int:
        """Offsets of the buffers: those that live at the same time do not overlap. Returns the bytes needed."""
        placed: list[_Buffer] = []
        for buffer in sorted(self.buffers, key=lambda buffer: -buffer.size):
            near = sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset)
            offset = 0
            for other in near:
                if offset + buffer.size <= other.offset:
                    break
                offset = max(offset, other.offset + other.size)
            buffer.offset = offset
            placed.append(buffer)
        return max((buffer.offset + buffer.size for buffer in self.buffers), default=64)
