"""What each quantized module should compute, in float64, from the float module and the range that the packed one stores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from tests.helpers import own_activation, own_weight, stored_activation

CONVS = {
    False: {1: F.conv1d, 2: F.conv2d, 3: F.conv3d},
    True: {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d},
}


def double(value: Any) -> Any:
    if isinstance(value, (Tensor, PackedSequence)):
        data = value.data if isinstance(value, PackedSequence) else value
        return value.double() if data.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(double(item) for item in value)
    return {key: double(item) for key, item in value.items()} if isinstance(value, dict) else value


def bias_of(module: nn.Module, name: str = "bias") -> Tensor | None:
    bias = getattr(module, name, None)
    return None if bias is None else bias.detach().double()


def linear(packed: nn.Module, plain: nn.Module, x: Tensor) -> Tensor:
    weight = own_weight(packed, plain.weight, 0)
    return F.linear(stored_activation(x, packed), weight, bias_of(plain))


def conv1d_of_transformers(packed: nn.Module, plain: nn.Module, x: Tensor) -> Tensor:
    return stored_activation(x, packed) @ own_weight(packed, plain.weight, 1) + bias_of(plain)


def convolution(packed: nn.Module, plain: _ConvNd, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    dims = len(plain.kernel_size)
    weight, x = own_weight(packed, plain.weight, int(plain.transposed)), stored_activation(x, packed, -dims - 1)
    run = CONVS[plain.transposed][dims]
    if plain.transposed:
        extra = plain.output_padding
        if output_size is not None:
            full = [(size - 1) * s - 2 * p + d * (k - 1) + 1 for size, s, p, d, k in geometry(plain, x)]
            extra = [want - have for want, have in zip(output_size, full)]
        return run(x, weight, bias_of(plain), plain.stride, plain.padding, extra, plain.groups, plain.dilation)
    if plain.padding_mode != "zeros":
        x = F.pad(x, plain._reversed_padding_repeated_twice, mode=plain.padding_mode)
    padding = plain.padding if plain.padding_mode == "zeros" else 0
    return run(x, weight, bias_of(plain), plain.stride, padding, plain.dilation, plain.groups)


def geometry(plain: _ConvNd, x: Tensor) -> zip:
    return zip(x.shape[-len(plain.kernel_size) :], plain.stride, plain.padding, plain.dilation, plain.kernel_size)


def embedding(packed: nn.Module, plain: nn.Module, index: Tensor) -> Tensor:
    return own_weight(packed, plain.weight, 0)[index]


def embedding_bag(packed: nn.Module, plain: nn.Module, *args: Any) -> Tensor:
    exact = copy.deepcopy(plain).double()
    exact.weight = nn.Parameter(own_weight(packed, plain.weight, 0))
    return exact(*double(args))


def recurrent(packed: nn.Module, plain: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    weights = {name: own_weight(packed, value, 0, name) for name, value in plain.named_parameters() if name.startswith("weight")}
    if packed.scheme.input is None:
        exact = copy.deepcopy(plain).double()
        exact.load_state_dict({**double(dict(plain.state_dict())), **weights})
        return exact(double(x), double(hx))
    biases = {name: bias_of(plain, name) for name, _ in plain.named_parameters() if name.startswith("bias")}

    def project(name: str, value: Tensor) -> Tensor:
        bias = biases.get(name.replace("weight", "bias"))
        return F.linear(own_activation(value, packed.scheme.input, None, None), weights[name], bias)

    def run(sequence: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return one_sequence(plain, project, sequence.double(), states)

    count = plain.num_layers * (2 if plain.bidirectional else 1)
    lstm = isinstance(plain, nn.LSTM)
    sizes = [plain.proj_size or plain.hidden_size, *([plain.hidden_size] if lstm else [])]
    batched = isinstance(x, PackedSequence) or x.dim() == 3
    if isinstance(x, PackedSequence):
        parts = unpack_sequence(x)
    else:
        parts = list(x.unbind(0 if plain.batch_first else 1)) if batched else [x]
    given = None if hx is None else (hx if lstm else (hx,))
    outs, finals = [], []
    for number, part in enumerate(parts):
        if given is None:
            states = [torch.zeros(count, size, dtype=torch.float64) for size in sizes]
        else:
            states = [(state[:, number] if batched else state).double() for state in given]
        out, final = run(part, states)
        outs.append(out)
        finals.append(final)
    hidden = tuple(torch.stack(values, dim=1) if batched else values[0] for values in zip(*finals))
    hidden = hidden if lstm else hidden[0]
    if isinstance(x, PackedSequence):
        return pack_sequence(outs, enforce_sorted=False), hidden
    return (torch.stack(outs, dim=0 if plain.batch_first else 1) if batched else outs[0]), hidden


def one_sequence(
    plain: nn.RNNBase, project: Callable[[str, Tensor], Tensor], x: Tensor, states: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`[time, features]` through every layer and direction, by the equations in the docs of `nn.LSTM` and `nn.GRU`."""
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(plain.num_layers):
        outs = []
        for direction in range(2 if plain.bidirectional else 1):
            suffix = f"l{layer}" + "_reverse" * direction
            state = tuple(part[len(finals)] for part in states)
            steps = []
            for value in x.flip(0) if direction else x:
                state = step(plain, project, suffix, value, state)
                steps.append(state[0])
            finals.append(state)
            outs.append(torch.stack(steps[::-1] if direction else steps))
        x = torch.cat(outs, dim=-1)
    return x, [torch.stack(parts) for parts in zip(*finals)]


