"""Packed modules: weights are packed integers, as Parameters of the names that compressed-tensors gives them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_quant.double_quant import dequantize_scale, quantize_scale, scale_shapes
from lightning_quant.fake_quant import keep_fp32
from lightning_quant.kernels import dequantize as dequantize_op
from lightning_quant.kernels.prepack import forget
from lightning_quant.kernels.reference import quantize_input
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.numerics import calc_qparams, qparams_shape, quantize, to_groups
from lightning_quant.packing import pack, pack_zero_point, packed_words
from lightning_quant.spec import QuantScheme, QuantSpec

# what a packed module does not take over from the fake one: its tensors and submodules, and what belongs to training
_OWN = ("_parameters", "_buffers", "_modules", "scheme", "setup", "folded_norm", "folded_name")

# what stands for a weight's scale if it is quantized itself, and the names of what stays in float32
_SCALE_PARTS = ("_scale_packed", "_scale_absmax", "_scale_offset")
_EXACT = ("_scale", *_SCALE_PARTS[1:])

P = TypeVar("P", bound="PackedModule")


def _own_copy(key: str, value: Any) -> Any:
    """An attribute for a packed module: containers are copied, hooks and modules in them are the same objects."""
    if not isinstance(value, (dict, list, set)):
        return value
    holds_modules = any(isinstance(leaf, nn.Module) for leaf in torch.utils._pytree.tree_leaves(value))
    return copy.copy(value) if holds_modules or key.endswith("hooks") or "_hooks_" in key else copy.deepcopy(value)


class PackedModule(QuantizedModule):
    """A module whose weights are packed integers.

    Parameters, none of which requires a gradient: `<weight>_packed` int32 `[channels, words]`, `<weight>_scale` float32 (if
    double-quantized `<weight>_scale_packed` uint8, `<weight>_scale_absmax` and `<weight>_scale_offset` float32),
    `<weight>_zero_point` (packed along the channels; only asymmetric), `<weight>_shape`, and `input_scale`,
    `input_zero_point` and the same of the output if static; `pre_scale` `[input features]` if the input is rescaled.
    """

    kind = "packed"
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    optional_float: ClassVar[tuple[str, ...]] = ("bias",)
    operator = "linear"  # of `kernels`, that it calls
    _float_dtype: torch.dtype
    pre_scale: nn.Parameter
    spec_args: tuple[str, str, str]  # the weight's and the input's spec and the backend, as the operators take them

    @classmethod
    def empty(cls: type[P], module: nn.Module, scheme: QuantScheme, device: torch.device | str | None = None) -> P:
        """A packed module for a float (or fake) one, its tensors allocated and not filled."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        hidden = (*_OWN, *cls.weight_axes(module))
        packed.__dict__.update({key: _own_copy(key, value) for key, value in module.__dict__.items() if key not in hidden})
        packed._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in module._forward_pre_hooks.items() if not isinstance(hook, BasePruningMethod)
        )
        packed.scheme = scheme
        assert scheme.weight is not None
        packed.spec_args = (scheme.weight.encode(), scheme.input.encode() if scheme.input else "", "")
        first = next(iter(module.parameters()))
        packed._float_dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
        device = first.device if device is None else torch.device(device)
        spec = scheme.weight
        for name, axis in cls.weight_axes(module).items():
            shape = getattr(module, name).shape
            packed._allocate_weight(name, tuple(shape), axis, spec, device)
        for name in (*cls.input_names, "output"):
            activation = scheme.output if name == "output" else scheme.input
            if activation is not None and not activation.dynamic:
                packed.add(f"{name}_scale", torch.ones(1, device=device))
                packed.add(f"{name}_zero_point", torch.zeros(1, dtype=torch.int32, device=device))
        packed._allocate_float(module, device)
        return packed

    def use_backend(self, backend: str) -> None:
        """Prefer a key of `KERNELS`, `"native"` (any of this package's own), or `""`: the first that can."""
        self.spec_args = (*self.spec_args[:2], backend)

    def add(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _allocate_weight(self, name: str, shape: tuple[int, ...], axis: int, spec: QuantSpec, device: Any) -> None:
        columns = torch.Size(shape).numel() // shape[axis]
        size = qparams_shape(shape, spec, axis)
        self.add(f"{name}_packed", torch.empty(shape[axis], packed_words(columns, spec.bits), dtype=torch.int32, device=device))
        if spec.double_quant:
            codes, absmax, offset = scale_shapes(size[0])
            self.add(f"{name}_scale_packed", torch.empty(codes, dtype=torch.uint8, device=device))
            self.add(f"{name}_scale_absmax", torch.empty(absmax, device=device))
            self.add(f"{name}_scale_offset", torch.empty(offset, device=device))
        else:
            self.add(f"{name}_scale", torch.empty(size, device=device))
        if not spec.symmetric:
            if len(size) == 2:
                size = (packed_words(size[0], spec.bits), size[1])
            self.add(f"{name}_zero_point", torch.empty(size, dtype=torch.int32, device=device))
        self.add(f"{name}_shape", torch.tensor(shape, dtype=torch.int64, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        scale = state_dict.get(f"{prefix}pre_scale")
        if scale is not None and self._parameters.get("pre_scale") is None:  # a float skeleton does not tell of it
            self._parameters["pre_scale"] = nn.Parameter(torch.empty_like(scale), requires_grad=False)
        took_float = self._take_float(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if took_float and f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")

    @torch.no_grad()
    def _take_float(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Quantize a float checkpoint's weights, rounded to nearest, as when this module was packed; not if ranges are missing."""
        if self.scheme.needs_data:
            return False
        spec, found = self.scheme.weight, False
        assert spec is not None
        for name, axis in self.weight_axes(self).items():
            weight = state_dict.get(f"{prefix}{name}")
            if not isinstance(weight, Tensor) or f"{prefix}{name}_packed" in state_dict:
                continue
            if list(weight.shape) != list(self.packed_shape(name)):
                continue  # reported as an unexpected key
            del state_dict[f"{prefix}{name}"]
            ranges = to_groups(weight.float(), spec, axis)
            scale, zero_point = calc_qparams(ranges.amin(1), ranges.amax(1), spec)
            size = qparams_shape(weight.shape, spec, axis)
            fresh = copy.copy(self)
            fresh._parameters = {key: None if value is None else value.clone() for key, value in self._parameters.items()}
            fresh.put_weight(name, weight.float(), scale.reshape(size), zero_point.reshape(size), axis)
            own = [
                key
                for key in fresh._parameters
                if key.startswith((f"{name}_packed", f"{name}_scale", f"{name}_zero", f"{name}_shape"))
            ]
            state_dict.update({f"{prefix}{key}": fresh._parameters[key] for key in own})
            found = True
        return found

    def _allocate_float(self, module: nn.Module, device: Any) -> None:
        scale = module._parameters.get("pre_scale")
        if scale is not None:
            self.add("pre_scale", torch.empty_like(scale, device=device))
        for name in self.optional_float:
            value = getattr(module, name, None)
            self.__dict__.pop(name, None)  # nn.MultiheadAttention has a plain None here
            if value is None:
                self.register_parameter(name, None)
            else:
                self.register_parameter(name, nn.Parameter(torch.empty_like(value, device=device), value.requires_grad))

    def copy_float(self, module: nn.Module) -> None:
        if self._parameters.get("pre_scale") is not None:
            self.pre_scale.copy_(module.pre_scale)  # type: ignore[arg-type]
        for name in self.optional_float:
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(module, name))

    def put_weight(self, name: str, weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> None:
        """Quantize and pack a float32 weight with frozen qparams."""
        spec = self.scheme.weight
        assert spec is not None
        codes = quantize(weight, scale, zero_point, spec, axis)
        codes = codes.movedim(axis, 0).flatten(1).contiguous()
        getattr(self, f"{name}_packed").copy_(pack(codes, spec))
        self.put_scale(name, scale)
        if not spec.symmetric:
            value = pack_zero_point(zero_point, spec) if zero_point.dim() == 2 else zero_point
            getattr(self, f"{name}_zero_point").copy_(value)

    def put_scale(self, name: str, scale: Tensor) -> None:
        """Set a weight's scale."""
        assert self.scheme.weight is not None
        if not self.scheme.weight.double_quant:
            getattr(self, f"{name}_scale").copy_(scale)
            return
        for part, value in zip(_SCALE_PARTS, quantize_scale(scale), strict=True):
            getattr(self, f"{name}{part}").copy_(value)

    def put_activation(self, name: str, scale: Tensor, zero_point: Tensor) -> None:
        """Set a static activation's qparams."""
        getattr(self, f"{name}_scale").copy_(scale)
        getattr(self, f"{name}_zero_point").copy_(zero_point)

    def packed_weight(self, name: str = "weight") -> tuple[Tensor, Tensor, Tensor | None]:
        own: dict[str, Any] = self._parameters  # attribute access of modules is slow beside a small product
        scale = own.get(f"{name}_scale")
        if scale is None:
            scale = dequantize_scale(*(own[f"{name}{part}"] for part in _SCALE_PARTS))
        if scale.dtype != torch.float32:  # `_apply` keeps it so
            raise RuntimeError(
                f"{name}_scale is gathered in {scale.dtype}, which changes the weights: give fully_shard a MixedPrecisionPolicy "
                f"without param_dtype, or ignored_params={{p for p in module.parameters() if not p.requires_grad}}"
            )
        return own[f"{name}_packed"], scale, own.get(f"{name}_zero_point")

    def dequantized_weight(self, name: str = "weight") -> Tensor:
        """The weight in float32 and its own shape."""
        axis, shape = self.weight_axes(self)[name], self.packed_shape(name)
        return dequantize_op(*self.packed_weight(name), shape, axis, self.spec_args[0], self.spec_args[2])

    def packed_shape(self, name: str) -> list[int]:
        """The float weight's shape, from the module's own attributes (no tensor is read)."""
        raise NotImplementedError

    def input_args(self, name: str = "input") -> tuple[Tensor | None, Tensor | None]:
        own = self._parameters
        return own.get(f"{name}_scale"), own.get(f"{name}_zero_point")

    def cast_input(self, x: Tensor) -> Tensor:
        """The input as the operators take it: times `pre_scale`, if there is one, and in autocast's dtype, as torch has it."""
        scale = self._parameters.get("pre_scale")
        if scale is not None:
            x = x * scale.to(x.dtype)
        if torch._C._is_any_autocast_enabled():
            kind = x.device.type
            if torch.is_autocast_enabled(kind) and x.is_floating_point():
                return x.to(torch.get_autocast_dtype(kind))
        return x

    def quantize_output(self, x: Tensor) -> Tensor:
        spec = self.scheme.output
        return x if spec is None else quantize_input(x, *self.input_args("output"), spec, self.input_axis)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        exact = {id(value) for name, value in self._parameters.items() if value is not None and name.endswith(_EXACT)}
        moved_exactly = keep_fp32(fn)
        self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype)).dtype
        forget(*self._parameters.values())
        return super()._apply(lambda tensor: moved_exactly(tensor) if id(tensor) in exact else fn(tensor), recurse)

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "dtype": str(self._float_dtype).removeprefix("torch.")}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme.label}"
