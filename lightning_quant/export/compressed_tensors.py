"""compressed-tensors: what `AutoModelForCausalLM.from_pretrained` (and vLLM) reads of a packed transformers model.

`lightning_quant.packing` has that format's layout, so symmetric integers go over as they are. Asymmetric ones transformers 5.23
cannot load (compressed-tensors 0.20 gives packed zero points another shape than it allocates for them), so `code - zero_point` is
written in their place, as symmetric integers of one bit more: the same weights. The zero points are kept apart, for
`lq.load_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.nn.base import EXTRA_STATE, encode_state
from lightning_quant.numerics import code_dtype
from lightning_quant.packing import pack, unpack, unpack_zero_point
from lightning_quant.spec import QuantScheme, QuantSpec
from lightning_quant.surgery import packed_modules


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers'."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers") for cls in type(model).__mro__)


def reason_against(model: nn.Module) -> str | None:
    """Why compressed-tensors cannot hold a packed model; None if it can."""
    for name, packed in packed_modules(model).items():
        scheme = packed.scheme
        assert scheme.weight is not None
        if not isinstance(packed, nn.Linear):
            return f"{name} is a {type(packed).__name__}, and it knows linear layers"
        if scheme.weight.dtype not in ("int", "float8_e4m3fn"):
            return f"{name} has {scheme.weight.dtype} weights"
        if packed._parameters.get("pre_scale") is not None:
            return f"{name} rescales its input (pre_scale)"
        if scheme.output is not None or (scheme.input is not None and not scheme.input.dynamic):
            return f"{name} has static activations"
        if scheme.weight.granularity == "group" and packed.in_features % (scheme.weight.group_size or 1):
            return f"{name} has {packed.in_features} inputs, no multiple of its group size {scheme.weight.group_size}"
        if _format(scheme) == "int-quantized" and (not scheme.weight.symmetric or scheme.weight.bits != 8):
            return f"{name} has {scheme.weight.label} weights with quantized activations"
        if not scheme.weight.symmetric and (scheme.weight.bits == 8 or scheme.weight.granularity == "tensor"):
            return f"{name} has {scheme.weight.label} weights"
    return None


def _format(scheme: QuantScheme) -> str:
    assert scheme.weight is not None
    if not scheme.weight.is_int:
        return "float-quantized"
    return "pack-quantized" if scheme.input is None else "int-quantized"


def _written(spec: QuantSpec) -> QuantSpec:
    """The symmetric spec that takes the place of an asymmetric one."""
    return spec if spec.symmetric else replace(spec, bits=spec.bits + 1, symmetric=True, signed=True)


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.is_int else "float",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a packed model's `config.json`."""
    packed = packed_modules(model)
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, module in packed.items():
        by_scheme.setdefault(module.scheme, []).append(name)
    groups = {}
    for number, (scheme, names) in enumerate(by_scheme.items()):
        assert scheme.weight is not None
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else names,
            "weights": _arguments(_written(scheme.weight)),
            "input_activations": None if scheme.input is None else _arguments(scheme.input),
            "output_activations": None,
            "format": _format(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed],
    }


def to_compressed(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """A packed model's state as compressed-tensors names it.

    Returns:
        the tensors, the zero points that they do not show, and each module's description of itself.
    """
    tensors = {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}
    apart: dict[str, Tensor] = {}
    described = {}
    for name, module in packed_modules(model).items():
        described[name] = module._describe()
        spec, columns = module.scheme.weight, module.packed_shape("weight")[1]
        assert spec is not None
        if _format(module.scheme) != "pack-quantized":
            words = tensors.pop(f"{name}.weight_packed")
            tensors.pop(f"{name}.weight_shape")
            tensors[f"{name}.weight"] = unpack(words, spec, columns).contiguous()
        elif not spec.symmetric:
            apart[f"{name}.weight_zero_point"] = stored = tensors.pop(f"{name}.weight_zero_point")
            words = tensors[f"{name}.weight_packed"]
            codes = unpack(words, spec, columns) - _spread(stored, spec, len(words), columns)
            tensors[f"{name}.weight_packed"] = pack(codes.to(torch.int8), _written(spec))
    return tensors, apart, described


def _spread(stored: Tensor, spec: QuantSpec, channels: int, columns: int) -> Tensor:
    """Packed zero points, one for each weight: int32 `[channels, columns]`."""
    zero_point = unpack_zero_point(stored, spec, channels)
    return zero_point.repeat_interleave(columns // zero_point.shape[1], dim=1)


def from_compressed(state: Mapping[str, Tensor], apart: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo `to_compressed`."""
    state = dict(state)
    for name, told in described.items():
        spec = QuantScheme.from_dict(told["scheme"]).weight
        assert spec is not None
        codes = state.pop(f"{name}.weight", None)
        if codes is not None:
            state[f"{name}.weight_packed"] = pack(codes, spec)
            state[f"{name}.weight_shape"] = torch.tensor(codes.shape)
        elif not spec.symmetric:
            channels, columns = state[f"{name}.weight_shape"].tolist()
            state[f"{name}.weight_zero_point"] = stored = apart[f"{name}.weight_zero_point"]
            found = unpack(state[f"{name}.weight_packed"], _written(spec), columns) + _spread(stored, spec, channels, columns)
            state[f"{name}.weight_packed"] = pack(found.to(code_dtype(spec)), spec)
        state[f"{name}.{EXTRA_STATE}"] = encode_state(told)
    return state
