"""`nn.LSTM` and `nn.GRU`: quantized weights, and dynamically quantized inputs and hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.fake_quant import widened
from lightning_quant.functional import dynamic_fake_quantize
from lightning_quant.kernels import run_linear
from lightning_quant.nn.fake import FakeModule
from lightning_quant.nn.packed import PackedModule
from lightning_quant.spec import QuantScheme, QuantSpec

# (weight's name, input, bias) -> output: one of a recurrent layer's matrix products
Project = Callable[[str, Tensor, Tensor | None], Tensor]


def _names(module: nn.RNNBase, kind: str) -> list[str]:
    return [name for names in module._all_weights for name in names if name.startswith(kind)]


class _Recurrent(nn.RNNBase):
    """What the fake and the packed modules share: the scheme they can follow, and the forward pass."""

    input_names = ()
    scheme: QuantScheme

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return dict.fromkeys(_names(module, "weight"), 0)  # type: ignore[arg-type]

    @classmethod
    def adapt(cls, module: nn.Module, scheme: QuantScheme) -> tuple[QuantScheme, str]:
        notes = []
        if scheme.input is not None and not scheme.input.dynamic:
            notes.append("input: float, recurrent layers take dynamic activations only")
            scheme = replace(scheme, input=None)
        if scheme.output is not None:
            notes.append("output: float, the next step reads it")
            scheme = replace(scheme, output=None)
        return scheme, "; ".join(notes)

    def float_weights(self) -> dict[str, Tensor]:
        """The weights on their grid, by name."""
        raise NotImplementedError

    def quantizes_input(self) -> QuantSpec | None:
        return self.scheme.input

    def project(self) -> Project:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, restore = input
            out, hidden = self._run(data, batch_sizes, hx if hx is None else self._permute(hx, order), int(batch_sizes[0]))
            return PackedSequence(out, batch_sizes, order, restore), self._permute(hidden, restore)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__} takes [time, features] or a batch of it, not {input.dim()} dimensions")
        if input.dim() == 2:
            states = None if hx is None else self._map(hx, lambda state: state.unsqueeze(1))
            dim = 0 if self.batch_first else 1
            out, hidden = self._run(input.unsqueeze(dim), None, states, 1)
            return out.squeeze(dim), self._map(hidden, lambda state: state.squeeze(1))
        return self._run(input, None, hx, input.shape[0 if self.batch_first else 1])

    def _map(self, states: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        return tuple(fn(state) for state in states) if self.mode == "LSTM" else fn(states)

    def _permute(self, states: Any, order: Tensor | None) -> Any:
        return states if order is None else self._map(states, lambda state: state.index_select(1, order))

    def _zeros(self, data: Tensor, batch: int) -> Any:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        hidden = data.new_zeros(layers, batch, self.proj_size or self.hidden_size)
        return (hidden, data.new_zeros(layers, batch, self.hidden_size)) if self.mode == "LSTM" else hidden

    def _run(self, data: Tensor, batch_sizes: Tensor | None, states: Any, batch: int) -> tuple[Tensor, Any]:
        states = self._zeros(data, batch) if states is None else states
        if self.quantizes_input() is not None:
            return self._run_stepwise(data, batch_sizes, states)
        weights = self.float_weights()
        flat = [
            weights[name].to(data.dtype) if name in weights else getattr(self, name)
            for names in self._all_weights
            for name in names
        ]
        fused: Any = torch.lstm if self.mode == "LSTM" else torch.gru
        shape = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            out, *hidden = fused(data, states, flat, *shape, self.batch_first)
        else:
            out, *hidden = fused(data, batch_sizes, states, flat, *shape)
        return out, tuple(hidden) if self.mode == "LSTM" else hidden[0]

    def _run_stepwise(self, data: Tensor, batch_sizes: Tensor | None, states: Any) -> tuple[Tensor, Any]:
        """Time step by time step, so that each hidden state is quantized before the product that reads it."""
        steps, batch = None, 0
        if batch_sizes is None:
            data = data.transpose(0, 1) if self.batch_first else data
            steps, batch = data.shape[:2]
            data = data.flatten(0, 1)
        sizes = [batch] * steps if steps is not None else batch_sizes.tolist()  # type: ignore[union-attr]
        project = self.project()
        finals = []
        states = states if self.mode == "LSTM" else (states,)
        directions = ["", "_reverse"] if self.bidirectional else [""]
        for layer in range(self.num_layers):
            outs = []
            for number, direction in enumerate(directions):
                initial = tuple(state[layer * len(directions) + number] for state in states)
                out, final = self._run_direction(f"l{layer}{direction}", data, sizes, initial, project)
                outs.append(out)
                finals.append(final)
            data = torch.cat(outs, dim=-1)
            if layer + 1 < self.num_layers:
                data = F.dropout(data, self.dropout, self.training)
        hidden = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if steps is not None:
            data = data.unflatten(0, (steps, batch))
            data = data.transpose(0, 1) if self.batch_first else data
        return data, hidden if self.mode == "LSTM" else hidden[0]

    def _run_direction(
        self, suffix: str, data: Tensor, sizes: list[int], initial: tuple[Tensor, ...], project: Project
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: `data` is `[sum(sizes), features]`, sorted so that `sizes` never grows."""
        bias_ih, bias_hh = (getattr(self, f"bias_{kind}_{suffix}") if self.bias else None for kind in ("ih", "hh"))
        gates_in = project(f"weight_ih_{suffix}", data, bias_ih).split(sizes)
        reverse = suffix.endswith("reverse")
        outs: list[Tensor] = []
        ended: list[tuple[Tensor, ...]] = []  # states of sequences that are over, shortest first
        state = tuple(part[: sizes[-1] if reverse else sizes[0]] for part in initial)
        for step in reversed(range(len(sizes))) if reverse else range(len(sizes)):
            size, width = sizes[step], state[0].shape[0]
            if size < width:
                ended.append(tuple(part[size:] for part in state))
                state = tuple(part[:size] for part in state)
            elif size > width:
                state = tuple(torch.cat([part, start[width:size]]) for part, start in zip(state, initial, strict=True))
            state = self._step(suffix, gates_in[step], project(f"weight_hh_{suffix}", state[0], bias_hh), state, project)
            outs.append(state[0])
        parts = [state, *reversed(ended)]
        final = tuple(torch.cat([part[index] for part in parts]) for index in range(len(state)))
        return torch.cat(outs[::-1] if reverse else outs), final

    def _step(self, suffix: str, x: Tensor, h: Tensor, state: tuple[Tensor, ...], project: Project) -> tuple[Tensor, ...]:
        """One time step from the two products `[batch, gates * hidden]`, as in the docs of `nn.LSTM` and `nn.GRU`."""
        if self.mode == "LSTM":
            i, f, g, o = (x + h).chunk(4, dim=-1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            return (project(f"weight_hr_{suffix}", hidden, None) if self.proj_size else hidden), cell
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
        update = (xz + hz).sigmoid()
        new = (xn + (xr + hr).sigmoid() * hn).tanh()
        return ((1 - update) * new + update * state[0],)


class _FakeRecurrent(_Recurrent, FakeModule):
    def float_weights(self) -> dict[str, Tensor]:
        return {name: self.fake_weight(name) for name in self.weight_axes(self)}

    def quantizes_input(self) -> QuantSpec | None:
        """The fused kernel runs until fake quantization starts."""
        quantizing = self.quantizes_activations and all(quantizer.quantizing for _, quantizer in self.quantizers())
        return widened(self.scheme.input, self.min_bits) if quantizing and self.scheme.input is not None else None

    def project(self) -> Project:
        weights, spec = self.float_weights(), self.quantizes_input()
        assert spec is not None
        return lambda name, x, bias: F.linear(dynamic_fake_quantize(x, spec), weights[name], bias)


class _PackedRecurrent(_Recurrent, PackedModule):
    @classmethod
    def empty(cls, module: nn.Module, scheme: QuantScheme, device: torch.device | str | None = None) -> Any:
        packed = super().empty(module, scheme, device)
        # torch's flat list would keep the float weights alive
        packed._flat_weights, packed._flat_weights_names, packed._flat_weight_refs = [], [], []
        return packed

    def flatten_parameters(self) -> None:
        """Nothing to flatten: the weights are packed."""

    @property
    def optional_float(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(_names(self, "bias"))

    def packed_shape(self, name: str) -> list[int]:
        kind, suffix = name.split("_")[1], name.partition("_l")[2]
        if kind == "hr":
            return [self.proj_size, self.hidden_size]
        gates = (4 if self.mode == "LSTM" else 3) * self.hidden_size
        hidden = self.proj_size or self.hidden_size
        if kind == "hh":
            return [gates, hidden]
        first = suffix.partition("_")[0] == "0"
        return [gates, self.input_size if first else hidden * (2 if self.bidirectional else 1)]

    @property
    def operator(self) -> str:  # type: ignore[override]
        return "dequantize" if self.quantizes_input() is None else "linear"

    def float_weights(self) -> dict[str, Tensor]:
        return {name: self.dequantized_weight(name) for name in self.weight_axes(self)}

    def project(self) -> Project:
        weights = {name: (*self.packed_weight(name), self.packed_shape(name)[1]) for name in self.weight_axes(self)}

        def project(name: str, x: Tensor, bias: Tensor | None) -> Tensor:
            packed, scale, zero_point, features = weights[name]
            return run_linear(x, packed, scale, zero_point, bias, None, None, features, *self.spec_args)

        return project


class PackedLSTM(_PackedRecurrent, nn.LSTM):
    """An LSTM with packed weights; a dynamic input scheme also quantizes every hidden state."""


class PackedGRU(_PackedRecurrent, nn.GRU):
    """A GRU with packed weights; a dynamic input scheme also quantizes every hidden state."""


class FakeLSTM(_FakeRecurrent, nn.LSTM):
    """`nn.LSTM` with quantizers."""

    packed_type = PackedLSTM


class FakeGRU(_FakeRecurrent, nn.GRU):
    """`nn.GRU` with quantizers."""

    packed_type = PackedGRU
