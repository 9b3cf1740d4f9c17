"""Packed modules back to float: as they compute, and as a start for QAT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_quant.calibration import set_flags
from lightning_quant.fitting import INFO
from lightning_quant.methods import METHODS, get_method
from lightning_quant.nn import FakeModule, PackedModule, lookup
from lightning_quant.packing import unpack_zero_point
from lightning_quant.surgery import fake_modules, get_info, is_prepared, packed_modules, prepare, replace_modules

# whose packed weights are other tensors than their float ones
NOT_UNPACKED = (nn.RNNBase, nn.MultiheadAttention)


def unpack_module(packed: PackedModule, dtype: torch.dtype) -> nn.Module:
    """The float module that computes what a packed one of weights alone does."""
    if packed.scheme.input is not None:
        raise ValueError(f"a {type(packed).__name__} that quantizes its input ({packed.scheme.label}) has no float equal")
    return float_module(packed, dtype)


def float_module(packed: PackedModule, dtype: torch.dtype) -> nn.Module:
    """The float module with the weights of a packed one; its input is not quantized."""
    found = lookup(type(packed))
    if found is None or issubclass(found[0], NOT_UNPACKED):
        raise ValueError(f"a {type(packed).__name__} cannot be unpacked: train the float model with QATCallback instead")
    if packed._parameters.get("pre_scale") is not None:
        raise ValueError(
            f"a {type(packed).__name__} that rescales its input ({packed.scheme.label}) has no float equal: "
            f"give the algorithm explicit=False"
        )
    kind = found[0]
    module = kind.__new__(kind)
    own = {"scheme", "spec_args", "_float_dtype", "_parameters", "_buffers", "_modules"}
    nn.Module.__init__(module)
    module.__dict__.update({key: value for key, value in packed.__dict__.items() if key not in own})
    for name, child in packed._modules.items():
        module.register_module(name, child)
    for name, value in packed._buffers.items():
        module.register_buffer(name, value)
    for name in packed.weight_axes(packed):
        module.register_parameter(name, nn.Parameter(packed.dequantized_weight(name).to(dtype), requires_grad=False))
    for name in packed.optional_float:
        bias = packed._parameters.get(name)
        module.register_parameter(name, None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False))
    return module


@torch.no_grad()
def unpack(model: nn.Module, *, method: str = "lsq", method_options: Mapping[str, float] | None = None) -> nn.Module:
    """A packed model as one for `QATCallback` to train on, from where an algorithm of PTQ has brought it.

    Weights lie on the grid that they were packed on, and scales and zero points, which learn from now on, are those that were
    packed: before it is trained, `lq.convert` gives the same codes again. Where rounding to nearest is too far from the float model
    to be trained back, as at 2 bits, GPTQ, AWQ or AutoRound make a better start. The model given is not changed.

    Args:
        model: packed, with layers of integers; `QATCallback` takes the recipe that packed it, without its algorithms.
        method: of `QATCallback`; one whose scales of weights learn.
        method_options: its options, by name.

    Returns:
        the prepared model, in float32 and training mode; every floating-point parameter requires a gradient.

    Raises:
        ValueError: the model is not packed; it has layers that rescale their inputs, recurrent ones, or attention in one module;
            a method that would measure ranges anew, or that lacks codes which the model has.

    Example:
        >>> import lightning_quant as lq
        >>> recipe = lq.Recipe("w4a16", group_size=32, symmetric=False)
        >>> packed = lq.quantize(nn.Sequential(nn.Linear(64, 8)), recipe)
        >>> again = lq.convert(unpack(packed))
        >>> torch.equal(again[0].weight_packed, packed[0].weight_packed)
        True
    """
    _check_method(method)
    info, packed = get_info(model), packed_modules(model)
    if info is None or not packed or is_prepared(model):
        raise ValueError("nothing to unpack: give a model that lq.quantize, trainer.quantize or lq.load_quantized returned")
    plain = copy.deepcopy(model)
    plain.__dict__.pop(INFO)
    replace_modules(plain, _float_modules(plain))
    for value in plain.parameters():
        value.requires_grad_(value.is_floating_point())
    recipe = replace(info.recipe, algorithms=(), algorithm_options={})
    prepare(plain.float().train(), recipe, method=method, method_options=method_options)
    fakes = fake_modules(plain)
    differ = [name for name in {**packed, **fakes} if _scheme(packed, name) != _scheme(fakes, name)]
    if differ:
        raise ValueError(f"{differ[0]}: the recipe that packed it ({info.recipe}) does not prepare it the same way again")
    set_flags(plain, quantizing=True)  # before: when it starts, ranges are measured
    for name, fake in fakes.items():
        _take_over(fake, packed[name])
    return plain


def _check_method(method: str) -> None:
    if get_method(method).weight.fake is None:
        learning = ", ".join(name for name, entry in METHODS.items() if entry.weight.fake is not None)
        raise ValueError(
            f"method={method!r} measures the ranges of weights anew, and they would leave the grid that they are on: use one "
            f"whose scales learn ({learning})"
        )


def _float_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Id of a packed module -> its float one; packed weights that are shared are shared again."""
    made: dict[int, nn.Module] = {}
    first: dict[int, Any] = {}
    for packed in packed_modules(model).values():
        made[id(packed)] = module = float_module(packed, torch.float32)
        for name in packed.weight_axes(packed):
            key = id(packed._parameters[f"{name}_packed"])
            module._parameters[name] = first.setdefault(key, module._parameters[name])
    return made


def _scheme(modules: Mapping[str, Any], name: str) -> Any:
    return modules[name].scheme if name in modules else None


def _take_over(fake: FakeModule, packed: PackedModule) -> None:
    """The qparams of a packed module, for its weights and its static activations."""
    spec = packed.scheme.weight
    assert spec is not None
    for name, axis in packed.weight_axes(packed).items():
        _, scale, zero_point = packed.packed_weight(name)
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        elif zero_point.dim() == 2:
            zero_point = unpack_zero_point(zero_point, spec, packed.packed_shape(name)[axis])
        quantizer = getattr(fake, f"{name}_fake_quant")
        quantizer.set_qparams(scale, zero_point)
        if not torch.allclose(quantizer.clip(fake.get_weight(name)), fake.get_weight(name), rtol=1e-5, atol=0.0):
            raise ValueError(
                f"{quantizer.name}: method={fake.setup.method!r} has the codes {quantizer.levels} only, and the packed weight has "
                f"others: use method='lsq'"
            )
    for name in (*packed.input_names, "output"):
        quantizer = getattr(fake, f"{name}_fake_quant")
        if quantizer is not None and not quantizer.spec.dynamic:
            quantizer.set_qparams(getattr(packed, f"{name}_scale"), getattr(packed, f"{name}_zero_point"))
