"""Which modules a recipe quantizes and which it skips (`plan_model`), `prepare` in place, `convert` to a packed copy."""

from __future__ import annotations

import contextlib
import copy
import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_quant.fake_quant import METHODS
from lightning_quant.fold import Flow, find_flow, fold_norm
from lightning_quant.nn import Entry, FakeModule, PackedModule, Unsupported, find_entry, make_fake
from lightning_quant.nn.attention import FakeMultiheadAttention, disable_fast_path
from lightning_quant.nn.base import QuantizedModule, Setup
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.recipe import Recipe, as_recipe, matches
from lightning_quant.spec import QuantScheme, QuantSpec

INFO = "_quantization"


@dataclass
class Match:
    """A module that a recipe quantizes."""

    name: str
    module: nn.Module
    entry: Entry
    scheme: QuantScheme
    note: str = ""


@dataclass
class Plan:
    """What a recipe means for a model: the modules it quantizes, those it skips and why, the BatchNorms it folds."""

    recipe: Recipe
    matches: list[Match] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ModelInfo:
    """What a quantized model remembers of its making; kept on its root, copied and pickled with it."""

    recipe: Recipe
    method: str = "ste"
    skipped: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def get_info(model: nn.Module) -> ModelInfo | None:
    """The record that `prepare`, `convert` and `load_quantized` leave on a model."""
    return model.__dict__.get(INFO)


def fake_modules(model: nn.Module) -> dict[str, FakeModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeModule)}


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def is_prepared(model: nn.Module) -> bool:
    """Whether the model holds modules with quantizers."""
    return any(isinstance(module, FakeModule) for module in model.modules())


def is_packed(model: nn.Module) -> bool:
    """Whether the model holds packed modules."""
    return any(isinstance(module, PackedModule) for module in model.modules())


# --- match ----------------------------------------------------------------------------------------------------------


def _type_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]


def _language_model_heads(model: nn.Module) -> set[int]:
    """Output heads by id: what `get_output_embeddings` returns, and linear layers that share an embedding's weight."""
    heads: set[int] = set()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            with contextlib.suppress(Exception):  # some transformers classes define it and raise
                heads.add(id(getter()))
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if isinstance(module, nn.Linear) and (
            name.rpartition(".")[2] == "lm_head" or (weight is not None and id(weight) in tables)
        ):
            heads.add(id(module))
    return heads


def _check_weights(name: str, module: nn.Module, entry: Entry) -> None:
    if any(isinstance(value, UninitializedParameter) for value in module.parameters(recurse=False)):
        raise ValueError(f"{name}: its weight has no shape yet; run one forward pass before quantizing")
    if parametrize.is_parametrized(module):
        raise Unsupported("parametrized weight; call torch.nn.utils.parametrize.remove_parametrizations first")
    for weight in entry.fake.weight_axes(module):
        stored = module._parameters.get(weight)
        if f"{weight}_g" in module._parameters:
            raise Unsupported(f"weight_norm computes its {weight}; call torch.nn.utils.remove_weight_norm first")
        if stored is not None and not stored.is_floating_point():
            raise Unsupported(f"its {weight} is {stored.dtype}: quantized already")


def _match_one(name: str, module: nn.Module, recipe: Recipe, heads: set[int]) -> tuple[Match, bool]:
    """The match and whether a pattern named it; raises `Unsupported` with the reason of a skip."""
    types = _type_names(module)
    if pattern := recipe.ignored(name, types):
        raise Unsupported(f"ignored by {pattern!r}")
    scheme, pattern = recipe.lookup(name, types)
    entry = find_entry(module)
    if scheme is None or scheme.weight is None:
        raise Unsupported(f"left in float by {pattern!r}" if pattern else "the recipe has no default scheme")
    if pattern is None and not entry.by_default:
        raise Unsupported("stays in float unless a pattern of the recipe names it")
    if pattern is None and id(module) in heads:
        raise Unsupported("output head of a language model: stays in float unless a pattern of the recipe names it")
    _check_weights(name, module, entry)
    return Match(name, module, entry, scheme), pattern is not None


def _warn_unmatched(model: nn.Module, recipe: Recipe) -> None:
    known = [(name, _type_names(module)) for name, module in model.named_modules() if name]
    for pattern in (*recipe.ignore, *recipe.schemes):
        if not any(matches(pattern, name, types) for name, types in known):
            names = [name for name, _ in known]
            tail = pattern.rpartition(".")[2]
            close = [name for name in names if name.endswith(tail)] or difflib.get_close_matches(pattern, names, 3)
            hint = f"; did you mean {', '.join(map(repr, close[:3]))}?" if close else ""
            warnings.warn(f"the recipe's pattern {pattern!r} matches no module{hint}", stacklevel=4)


def _apply_edges(found: list[tuple[Match, bool]], edges: QuantScheme, order: list[str]) -> None:
    names = [match.name for match, _ in found]
    # a trace that missed a layer says nothing about the ends; then it is the order of registration
    ranked = sorted(names, key=order.index) if set(names) <= set(order) else names
    for match, named in found:
        if match.name in (ranked[0], ranked[-1]) and not named:
            match.scheme, match.note = edges, f"{'first' if match.name == ranked[0] else 'last'} layer: {edges.label}"