def step(
    plain: nn.RNNBase, project: Callable[[str, Tensor], Tensor], suffix: str, x: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    given, kept = project(f"weight_ih_{suffix}", x), project(f"weight_hh_{suffix}", state[0])
    if isinstance(plain, nn.LSTM):
        i, f, g, o = (given + kept).chunk(4)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return (project(f"weight_hr_{suffix}", hidden) if plain.proj_size else hidden), cell
    reset = torch.sigmoid(given.chunk(3)[0] + kept.chunk(3)[0])
    update = torch.sigmoid(given.chunk(3)[1] + kept.chunk(3)[1])
    new = torch.tanh(given.chunk(3)[2] + reset * kept.chunk(3)[2])
    return ((1 - update) * new + update * state[0],)


def attention(
    packed: nn.Module,
    plain: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    biases = [None] * 3 if plain.in_proj_bias is None else bias_of(plain, "in_proj_bias").chunk(3)
    together = plain.in_proj_weight is not None
    weights = plain.in_proj_weight.chunk(3) if together else (plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight)
    projected = []
    for name, weight, bias, x in zip(("q_proj", "k_proj", "v_proj"), weights, biases, (query, key, value)):
        part = getattr(packed, name)
        projected.append(F.linear(stored_activation(x, part), own_weight(part, weight, 0), bias))
    batched = query.dim() == 3
    if not batched:
        projected = [x[None] for x in projected]
    elif not plain.batch_first:
        projected = [x.transpose(0, 1) for x in projected]
    q, k, v = projected
    heads, width = plain.num_heads, plain.head_dim
    if plain.bias_k is not None:
        k = torch.cat([k, plain.bias_k.double().expand(len(k), 1, -1)], 1)
        v = torch.cat([v, plain.bias_v.double().expand(len(v), 1, -1)], 1)
    if plain.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros(len(x), 1, heads * width, dtype=x.dtype)], 1) for x in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q.unflatten(-1, (heads, width)), k.unflatten(-1, (heads, width))) / math.sqrt(width)
    score = score.detach()
    given = key.shape[0 if batched and not plain.batch_first else -2]
    if attn_mask is not None:
        shaped = attn_mask.unflatten(0, (-1, heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
        if attn_mask.dtype == torch.bool:
            score[..., :given] = score[..., :given].masked_fill(shaped, -math.inf)
        else:
            score[..., :given] += shaped
    if key_padding_mask is not None:
        shaped = key_padding_mask if batched else key_padding_mask[None]
        score[..., :given] = score[..., :given].masked_fill(shaped[:, None, None], -math.inf)
    found = score.softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", found, v.unflatten(-1, (heads, width))).flatten(2)
    out_proj = packed.out_proj
    if hasattr(out_proj, "weight_packed"):
        out = F.linear(stored_activation(mixed, out_proj), own_weight(out_proj, plain.out_proj.weight, 0), bias_of(plain.out_proj))
    else:
        out = F.linear(mixed, plain.out_proj.weight.double(), bias_of(plain.out_proj))
    found = (found.mean(1) if average_attn_weights else found) if need_weights else None
    if not batched:
        return out[0], None if found is None else found[0]
    return (out if plain.batch_first else out.transpose(0, 1)), found


REFERENCES: dict[type[nn.Module] | str, Callable[..., Any]] = {
    nn.Linear: linear,
    "Conv1D": conv1d_of_transformers,
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        convolution,
    ),
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
    nn.MultiheadAttention: attention,
}
