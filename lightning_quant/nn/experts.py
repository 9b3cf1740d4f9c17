"""Experts that a model keeps in fused 3-D parameters, taken apart into linear layers: what post-training quantization works on.

transformers has the weights of a layer's experts in two parameters, `gate_up_proj` `[experts, 2 * inner, hidden]` and `down_proj`
`[experts, hidden, inner]`. A module is known by them and by the flags beside them (`is_transposed`, `has_bias`, `has_gate`), not
by its class, and is taken apart only if both forms agree on a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn.base import Unsupported
from lightning_quant.nn.fake import FakeModule

_OTHER = "fused experts of another structure"


@dataclass(frozen=True)
class Layout:
    """How a fused module holds its experts.

    Args:
        count: experts.
        first: the parameter in front of the activation: `gate_up_proj`, or `up_proj` where nothing is gated.
        transposed: weights are `[experts, in, out]`.
        bias: each projection has a parameter `<name>_bias` `[experts, out]`.
    """

    count: int
    first: str
    transposed: bool
    bias: bool

    @property
    def layers(self) -> Iterator[str]:
        """The names of the linear layers, relative to the module."""
        return (f"{index}.{projection}" for index in range(self.count) for projection in (self.first, "down_proj"))


def holds_experts(module: nn.Module) -> int:
    """How many experts a module holds in parameters of its own with three dimensions, whether or not they can be taken apart."""
    own = {name: value for name, value in module._parameters.items() if value is not None}
    sizes = {name: len(value) for name, value in own.items() if not isinstance(value, UninitializedParameter) and value.dim() == 3}
    for name, size in sizes.items():
        if name in ("gate_up_proj", "up_proj", "down_proj") or size == getattr(module, "num_experts", None):
            return size
    return 0


def find_layout(module: nn.Module) -> Layout:
    """The layout of a module that `holds_experts`. Raises `Unsupported` with the reason why it cannot be taken apart."""
    if parametrize.is_parametrized(module):
        raise Unsupported("parametrized weight; call torch.nn.utils.parametrize.remove_parametrizations first")
    if "forward" in module.__dict__:
        raise Unsupported(f"{_OTHER}: its forward was replaced on the object; remove what wraps it (accelerate's hooks?)")
    if getattr(module, "_is_expert_parallel", False):
        raise Unsupported("its experts are spread over ranks (expert parallelism): quantize the model before that")
    own = {name: value for name, value in module._parameters.items() if value is not None}
    first = "gate_up_proj" if getattr(module, "has_gate", "gate_up_proj" in own) else "up_proj"
    bias = bool(getattr(module, "has_bias", f"{first}_bias" in own))
    wanted = {name + end for name in (first, "down_proj") for end in ("", "_bias")[: 1 + bias]}
    if set(own) != wanted or not all(own[name].dim() == 3 for name in (first, "down_proj")):
        raise Unsupported(f"{_OTHER}: its parameters are {', '.join(own)}, where {', '.join(sorted(wanted))} are understood")
    if not all(value.is_floating_point() for value in own.values()):
        raise Unsupported(f"its {first} is {own[first].dtype}: quantized already")
    up, down = tuple(own[first].shape), tuple(own["down_proj"].shape)
    factor = 2 if first == "gate_up_proj" else 1
    fits = {
        False: up == (down[0], factor * down[2], down[1]),
        True: up == (down[0], down[2], factor * down[1]),
    }
    transposed = bool(getattr(module, "is_transposed", not fits[False]))
    if not fits[transposed]:
        raise Unsupported(f"{_OTHER}: its {first} is {list(up)}, its down_proj {list(down)}")
    if bias and [own[f"{name}_bias"].dim() for name in (first, "down_proj")] != [2, 2]:
        raise Unsupported(f"{_OTHER}: its biases are not one vector an expert")
    if not (hasattr(module, "act_fn") or (factor == 2 and hasattr(module, "_apply_gate"))):
        raise Unsupported(f"{_OTHER}: it has no act_fn and no _apply_gate")
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None, None, None)
    except TypeError:
        told = ", ".join(signature.parameters)
        raise Unsupported(f"{_OTHER}: its forward takes ({told}), not hidden states, expert indices and weights") from None
    return Layout(up[0], first, transposed, bias)


class UnfusedExperts(nn.Module):
    """Experts as linear layers: `<index>.gate_up_proj` (`up_proj` where nothing is gated) and `<index>.down_proj`.

    Computes what the fused module computes, expert by expert, and runs only those that a token is sent to. The layers' weights
    are views of the fused parameters and take no memory of their own.

    Args:
        fused: a module that `find_layout` knows; it is left as it is.

    Example:
        >>> class Fused(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 8))
        ...         self.down_proj = nn.Parameter(torch.randn(4, 8, 3))
        ...         self.act_fn = nn.SiLU()
        ...     def forward(self, hidden_states, top_k_index, top_k_weights): ...
        >>> experts = UnfusedExperts(Fused())
        >>> experts.get_submodule("3.gate_up_proj")
        Linear(in_features=8, out_features=6, bias=False)
        >>> experts(torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(self, fused: nn.Module) -> None:
        layout = find_layout(fused)
        super().__init__()
        own = ("_parameters", "_buffers", "_modules")
        # limits of the gate, the config, flags, hooks
        self.__dict__.update({key: value for key, value in fused.__dict__.items() if key not in own})
        self.fused_type, self.layout = type(fused), layout
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name, buffer in fused.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in fused._non_persistent_buffers_set)
        for index in range(layout.count):
            layers = {name: _view(fused, name, index, layout) for name in (layout.first, "down_proj")}
            self.add_module(str(index), nn.ModuleDict(layers).train(fused.training))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of each token's experts, weighted.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: `[tokens, k]`, int64; an index beyond the last expert is none.
            top_k_weights: `[tokens, k]`.

        Returns:
            `[tokens, hidden]`.
        """
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out = torch.zeros_like(hidden_states, dtype=dtype)
        norm: Any = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
        for index in top_k_index.unique().tolist():
            if index >= self.layout.count:
                continue
            token, position = torch.where(top_k_index == index)
            expert: Any = self._modules[str(index)]
            values = expert["down_proj"](self._activate(expert[self.layout.first](hidden_states[token])))
            if norm is not None:
                values = norm(values)
            out.index_add_(0, token, (values * top_k_weights[token, position, None]).to(dtype))
        return out.to(hidden_states.dtype)

    def _activate(self, x: Tensor) -> Tensor:
        gated: Any = getattr(self.fused_type, "_apply_gate", None)
        if self.layout.first == "gate_up_proj" and gated is not None:
            return gated(self, x)
        act: Any = self.act_fn
        if self.layout.first != "gate_up_proj":
            return act(x)
        gate, up = x.chunk(2, dim=-1)
        return act(gate) * up

    def extra_repr(self) -> str:
        return f"{self.layout.count} of {self.fused_type.__name__}"


def _view(fused: nn.Module, name: str, index: int, layout: Layout) -> nn.Linear:
    """The linear layer of one expert, its tensors views of the fused ones."""
    whole = fused._parameters[name]
    assert whole is not None
    weight = whole.data[index].T if layout.transposed else whole.data[index]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, whole.requires_grad)
    layer.of_expert = True  # type: ignore[assignment]
    if layout.bias:
        bias = fused._parameters[f"{name}_bias"]
        assert bias is not None
        layer.bias = nn.Parameter(bias.data[index], bias.requires_grad)
    return layer


@torch.no_grad()
def unfuse(module: nn.Module) -> UnfusedExperts:
    """A fused module taken apart, after both forms have agreed on tokens of several sizes (on the meta device nothing is run).

    Raises:
        Unsupported: the module has another structure, or computes something else.
    """
    experts = UnfusedExperts(module)
    weight = module._parameters["down_proj"]
    assert weight is not None
    if weight.is_meta:
        return experts
    generator = torch.Generator().manual_seed(0)
    hidden = weight.shape[2 if experts.layout.transposed else 1]
    x = torch.randn(4, hidden, generator=generator) * torch.tensor([[0.1], [1.0], [10.0], [100.0]])  # gates may be clamped
    chosen = torch.arange(8).view(4, 2).remainder(experts.layout.count)
    args = (x.to(weight), chosen.to(weight.device), torch.rand(4, 2, generator=generator).to(weight))
    try:
        want, got = module.forward(*args), experts.forward(*args)
    except Exception as error:  # any code may run in a user's forward
        raise Unsupported(f"{_OTHER}: running it on 4 tokens raised {type(error).__name__}: {error}") from None
    tolerance = max(1e-3, 8 * torch.finfo(weight.dtype).eps)
    if not isinstance(want, Tensor) or want.shape != got.shape:
        raise Unsupported(f"{_OTHER}: it does not return a tensor of its input's shape")
    want, got = want.float(), got.float()
    finite = want.isfinite().all(dim=1)  # weights that were never initialised
    limit = tolerance * want.abs().amax(dim=1)
    if bool(((got - want).abs().amax(dim=1) > limit)[finite].any()) or not bool(got[finite].isfinite().all()):
        raise Unsupported(
            f"{_OTHER}: {type(module).__name__} computes something else than {experts.layout.first}, gate and down_proj"
        )
    return experts


def make_unreached_dynamic(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Let experts that calibration has not reached find their activations' ranges in each token, where they were to be static.

    A range that was never observed has no good guess, and calibration data seldom reaches every expert.

    Args:
        modules: prepared and calibrated, by name; the experts among them are changed in place.

    Returns:
        the names of those that were changed -> a note for `lq.summary`.
    """
    notes = {}
    for name, layer in modules.items():
        if not isinstance(layer, FakeModule) or not hasattr(layer, "of_expert"):
            continue
        changes: dict[str, Any] = {}
        for key, before in list(layer.quantizers()):
            before.update_qparams()
            if before.is_weight or before.spec.dynamic or before.has_range:
                continue
            changes[key] = replace(before.spec, granularity="token", dynamic=True)
            after = FakeQuantize(changes[key], axis=before.axis, name=before.name)
            after.observing, after.quantizing = before.observing, before.quantizing
            layer.add_module(f"{key}_fake_quant", after)
        if changes:
            layer.scheme = replace(layer.scheme, **changes)
            layer.setup = replace(layer.setup, scheme=layer.scheme)
            notes[name] = f"calibration has not reached it: {' and '.join(changes)} dynamic instead of static"
    return notes
