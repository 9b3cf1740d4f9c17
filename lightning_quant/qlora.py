"""Models on a frozen low-bit base: packed in place, or layer by layer while they are built."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lightning_quant.fitting import INFO
from lightning_quant.nn import FakeModule, PackedModule, Unsupported, find_entry
from lightning_quant.nn.attention import FakeMultiheadAttention, disable_fast_path
from lightning_quant.nn.base import Setup
from lightning_quant.plan import Match, Plan, model_bytes, plan_model
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.surgery import ModelInfo, get_info, is_packed, is_prepared, packed_modules, replace_modules

# what `QuantPrecision` calls a frozen base -> the recipe of its weights; activations stay in float
MODES: dict[str, dict[str, Any]] = {
    "nf4": {"scheme": "nf4"},
    "fp4": {"scheme": {"weight": {"bits": 4, "dtype": "fp4", "granularity": "group", "group_size": 64}}},
    "int8": {"scheme": "w8a16"},
    "int4": {"scheme": "w4a16", "group_size": 64},
    "fp8": {"scheme": {"weight": {"bits": 8, "dtype": "float8_e4m3fn"}}},
}


def base_recipe(mode: str | Mapping[str, Any] | Recipe, ignore: tuple[str, ...] = (), double_quant: bool = False) -> Recipe:
    """The recipe of a frozen base.

    Args:
        mode: `"nf4"`, `"fp4"`, `"int8"`, `"int4"`, `"fp8"`, or whatever `as_recipe` takes.
        ignore: further patterns of modules that stay in float.
        double_quant: keep the scales of nf4 and fp4 in 8 bits.

    Raises:
        ValueError: it needs calibration data, or double quantization does not apply.
    """
    told: dict[str, Any] = {}
    if isinstance(mode, str) and mode in MODES:
        told = dict(MODES[mode])
    else:
        try:
            told = as_recipe(mode).to_dict()
        except ValueError as error:
            raise ValueError(f"{error}. As a base also: {', '.join(MODES)}") from None
    if double_quant:
        told["double_quant"] = True
    before = told.get("ignore", ())
    # output heads are left alone anyway, under whatever name
    told["ignore"] = [*before, *(pattern for pattern in ignore if pattern not in before and pattern != "lm_head")]
    recipe = Recipe.from_dict(told)
    schemes = [recipe.scheme, recipe.edges, *recipe.schemes.values()]
    if any(scheme is not None and scheme.needs_data for scheme in schemes) or recipe.algorithms:
        raise ValueError(
            f"the recipe needs calibration data ({', '.join(recipe.algorithms) or 'static activations'}), which a frozen base does "
            f"not see: quantize with trainer.quantize, or give {', '.join(MODES)}, or a recipe of weights or dynamic activations"
        )
    return recipe


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name, or a short one. Raises ValueError for anything else."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating dtype; such as 'float32', 'bfloat16', 'float16'")
    return found


# --- packing in place -----------------------------------------------------------------------------------------------


def pack_module(match: Match, recipe: Recipe, backend: str = "", built: dict[int, nn.Module] | None = None) -> PackedModule:
    """A module's packed one, each weight rounded to the nearest value of its grid. The float one is not to be used afterwards."""
    setup = Setup(
        match.scheme,
        match.name,
        weight_observer=recipe.weight_observer or "minmax",
        weight_observer_options=recipe.weight_observer_options,
    )
    fake_type = match.entry.fake
    match.module.__class__ = fake_type
    fake = match.module
    assert isinstance(fake, FakeModule)
    fake.attach(setup)
    fake.observe_weights()
    packed = fake.to_packed(built)
    packed.use_backend(backend)
    packed.train(fake.training)
    fake._parameters.clear()  # whoever holds on to the module does not hold on to its weights
    fake._modules.clear()
    _give_back()
    return packed


