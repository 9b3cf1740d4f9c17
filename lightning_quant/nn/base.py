"""What every quantized module shares: the quantizers of a fake module, the packed state of a packed one.

A fake module is its float module with another class and quantizers added; a packed module is built anew beside it. Both
describe themselves in their state_dict (`_extra_state`: JSON as bytes, which every checkpoint format can hold).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_quant.fake_quant import FakeQuantize, keep_fp32
from lightning_quant.kernels import dequantize as dequantize_op
from lightning_quant.kernels.reference import quantize_input
from lightning_quant.numerics import qparams_shape, quantize
from lightning_quant.packing import pack, pack_zero_point, packed_words
from lightning_quant.sharding import whole_parameters
from lightning_quant.spec import QuantScheme, QuantSpec

FORMAT = 1
EXTRA_STATE = "_extra_state"
_STATE = ("_parameters", "_buffers", "_modules")

P = TypeVar("P", bound="PackedModule")


class Unsupported(Exception):
    """A module cannot be quantized; the text is the reason, for `lq.summary`."""


@dataclass(frozen=True)
class Setup:
    """What a fake module is told when it is prepared: its scheme and, resolved from the recipe, how to find its ranges."""

    scheme: QuantScheme
    name: str = ""
    method: str = "ste"
    observer: str = "minmax"
    observer_options: dict[str, Any] = field(default_factory=dict)
    weight_observer: str = "minmax"
    weight_observer_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All but the scheme, which a module describes by itself."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scheme"}


def encode_state(state: dict[str, Any]) -> Tensor:
    """A dict of primitives as a uint8 tensor of JSON."""
    return torch.frombuffer(bytearray(json.dumps(state, sort_keys=True).encode()), dtype=torch.uint8)


def decode_state(state: Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.cpu().tolist()).decode())


def described_modules(state: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Module name -> what it says of itself, for the `"fake"` or `"packed"` modules in a state_dict."""
    found = {}
    for key, value in state.items():
        if key == EXTRA_STATE or key.endswith("." + EXTRA_STATE):
            with contextlib.suppress(ValueError, UnicodeDecodeError, AttributeError):  # someone else's extra state
                told = decode_state(value)
                if isinstance(told, dict) and told.get("kind") == kind and "scheme" in told:
                    found[key.removesuffix(EXTRA_STATE).removesuffix(".")] = told
    return found


def without_input(scheme: QuantScheme) -> tuple[QuantScheme, str]:
    """The scheme for modules whose input are indices."""
    return replace(scheme, input=None), "input: indices, not quantized" if scheme.input else ""


class QuantizedModule(nn.Module):
    """A module with a scheme. `weight_axes` maps each quantized parameter to its channel dimension."""

    scheme: QuantScheme
    kind: ClassVar[str]
    # the first dimension of a token's own features, as in `to_groups`
    input_axis: ClassVar[int] = -1

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {"weight": 0}

    @classmethod
    def adapt(cls, module: nn.Module, scheme: QuantScheme) -> tuple[QuantScheme, str]:
        """The scheme as this module can follow it, and a note of what differs. Raises `Unsupported` with the reason."""
        return scheme, ""

    def _describe(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "scheme": self.scheme.to_dict()}

    def get_extra_state(self) -> Tensor:
        return encode_state(self._describe())

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor):
            return  # a placeholder, by which torch.distributed.checkpoint loads a part of a state_dict
        found = decode_state(state)
        if found["format"] > FORMAT:
            raise ValueError(f"saved by a newer lightning_quant (format {found['format']}, this one reads {FORMAT}): upgrade it")
        if found["kind"] != self.kind or QuantScheme.from_dict(found["scheme"]) != self.scheme:
            theirs = QuantScheme.from_dict(found["scheme"]).label
            raise ValueError(
                f"the checkpoint holds a {found['kind']} module ({theirs}), this one{self._where()} is {self.kind} "
                f"({self.scheme.label}): use the recipe that the checkpoint was made with, or lq.load_from_checkpoint"
            )
        self._restore(found)

    def _restore(self, found: dict[str, Any]) -> None:
        """Take over what `_describe` added."""

    def _where(self) -> str:
        """The module's name for messages, where it is known."""
        return ""


