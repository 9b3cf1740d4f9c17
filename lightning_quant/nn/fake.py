"""Fake modules: the float module with another class and quantizers added, for training and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.fake_quant import NARROWEST, FakeQuantize
from lightning_quant.methods import get_method
from lightning_quant.nn.base import QuantizedModule, Setup
from lightning_quant.nn.packed import PackedModule
from lightning_quant.sharding import whole_parameters


class FakeModule(QuantizedModule):
    """A float module with quantizers: `<weight>_fake_quant`, `input_fake_quant` and `output_fake_quant` (None: float)."""

    kind = "fake"
    packed_type: ClassVar[type[PackedModule]]
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    # the BatchNorm folded into this module, in a list: owned elsewhere, not a submodule here
    folded_norm: list[nn.Module]
    # what the input is multiplied by before it is quantized, [input features]: SmoothQuant and AWQ, where no layer takes it over
    pre_scale: nn.Parameter | None
    setup: Setup
    # the LoRA layer around this one, in a list: what it learns is added to the weight before that is quantized
    adapter: list[Any]
    # whether the weights are on their grids for good
    settled = False
    # integers that are narrower have so many bits for now
    min_bits = NARROWEST
    # whether activations are quantized where weights are; of what has no quantizer for them, this alone says so
    quantizes_activations = True

    def attach(self, setup: Setup) -> None:
        """Add the quantizers to a module whose class was just changed, and find its weights' ranges."""
        self.setup, self.scheme, self.folded_norm, self.adapter = setup, setup.scheme, [], []
        self.register_parameter("pre_scale", None)
        assert setup.scheme.weight is not None
        method = get_method(setup.method)
        device = next(iter(self.parameters())).device
        for name, axis in self.weight_axes(self).items():
            quantizer = FakeQuantize(
                setup.scheme.weight,
                self.get_weight(name).shape,
                axis=axis,
                name=f"{setup.name}.{name}",
                observer=setup.weight_observer,
                observer_options=setup.weight_observer_options,
                rule=method.rule(True, setup.method_options),
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
                rule=method.rule(False, setup.method_options),
                device=device,
            )
            self.add_module(f"{name}_fake_quant", quantizer)

    def get_weight(self, name: str) -> Tensor:
        """The float weight of that name, before any fold, and what an adapter adds to it."""
        weight = getattr(self, name)
        return weight + self.adapter[0].get_delta_weight("default").to(weight.dtype) if self.adapter else weight

    def transformed_weight(self, name: str) -> Tensor:
        """The float weight of that name as its method transforms it, before any fold."""
        quantizer = getattr(self, f"{name}_fake_quant")
        transform, weight = quantizer.rule.transform, self.get_weight(name)
        return weight if transform is None or not quantizer.spec.is_int else transform(weight)

    def effective_weight(self, name: str, exact: bool = False) -> Tensor:
        """The float weight that is quantized: transformed by its method, and with its BatchNorm folded in, if it has one.

        Args:
            exact: fold channels of scale 0 too; in training they keep their weight, so that they can come back.
        """
        return self.transformed_weight(name)

    def latent_weight(self, name: str, effective: Tensor) -> Tensor:
        """The inverse of `effective_weight`, where no method transforms weights."""
        return effective

    def packed_scale(self, name: str, scale: Tensor) -> Tensor:
        """The scale that the packed module keeps, from the one that made the codes."""
        return scale

    def fake_weight(self, name: str = "weight") -> Tensor:
        quantizer, weight = getattr(self, f"{name}_fake_quant"), self.effective_weight(name)
        if quantizer.quantizing and not quantizer.has_range:
            quantizer.observe(weight)  # a float checkpoint was loaded: the weight itself is all it takes
        quantized: Tensor = quantizer(weight)
        if quantizer.share == 1.0 or not (self.training and quantizer.quantizing and weight.requires_grad):
            return quantized
        chosen = torch.rand(weight.shape, device=weight.device) < quantizer.share
        return torch.where(chosen, quantized, weight)

    def fake_input(self, x: Tensor, name: str = "input") -> Tensor:
        quantizer = getattr(self, f"{name}_fake_quant")
        if self.pre_scale is not None and name == "input":
            x = x * self.pre_scale.to(x.dtype)
        return x if quantizer is None else quantizer(x)

    def scale_input(self, factor: Tensor) -> None:
        """From now on multiply the input by a factor, `[input features]`, before it is quantized."""
        before = 1.0 if self.pre_scale is None else self.pre_scale
        self.pre_scale = nn.Parameter((before * factor).to(self.get_weight("weight").dtype), requires_grad=False)

    def fake_output(self, x: Tensor) -> Tensor:
        return self.fake_input(x, "output")

    def quantizers(self) -> Iterator[tuple[str, FakeQuantize]]:
        for name, child in self.named_children():
            if isinstance(child, FakeQuantize):
                yield name.removesuffix("_fake_quant"), child

    def widen(self, bits: int) -> bool:
        """From now on have at least so many bits in every integer, with new ranges where this changes anything.

        Returns:
            whether it does.
        """
        self.min_bits = bits
        changed = [(name, quantizer) for name, quantizer in self.quantizers() if quantizer.widen(bits)]
        for name, quantizer in changed:
            if quantizer.is_weight:
                self._observe_weight(name)
            else:
                quantizer.renew()
        return bool(changed)

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

    @torch.no_grad()
    def weight_on_grid(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The float32 weight that is rounded now, within the codes in use, its scale and its zero point."""
        quantizer = getattr(self, f"{name}_fake_quant")
        if quantizer.observing and not quantizer.learned:
            scale, zero_point = quantizer.measure(self.effective_weight(name))  # as the next forward pass would
        else:
            if not quantizer.has_range:
                quantizer.observe(self.effective_weight(name))
            scale, zero_point = quantizer.qparams()
        return quantizer.clip(self.effective_weight(name, exact=True).float()), scale, zero_point

    def to_packed(self, built: dict[int, nn.Module] | None = None) -> PackedModule:
        """The packed module that computes what this one does in eval. Raises RuntimeError naming a tensor without a range.

        Args:
            built: packed replacements of submodules, by the id of the fake one.
        """
        packed = self.packed_type.empty(self, self.scheme)
        with torch.no_grad():
            for name, axis in self.weight_axes(self).items():
                exact, scale, zero_point = self.weight_on_grid(name)
                packed.put_weight(name, exact, scale, zero_point, axis)
                packed.put_scale(name, self.packed_scale(name, scale))
            for name in (*self.input_names, "output"):
                quantizer = getattr(self, f"{name}_fake_quant")
                if quantizer is not None and not quantizer.spec.dynamic:
                    packed.put_activation(name, *quantizer.qparams())
            self._fill(packed)
        return packed

    @torch.no_grad()
    def settle(self, packed: PackedModule) -> None:
        """Take over what was packed: weights on their grids, no longer quantized in each pass, and activations' ranges."""
        self.settled = True
        if packed._parameters.get("pre_scale") is not None:
            self.pre_scale = nn.Parameter(packed.pre_scale.detach().clone(), requires_grad=False)
        for name in self.weight_axes(self):
            weight = self.get_weight(name)
            weight.data = packed.dequantized_weight(name).to(weight.dtype)
            getattr(self, f"{name}_fake_quant").quantizing = False
        for name in (*self.input_names, "output"):
            quantizer = getattr(self, f"{name}_fake_quant")
            if quantizer is not None and not quantizer.spec.dynamic:
                quantizer.set_qparams(getattr(packed, f"{name}_scale"), getattr(packed, f"{name}_zero_point"))

    def _fill(self, packed: PackedModule) -> None:
        """Copy the float tensors that the packed module keeps."""
        packed.copy_float(self)

    def _describe(self) -> dict[str, Any]:
        flags = {  # 0 or 1: a distributed checkpoint loads only into a tensor of the same length
            "quantizing": int(all(quantizer.quantizing for _, quantizer in self.quantizers() if quantizer.is_weight)),
            "activations": int(
                self.quantizes_activations
                and all(quantizer.quantizing for _, quantizer in self.quantizers() if not quantizer.is_weight)
            ),
            "frozen": int(not all(quantizer.observing for _, quantizer in self.quantizers() if quantizer.is_weight)),
        }
        return {**super()._describe(), **flags, "bits": self.min_bits, "setup": self.setup.to_dict()}

    def _where(self) -> str:
        return f", {self.setup.name!r}," if self.setup.name else ""

    def _restore(self, found: dict[str, Any]) -> None:
        self.restore_flags(found["quantizing"], found["activations"], found["bits"], following=not found["frozen"])

    def restore_flags(self, quantizing: int, activations: int, bits: int, *, following: bool) -> None:
        """Flags as a checkpoint has them; ranges are the checkpoint's, too.

        Args:
            quantizing, activations: whether weights are quantized, and activations.
            bits: as in `widen`.
            following: whether ranges of weights follow the weights.
        """
        self.min_bits, self.quantizes_activations = bits, bool(activations)
        for _, quantizer in self.quantizers():
            quantizer.widen(bits)
            quantizer.quantizing = bool(quantizing if quantizer.is_weight else activations)
            if quantizer.is_weight:
                quantizer.observing = following

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        if f"{prefix}_extra_state" in missing_keys:  # a float checkpoint: its quantizers start afresh
            missing_keys.remove(f"{prefix}_extra_state")
            self.min_bits, self.quantizes_activations = NARROWEST, True
            for _, quantizer in self.quantizers():
                quantizer.widen(self.min_bits)
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