def _check_ties(model: nn.Module, plan: Plan) -> None:
    schemes = {id(match.module): match for match in plan.matches}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append((name, module))
    for sharing in owners.values():
        matched = [(name, schemes[id(module)]) for name, module in sharing if id(module) in schemes]
        if len({match.scheme.weight for _, match in matched}) > 1:
            told = ", ".join(f"{name!r}: {match.scheme.label}" for name, match in matched)
            raise ValueError(
                f"these modules share one weight but are to be quantized differently ({told}): name them alike, or ignore one"
            )
        if matched and len(matched) < len(sharing):
            floats = ", ".join(repr(name) for name, module in sharing if id(module) not in schemes)
            for _, match in matched:
                match.note = "; ".join(filter(None, [match.note, f"its weight is also read by {floats}, which stays in float"]))


def plan_model(
    model: nn.Module,
    recipe: Recipe | str | dict[str, Any],
    call: Callable[[], Any] | None = None,
) -> Plan:
    """Match a recipe against a float model; nothing is changed.

    Args:
        call: runs `model` on an example, where tracing does not get through (see `find_flow`).

    Raises:
        ValueError: the recipe quantizes nothing, or gives one shared weight two schemes, or the model is quantized already.

    Warns:
        UserWarning: a pattern matches no module.
    """
    recipe = as_recipe(recipe)
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        state = "packed" if is_packed(model) else "prepared for quantization"
        raise ValueError(f"the model is {state} already: give the float model")
    _warn_unmatched(model, recipe)
    plan, heads = Plan(recipe), _language_model_heads(model)
    found: list[tuple[Match, bool]] = []
    opaque: set[int] = set()  # out_proj of attention that stays in float: read by it, never called
    for name, module in model.named_modules():
        weights = [
            key
            for key, value in module._parameters.items()
            if value is not None and (isinstance(value, UninitializedParameter) or value.dim() > 1)
        ]
        parametrized = parametrize.is_parametrized(module)
        if isinstance(module, parametrize.ParametrizationList) or not (weights or parametrized):
            continue
        try:
            if id(module) in opaque:
                raise Unsupported("the attention around it stays in float and reads its weight without calling it")
            match, named = _match_one(name, module, recipe, heads)
            match.scheme, match.note = match.entry.fake.adapt(module, match.scheme)
            found.append((match, named))
        except Unsupported as reason:
            told = f" ({', '.join(weights)})" if weights and str(reason).startswith("no quantized") else ""
            plan.skipped[name] = f"{reason}{told}"
            if isinstance(module, nn.MultiheadAttention):
                opaque.add(id(module.out_proj))
    flow = Flow()
    if recipe.edges is not None or recipe.fold is not None or any(_is_norm(module) for module in model.modules()):
        flow = find_flow(model, call, recipe.fold)
    if recipe.edges is not None and len(found) > 2:  # else nothing would be left in between
        _apply_edges(found, recipe.edges, flow.order)
        for match, _ in found:
            match.scheme, note = match.entry.fake.adapt(match.module, match.scheme)
            match.note = "; ".join(filter(None, dict.fromkeys([match.note, note])))
    plan.matches = [match for match, _ in found]
    if not plan.matches:
        told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(plan.skipped.items())[:8])
        raise ValueError(f"the recipe quantizes nothing in this model. Skipped: {told or 'no module has a weight matrix'}")
    _check_ties(model, plan)
    _plan_folds(plan, flow)
    return plan


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _plan_folds(plan: Plan, flow: Flow) -> None:
    by_name = {match.name: match for match in plan.matches}
    for producer, norm in flow.pairs:
        match = by_name.get(producer)
        if match is None:
            plan.skipped[norm] = f"not folded: {producer} stays in float"
        elif match.scheme.output is not None:
            plan.skipped[norm] = f"not folded: the output of {producer} is quantized in front of it"
        else:
            plan.pairs.append((producer, norm))
    for norm, reason in flow.reasons.items():
        plan.skipped[norm] = f"not folded: {reason}"


# --- prepare --------------------------------------------------------------------------------------------------------


def _default_observer(spec: QuantSpec | None, training: bool, learned: bool) -> str:
    if spec is not None and spec.is_int and spec.bits < 8 and (learned or not training):
        return "mse"
    return "moving_average" if training else "minmax"