class FakeModule(QuantizedModule):
    """A float module with quantizers: `<weight>_fake_quant`, `input_fake_quant` and `output_fake_quant` (None: float)."""

    kind = "fake"
    packed_type: ClassVar[type[PackedModule]]
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    # the BatchNorm folded into this module, in a list: owned elsewhere, not a submodule here
    folded_norm: list[nn.Module]
    setup: Setup

    def attach(self, setup: Setup) -> None:
        """Add the quantizers to a module whose class was just changed, and find its weights' ranges."""
        self.setup, self.scheme, self.folded_norm = setup, setup.scheme, []
        assert setup.scheme.weight is not None
        learned = setup.method == "lsq"
        device = next(iter(self.parameters())).device
        for name, axis in self.weight_axes(self).items():
            quantizer = FakeQuantize(
                setup.scheme.weight,
                self.get_weight(name).shape,
                axis=axis,
                name=f"{setup.name}.{name}",
                observer=setup.weight_observer,
                observer_options=setup.weight_observer_options,
                learned=learned,
                device=device,
            )
            self.add_module(f"{name}_fake_quant", quantizer)
        activations = [(name, setup.scheme.input) for name in self.input_names] + [("output", setup.scheme.output)]
        for name, spec in activations:
            if spec is None:
                self.register_module(f"{name}_fake_quant", None)
                continue
            quantizer = FakeQuantize(
                spec,
                axis=self.input_axis,
                name=f"{setup.name}.{name}",
                observer=setup.observer,
                observer_options=setup.observer_options,
                learned=learned,
                device=device,
            )
            self.add_module(f"{name}_fake_quant", quantizer)

    def get_weight(self, name: str) -> Tensor:
        """The float weight of that name, before any fold."""
        return getattr(self, name)

    def effective_weight(self, name: str, exact: bool = False) -> Tensor:
        """The float weight that is quantized: with its BatchNorm folded in, if it has one.

        Args:
            exact: fold channels of scale 0 too; in training they keep their weight, so that they can come back.
        """
        return self.get_weight(name)

    def packed_scale(self, name: str, scale: Tensor) -> Tensor:
        """The scale that the packed module keeps, from the one that made the codes."""
        return scale

    def fake_weight(self, name: str = "weight") -> Tensor:
        quantizer, weight = getattr(self, f"{name}_fake_quant"), self.effective_weight(name)
        if quantizer.quantizing and not quantizer.has_range:
            quantizer.observe(weight)  # a float checkpoint was loaded: the weight itself is all it takes
        return quantizer(weight)

    def fake_input(self, x: Tensor, name: str = "input") -> Tensor:
        quantizer = getattr(self, f"{name}_fake_quant")
        return x if quantizer is None else quantizer(x)

    def fake_output(self, x: Tensor) -> Tensor:
        return self.fake_input(x, "output")

    def quantizers(self) -> Iterator[tuple[str, FakeQuantize]]:
        for name, child in self.named_children():
            if isinstance(child, FakeQuantize):
                yield name.removesuffix("_fake_quant"), child

    def observe_weights(self) -> None:
        """Find the ranges of the weights as they are now."""
        for name in self.weight_axes(self):
            self._observe_weight(name)

    def follow_weights(self) -> None:
        """Find the ranges of the weights as they are now, but for those that are frozen or learning already."""
        for name in self.weight_axes(self):
            quantizer = getattr(self, f"{name}_fake_quant")
            if not quantizer.has_range or (quantizer.observing and not (quantizer.learned and quantizer.quantizing)):
                self._observe_weight(name)

    @torch.no_grad()
    def _observe_weight(self, name: str) -> None:
        if not self.get_weight(name).is_meta:
            with whole_parameters(self, *self.folded_norm):
                getattr(self, f"{name}_fake_quant").observe(self.effective_weight(name))

    def to_packed(self, built: dict[int, nn.Module] | None = None) -> PackedModule:
        """The packed module that computes what this one does in eval. Raises RuntimeError naming a tensor without a range.

        Args:
            built: packed replacements of submodules, by the id of the fake one.
        """
        packed = self.packed_type.empty(self, self.scheme)
        with torch.no_grad():
            for name, axis in self.weight_axes(self).items():
                quantizer = getattr(self, f"{name}_fake_quant")
                if quantizer.observing and not quantizer.learned:
                    scale, zero_point = quantizer.measure(self.effective_weight(name))  # as the next forward pass would
                else:
                    if not quantizer.has_range:
                        quantizer.observe(self.effective_weight(name))
                    scale, zero_point = quantizer.qparams()
                packed.put_weight(name, self.effective_weight(name, exact=True).float(), scale, zero_point, axis)
                getattr(packed, f"{name}_scale").copy_(self.packed_scale(name, scale))
            for name in (*self.input_names, "output"):
                quantizer = getattr(self, f"{name}_fake_quant")
                if quantizer is not None and not quantizer.spec.dynamic:
                    packed.put_activation(name, *quantizer.qparams())
            self._fill(packed)
        return packed

    def _fill(self, packed: PackedModule) -> None:
        """Copy the float tensors that the packed module keeps."""
        packed.copy_float(self)

    def _describe(self) -> dict[str, Any]:
        flags = {  # 0 or 1: a distributed checkpoint loads only into a tensor of the same length
            "quantizing": int(all(quantizer.quantizing for _, quantizer in self.quantizers())),
            "frozen": int(not all(quantizer.observing for _, quantizer in self.quantizers() if quantizer.is_weight)),
        }
        return {**super()._describe(), **flags, "setup": self.setup.to_dict()}

    def _where(self) -> str:
        return f", {self.setup.name!r}," if self.setup.name else ""

    def _restore(self, found: dict[str, Any]) -> None:
        for _, quantizer in self.quantizers():
            quantizer.quantizing = bool(found["quantizing"])
            if quantizer.is_weight:
                quantizer.observing = not found["frozen"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if f"{prefix}_extra_state" in missing_keys:  # a float checkpoint: its quantizers start afresh
            missing_keys.remove(f"{prefix}_extra_state")
            for _, quantizer in self.quantizers():
                quantizer.quantizing = False
                quantizer.observing = quantizer.is_weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if "_float_type" not in type(self).__dict__:
            return reduced
        base, user = type(self).__bases__
        return (_new_subclass, (base, user), *reduced[2:])


@cache
def fake_subclass(fake: type, user: type) -> type:
    """A fake class that is also the user's own subclass of a float module, so `isinstance` and its methods stay."""
    return type(f"Fake{user.__name__}", (fake, user), {"_float_type": user, "__module__": fake.__module__})


def _new_subclass(fake: type, user: type) -> Any:
    cls: Any = fake_subclass(fake, user)
    return cls.__new__(cls)


def _own_copy(key: str, value: Any) -> Any:
    """An attribute for a packed module: containers are copied, hooks and modules in them are the same objects."""
    if not isinstance(value, (dict, list, set)):
        return value
    holds_modules = any(isinstance(leaf, nn.Module) for leaf in torch.utils._pytree.tree_leaves(value))
    return copy.copy(value) if holds_modules or key.endswith("hooks") or "_hooks_" in key else copy.deepcopy(value)


class PackedModule(QuantizedModule):
    """A module whose weights are packed integers.

    Parameters, none of which requires a gradient: `<weight>_packed` int32 `[channels, words]`, `<weight>_scale` float32,
    `<weight>_zero_point` (packed along the channels; only asymmetric), `<weight>_shape`, and `input_scale`,
    `input_zero_point` and the same of the output if static.
    """

    kind = "packed"
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    optional_float: ClassVar[tuple[str, ...]] = ("bias",)
    _float_dtype: torch.dtype
    spec_args: tuple[str, str]  # the weight's and the input's spec as the operators take them

    @classmethod
    def empty(cls: type[P], module: nn.Module, scheme: QuantScheme, device: torch.device | str | None = None) -> P:
        """A packed module for a float (or fake) one, its tensors allocated and not filled."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        hidden = (*_STATE, "scheme", "setup", "folded_norm", "folded_name", *cls.weight_axes(module))
        packed.__dict__.update({key: _own_copy(key, value) for key, value in module.__dict__.items() if key not in hidden})
        packed._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in module._forward_pre_hooks.items() if not isinstance(hook, BasePruningMethod)
        )
        packed.scheme = scheme
        assert scheme.weight is not None
        packed.spec_args = (scheme.weight.encode(), scheme.input.encode() if scheme.input else "")
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

    def add(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _allocate_weight(self, name: str, shape: tuple[int, ...], axis: int, spec: QuantSpec, device: Any) -> None:
        columns = torch.Size(shape).numel() // shape[axis]
        size = qparams_shape(shape, spec, axis)
        self.add(f"{name}_packed", torch.empty(shape[axis], packed_words(columns, spec.bits), dtype=torch.int32, device=device))
        self.add(f"{name}_scale", torch.empty(size, device=device))
        if not spec.symmetric:
            if len(size) == 2:
                size = (packed_words(size[0], spec.bits), size[1])
            self.add(f"{name}_zero_point", torch.empty(size, dtype=torch.int32, device=device))
        self.add(f"{name}_shape", torch.tensor(shape, dtype=torch.int64, device=device))

    def _allocate_float(self, module: nn.Module, device: Any) -> None:
        for name in self.optional_float:
            value = getattr(module, name, None)
            self.__dict__.pop(name, None)  # nn.MultiheadAttention has a plain None here
            if value is None:
                self.register_parameter(name, None)
            else:
                self.register_parameter(name, nn.Parameter(torch.empty_like(value, device=device), value.requires_grad))

    def copy_float(self, module: nn.Module) -> None:
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
        getattr(self, f"{name}_scale").copy_(scale)
        if not spec.symmetric:
            value = pack_zero_point(zero_point, spec) if zero_point.dim() == 2 else zero_point
            getattr(self, f"{name}_zero_point").copy_(value)

    def put_activation(self, name: str, scale: Tensor, zero_point: Tensor) -> None:
        """Set a static activation's qparams."""
        getattr(self, f"{name}_scale").copy_(scale)
        getattr(self, f"{name}_zero_point").copy_(zero_point)

    def packed_weight(self, name: str = "weight") -> tuple[Tensor, Tensor, Tensor | None]:
        scale = getattr(self, f"{name}_scale")
        if scale.dtype != torch.float32:  # `_apply` keeps it so
            raise RuntimeError(
                f"{name}_scale is gathered in {scale.dtype}, which changes the weights: give fully_shard a MixedPrecisionPolicy "
                f"without param_dtype, or ignored_params={{p for p in module.parameters() if not p.requires_grad}}"
            )
        return getattr(self, f"{name}_packed"), scale, getattr(self, f"{name}_zero_point", None)

    def dequantized_weight(self, name: str = "weight") -> Tensor:
        """The weight in float32 and its own shape."""
        axis, shape = self.weight_axes(self)[name], self.packed_shape(name)
        return dequantize_op(*self.packed_weight(name), shape, axis, self.spec_args[0])

    def packed_shape(self, name: str) -> list[int]:
        """The float weight's shape, from the module's own attributes (no tensor is read)."""
        raise NotImplementedError

    def input_args(self, name: str = "input") -> tuple[Tensor | None, Tensor | None]:
        return getattr(self, f"{name}_scale", None), getattr(self, f"{name}_zero_point", None)

    def cast_input(self, x: Tensor) -> Tensor:
        """Under autocast the operators compute in its dtype, as torch's own linear and convolution do."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point():
            return x.to(torch.get_autocast_dtype(kind))
        return x

    def quantize_output(self, x: Tensor) -> Tensor:
        spec = self.scheme.output
        return x if spec is None else quantize_input(x, *self.input_args("output"), spec, self.input_axis)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        exact = {id(value) for name, value in self._parameters.items() if value is not None and name.endswith("_scale")}
        moved_exactly = keep_fp32(fn)
        self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype)).dtype
        return super()._apply(lambda tensor: moved_exactly(tensor) if id(tensor) in exact else fn(tensor), recurse)

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "dtype": str(self._float_dtype).removeprefix("torch.")}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme.label}"