@cache
def _trimmer() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, where there is one."""
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return found


def _give_back() -> None:
    """Return freed memory to the system: small packed weights between large float ones would keep all of theirs."""
    trim = _trimmer()
    if trim is not None:
        trim(0)


def pack_in_place(model: nn.Module, recipe: Recipe, backend: str = "") -> nn.Module:
    """Replace a model's layers by packed ones, one after the other: no second copy of the float model exists.

    A model that was packed by the same recipe is left as it is. What stays in float keeps its `Parameter` objects.

    Args:
        model: float, on the device where it shall be quantized.
        recipe: from `base_recipe`.
        backend: a key of `KERNELS` to prefer, or `"native"`.

    Returns:
        `model`.

    Raises:
        ValueError: the recipe matches nothing, the model was quantized otherwise, or weights have no storage.

    Example:
        >>> net = pack_in_place(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), base_recipe("nf4"))
        >>> type(net[0]).__name__, net[0].scheme.label
        ('PackedLinear', 'w: nf4 group64')
    """
    if is_prepared(model):
        raise ValueError("the model is prepared for quantization-aware training: its weights are not frozen; give the float model")
    if (info := get_info(model)) is not None and is_packed(model):
        if info.recipe != recipe:
            raise ValueError(f"the model is packed by another recipe already. Its own: {info.recipe}; this one: {recipe}")
        for packed in packed_modules(model).values():
            packed.use_backend(backend)
        return model
    early = _take_early(model)
    float_bytes = model_bytes(model) + sum(early.values())
    plan = _plan(model, recipe, bool(early))
    if unfilled := [match.name for match in plan.matches if any(value.is_meta for value in match.module.parameters())]:
        raise ValueError(
            f"{', '.join(unfilled[:3])} has no weights yet (meta device): read them with lq.load_pretrained, or build the model on "
            f"the CPU"
        )
    modules = dict(model.named_modules())
    replace_modules(model, {id(modules[name]): experts for name, experts in plan.unfused.items()})
    del modules
    built: dict[int, nn.Module] = {}
    notes = {match.name: match.note for match in plan.matches if match.note}
    for match in sorted(
        plan.matches, key=lambda match: issubclass(match.entry.fake, FakeMultiheadAttention)
    ):  # after their out_proj
        packed = pack_module(match, recipe, backend, built)
        built[id(packed)] = packed
        replace_modules(model, {id(match.module): packed})
        match.module = packed
    for packed in packed_modules(model).values():
        packed.use_backend(backend)
    disable_fast_path(model)
    model.__dict__[INFO] = ModelInfo(recipe, "ste", plan.skipped, {}, notes, float_bytes)
    return model


def _take_early(model: nn.Module) -> dict[str, int]:
    """What was packed before, while it was made or read: name -> bytes that it had in float."""
    return {
        name: sum(prod(packed.packed_shape(weight)) for weight in packed.weight_axes(packed)) * packed._float_dtype.itemsize
        for name, packed in packed_modules(model).items()
    }


def _plan(model: nn.Module, recipe: Recipe, started: bool) -> Plan:
    """The plan for what is not packed yet. A submodule that was packed on its own keeps what it has in float."""
    if not started:
        return plan_model(model, recipe, training=False)
    hidden: list[tuple[nn.Module, str, nn.Module]] = []
    skipped: dict[str, str] = {}
    for name, part in model.named_modules():
        if name and (info := get_info(part)) is not None:
            skipped |= {f"{name}.{inner}": reason for inner, reason in info.skipped.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and (isinstance(child, PackedModule) or get_info(child) is not None):
                hidden.append((parent, name, child))
                parent._modules[name] = nn.Identity()
    plan = Plan(recipe)
    try:
        with contextlib.suppress(ValueError):  # nothing is left to quantize
            plan = plan_model(model, recipe, warn=False, training=False)
    finally:
        for parent, name, child in reversed(hidden):
            parent._modules[name] = child
    plan.skipped = {**skipped, **plan.skipped}
    return plan


# --- packing while a model is built ---------------------------------------------------------------------------------


def _may_name(pattern: str, name: str) -> bool:
    """Whether a pattern could match a module of which only the last part of its name is known."""
    return pattern.startswith("re:") or fnmatchcase(name, pattern.rpartition(".")[2])


@contextlib.contextmanager
def packing_as_built(recipe: Recipe, backend: str = "") -> Iterator[None]:
    """Linear layers that are made in this context are packed when they become part of another module.

    A layer is left for `pack_in_place` where a pattern of the recipe might name it, as only the last part of its name is known.
    """
    default = recipe.scheme
    whole = default is None or default.weight is None or recipe.edges is not None

    def pack(parent: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
        if type(child) is not nn.Linear or any(value.is_meta for value in child.parameters()):
            return None
        known = [*recipe.ignore, *recipe.schemes]
        if name == "lm_head" or isinstance(parent, nn.MultiheadAttention) or any(_may_name(each, name) for each in known):
            return None
        if any(each in known for each in ("Linear", "Module")):
            return None
        assert default is not None
        try:
            entry = find_entry(child)
            scheme, note = entry.fake.adapt(child, default)
        except Unsupported:
            return None
        with torch.no_grad():
            return pack_module(Match(name, child, entry, scheme, note), recipe, backend)

    if whole:
        yield
        return
    handle = torch_module.register_module_module_registration_hook(pack)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