def _setup(match: Match, recipe: Recipe, method: str, training: bool) -> Setup:
    learned = method == "lsq"
    weight_observer = recipe.weight_observer
    if weight_observer is None:
        weight_observer = "mse" if learned and match.scheme.weight is not None and match.scheme.weight.bits < 8 else "minmax"
    return Setup(
        match.scheme,
        match.name,
        method,
        recipe.observer or _default_observer(match.scheme.input or match.scheme.output, training, learned),
        recipe.observer_options,
        weight_observer,
        recipe.weight_observer_options,
    )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def apply_plan(model: nn.Module, plan: Plan, *, method: str = "ste", training: bool = True) -> nn.Module:
    """Do what a plan made for this very model says; see `prepare`."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; valid: {', '.join(METHODS)}")
    modules = dict(model.named_modules())
    folds = dict(plan.pairs)
    if not training:
        for producer, norm in folds.items():
            fold_norm(modules[producer], modules[norm])
            replace_module(model, modules[norm], nn.Identity())
    for match in plan.matches:
        setup = _setup(match, plan.recipe, method, training)
        fake = make_fake(match.module, match.entry)
        fake.attach(setup)
        if training and match.name in folds:
            assert isinstance(fake, FoldableModule)
            fake.fold(modules[folds[match.name]], folds[match.name])
        fake.observe_weights()
    disable_fast_path(model)
    notes = {match.name: match.note for match in plan.matches if match.note}
    folded = {norm: producer for producer, norm in plan.pairs}
    model.__dict__[INFO] = ModelInfo(plan.recipe, method, plan.skipped, folded, notes)
    return model


def prepare(
    model: nn.Module,
    recipe: Recipe | str | dict[str, Any],
    *,
    method: str = "ste",
    training: bool = True,
    call: Callable[[], Any] | None = None,
) -> nn.Module:
    """Give a float model's modules their quantizers, in place; all flags are off, so it still computes in float.

    Modules change their class and keep their identity, names, parameters, hooks and order.

    Args:
        model: any float module.
        recipe: what `as_recipe` takes.
        method: `"ste"`, or `"lsq"` for learned scales.
        training: for QAT: BatchNorms stay and learn, folded into the quantized weights; else (PTQ) they are folded for good.
        call: runs `model` on an example, to find BatchNorms and the order of layers where tracing does not get through.

    Returns:
        `model`.

    Raises:
        ValueError: see `plan_model`; nothing was changed then.

    Example:
        >>> net = prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8-dynamic")
        >>> type(net[0]).__name__, isinstance(net[0], nn.Linear)
        ('FakeLinear', True)
    """
    return apply_plan(model, plan_model(model, recipe, call), method=method, training=training)


# --- convert --------------------------------------------------------------------------------------------------------


def _share_tied(pairs: list[tuple[FakeModule, PackedModule]]) -> None:
    """Modules that shared a float weight share the packed one, where it came out the same."""
    first: dict[tuple[int, str], PackedModule] = {}
    for fake, packed in pairs:
        if "weight" not in fake._parameters or "weight_packed" not in packed._parameters:
            continue
        key = (id(fake.weight), str(fake.scheme.weight))
        other = first.setdefault(key, packed)
        mine = {name: value for name, value in packed._parameters.items() if name.startswith("weight_") and value is not None}
        if other is not packed and all(torch.equal(value, other._parameters[name]) for name, value in mine.items()):  # type: ignore[arg-type]
            packed._parameters.update({name: other._parameters[name] for name in mine})


def convert(model: nn.Module) -> nn.Module:
    """A packed copy of a prepared model, in eval mode; the prepared one is untouched.

    It computes what the prepared model computes in eval with fake quantization on. BatchNorms of folded pairs are gone.

    Raises:
        ValueError: the model is not prepared.
        RuntimeError: an activation's range was never observed; the message names it.
    """
    fakes = fake_modules(model)
    if not fakes:
        raise ValueError("nothing to convert: prepare the model first (QATCallback, or quantize with a recipe)")
    built: dict[int, nn.Module] = {}
    replaced: dict[int, Any] = {}
    pairs = []
    for fake in sorted(fakes.values(), key=lambda module: isinstance(module, FakeMultiheadAttention)):  # after their out_proj
        packed = fake.to_packed(built)
        built[id(fake)] = packed
        pairs.append((fake, packed))
        for norm in fake.folded_norm:
            replaced[id(norm)] = nn.Identity()
    _share_tied(pairs)
    # deepcopy takes what its memo holds, so float weights are never copied
    converted: nn.Module = copy.deepcopy(model, {**built, **replaced})
    disable_fast_path(converted)
    return converted.eval()


def param_groups(module: nn.Module, *, scale_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
    """Optimizer groups with the learned scales and zero points apart: their own rate, and no weight decay.

    Args:
        module: a module prepared with `method="lsq"` (or any other: then there is only the first group).
        scale_lr: the rate of scales and zero points; by default `lr` of `options`, or the optimizer's.
        options: of the first group, such as `lr` and `weight_decay`.

    Returns:
        groups for any torch optimizer: first what the float model has, in its order, then the quantizers' parameters.

    Example:
        >>> net = prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8", method="lsq")
        >>> [len(group["params"]) for group in param_groups(net, lr=1e-3, weight_decay=1e-4, scale_lr=1e-4)]
        [2, 3]
    """
    learned = {
        id(parameter) for fake in fake_modules(module).values() for _, part in fake.quantizers() for parameter in part.parameters()
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [value for value in trained if id(value) not in learned], **options}]
    scales = [value for value in trained if id(value) in learned]
    if scales:
        rate = scale_lr if scale_lr is not None else options.get("lr")
        groups.append({"params": scales, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})})
    return groups
