"""Which modules a recipe quantizes, and which it skips and why: `plan_model`. Nothing is changed here."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from lightning_quant.fold import Flow, find_flow
from lightning_quant.nn import Entry, PackedModule, Unsupported, find_entry
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.nn.experts import UnfusedExperts, find_layout, holds_experts, unfuse
from lightning_quant.observers import make_observer
from lightning_quant.recipe import Recipe, as_recipe, matches
from lightning_quant.spec import QuantScheme


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share their memory counted once."""
    unique = {(tensor.data_ptr() or id(tensor), tensor.shape): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that share their memory counted once."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


@dataclass
class Match:
    """A module that a recipe quantizes; `place` is its name, with `*` for an expert's index."""

    name: str
    module: nn.Module
    entry: Entry
    scheme: QuantScheme
    note: str = ""
    place: str = ""


@dataclass
class Plan:
    """What a recipe means for a model: the modules it quantizes, those it skips and why, the BatchNorms it folds.

    `unfused` are to take the place of fused experts in the model; the matches of experts are their layers.
    """

    recipe: Recipe
    matches: list[Match] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    unfused: dict[str, UnfusedExperts] = field(default_factory=dict)


# a qualified name and the names of a module's types: what patterns are matched against
Named = tuple[str, list[str]]


def _type_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]


def language_model_heads(model: nn.Module) -> set[int]:
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
        hooks = module._forward_pre_hooks.values()
        if f"{weight}_orig" in module._parameters and not any(isinstance(hook, BasePruningMethod) for hook in hooks):
            raise Unsupported(f"a hook computes its {weight} (spectral_norm?); call torch.nn.utils.remove_spectral_norm first")
        if f"{weight}_g" in module._parameters:
            raise Unsupported(f"weight_norm computes its {weight}; call torch.nn.utils.remove_weight_norm first")
        if stored is not None and not stored.is_floating_point():
            raise Unsupported(f"its {weight} is {stored.dtype}: quantized already")


def _rule(recipe: Recipe, known: list[Named]) -> tuple[QuantScheme | None, str | None]:
    """The scheme of a module that goes by several names and the pattern that named it; raises `Unsupported` if it is ignored."""
    for pattern in recipe.ignore:
        if any(matches(pattern, *names) for names in known):
            raise Unsupported(f"ignored by {pattern!r}")
    for pattern, scheme in recipe.schemes.items():
        if any(matches(pattern, *names) for names in known):
            return scheme, pattern
    return recipe.scheme, None


def _match_one(
    name: str, module: nn.Module, recipe: Recipe, heads: set[int], routers: set[int], owners: list[Named] | None = None
) -> tuple[Match, bool]:
    """The match and whether a pattern named it; raises `Unsupported` with the reason of a skip."""
    scheme, pattern = _rule(recipe, [(name, _type_names(module)), *(owners or [])])
    if id(module) in routers and (pattern is None or not isinstance(module, nn.Linear)):
        raise Unsupported("router of a mixture of experts: stays in float")
    entry = find_entry(module)
    if scheme is None or scheme.weight is None:
        raise Unsupported(f"left in float by {pattern!r}" if pattern else "the recipe has no default scheme")
    if pattern is None and not entry.by_default:
        raise Unsupported("stays in float unless a pattern of the recipe names it")
    if pattern is None and id(module) in heads:
        raise Unsupported("output head of a language model: stays in float unless a pattern of the recipe names it")
    _check_weights(name, module, entry)
    return Match(name, module, entry, scheme, place=name), pattern is not None


def _routers(model: nn.Module) -> set[int]:
    """Modules beside fused experts that choose among them, by id: a matrix with a row for each expert."""
    found: set[int] = set()
    for name, module in model.named_modules():
        if not name or not (count := holds_experts(module)):
            continue
        own = {id(part) for part in module.modules()}
        for path, part in model.get_submodule(name.rpartition(".")[0]).named_modules():
            weight = part._parameters.get("weight")
            if id(part) in own or weight is None or isinstance(weight, UninitializedParameter) or weight.dim() != 2:
                continue
            named, rows = not {"gate", "router"}.isdisjoint(path.split(".")), len(weight) == count
            if (named and rows) or (not isinstance(part, nn.Linear) and (named or rows) and not _is_known(part)):
                found.add(id(part))
    return found


def _is_known(module: nn.Module) -> bool:
    try:
        return bool(find_entry(module))
    except Unsupported:
        return False


# --- fused experts --------------------------------------------------------------------------------------------------


def _expert_names(model: nn.Module) -> Iterator[Named]:
    """What patterns may name once fused experts are taken apart, which training does not do: each expert, and its layers."""
    for name, module in model.named_modules():
        if name and holds_experts(module):
            with contextlib.suppress(Unsupported):
                layout = find_layout(module)
                yield from ((f"{name}.{index}", []) for index in range(layout.count))
                yield from ((f"{name}.{layer}", ["Linear"]) for layer in layout.layers)


def _take_apart(name: str, module: nn.Module, recipe: Recipe, owners: Counter[int], training: bool) -> UnfusedExperts:
    _rule(recipe, [(name, _type_names(module))])
    find_layout(module)
    if training:
        raise Unsupported("fused experts stay in float in training; post-training quantization (lq.quantize) does them")
    if not name:
        raise Unsupported("the model is nothing but fused experts, which cannot be replaced in place: quantize what holds them")
    if any(value is not None and owners[id(value)] > 1 for value in module._parameters.values()):
        raise Unsupported("fused experts that share a parameter with another module")
    return unfuse(module)


def _match_experts(
    name: str, module: nn.Module, experts: UnfusedExperts, recipe: Recipe, skipped: dict[str, str]
) -> list[tuple[Match, bool]]:
    """The layers of experts that the recipe quantizes; raises `Unsupported` if there is none."""
    found, reasons = [], {}
    for layer in experts.layout.layers:
        index, _, projection = layer.partition(".")
        owners: list[Named] = [(f"{name}.{index}", []), (name, _type_names(module))]
        try:
            match, named = _match_one(f"{name}.{layer}", experts.get_submodule(layer), recipe, set(), set(), owners)
            match.scheme, match.note = match.entry.fake.adapt(match.module, match.scheme)
            match.place = f"{name}.*.{projection}"
            found.append((match, named))
        except Unsupported as reason:
            reasons[f"{name}.{layer}"] = str(reason)
    if not found:
        raise Unsupported("; ".join(dict.fromkeys(reasons.values())))
    skipped.update(reasons)
    return found


# --- the whole ------------------------------------------------------------------------------------------------------


def _warn_unmatched(model: nn.Module, recipe: Recipe) -> None:
    known = [(name, _type_names(module)) for name, module in model.named_modules() if name]
    known += _expert_names(model)
    for pattern in (*recipe.ignore, *recipe.schemes):
        if not any(matches(pattern, name, types) for name, types in known):
            names = [name for name, _ in known]
            tail = pattern.rpartition(".")[2]
            close = [name for name in names if name.endswith(tail)] or difflib.get_close_matches(pattern, names, 3)
            hint = f"; did you mean {', '.join(map(repr, close[:3]))}?" if close else ""
            warnings.warn(f"the recipe's pattern {pattern!r} matches no module{hint}", stacklevel=4)


def _apply_edges(found: list[tuple[Match, bool]], edges: QuantScheme, order: list[str]) -> None:
    places = {match.place: match.name for match, _ in found}  # all experts of a module are one place
    if len(places) < 3:  # else nothing would be left in between
        return
    steps = {name.rpartition(".")[0]: step for step, name in reversed(list(enumerate(order)))}  # experts: their activation's
    steps.update((name, step) for step, name in enumerate(order))
    at = {place: steps.get(place if place == name else place.partition(".*.")[0], -1) for place, name in places.items()}
    # a trace that missed a layer says nothing about the ends; then it is the order of registration
    ranked = sorted(places, key=at.__getitem__) if min(at.values()) >= 0 else list(places)
    for match, named in found:
        if match.place in (ranked[0], ranked[-1]) and not named:
            match.scheme, match.note = edges, f"{'first' if match.place == ranked[0] else 'last'} layer: {edges.label}"


def _check_observers(plan: Plan) -> None:
    """Wrong names and options must show before the first module changes."""
    recipe, spec = plan.recipe, plan.matches[0].scheme.weight
    assert spec is not None
    for name, options in ((recipe.observer, recipe.observer_options), (recipe.weight_observer, recipe.weight_observer_options)):
        if name is not None:
            make_observer(name, spec, 0, options)


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


def _match_all(model: nn.Module, plan: Plan, training: bool) -> list[tuple[Match, bool]]:
    """What the recipe quantizes, each with whether a pattern named it; the rest goes to `plan.skipped`."""
    recipe, heads, routers = plan.recipe, language_model_heads(model), _routers(model)
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
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
            if holds_experts(module):
                experts = _take_apart(name, module, recipe, owners, training)
                found += _match_experts(name, module, experts, recipe, plan.skipped)
                plan.unfused[name] = experts
                continue
            match, named = _match_one(name, module, recipe, heads, routers)
            match.scheme, match.note = match.entry.fake.adapt(module, match.scheme)
            found.append((match, named))
        except Unsupported as reason:
            told = f" ({', '.join(weights)})" if weights and str(reason).startswith("no quantized") else ""
            plan.skipped[name] = f"{reason}{told}"
            if isinstance(module, nn.MultiheadAttention):
                opaque.add(id(module.out_proj))
    return found


def plan_model(
    model: nn.Module,
    recipe: Recipe | str | dict[str, Any],
    call: Callable[[], Any] | None = None,
    warn: bool = True,
    training: bool = True,
) -> Plan:
    """Match a recipe against a float model; nothing is changed.

    Args:
        call: runs `model` on an example, where tracing does not get through (see `find_flow`).
        warn: about patterns that match nothing.
        training: for QAT, where fused experts stay in float; else they are planned as linear layers, one by one.

    Raises:
        ValueError: the recipe quantizes nothing, names an unknown observer or option,
            or gives one shared weight two schemes, or the model is quantized already.

    Warns:
        UserWarning: a pattern matches no module.
    """
    recipe = as_recipe(recipe)
    if quantized := [module for module in model.modules() if isinstance(module, QuantizedModule)]:
        state = "packed" if isinstance(quantized[0], PackedModule) else "prepared for quantization"
        raise ValueError(f"the model is {state} already: give the float model")
    if warn:
        _warn_unmatched(model, recipe)
    plan = Plan(recipe)
    found = _match_all(model, plan, training)
    flow = Flow()
    if recipe.edges is not None or recipe.fold is not None or any(isinstance(module, _BatchNorm) for module in model.modules()):
        flow = find_flow(model, call, recipe.fold)
    if recipe.edges is not None:
        _apply_edges(found, recipe.edges, flow.order)
        for match, _ in found:
            match.scheme, note = match.entry.fake.adapt(match.module, match.scheme)
            match.note = "; ".join(filter(None, dict.fromkeys([match.note, note])))
    plan.matches = [match for match, _ in found]
    if not plan.matches:
        told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(plan.skipped.items())[:8])
        raise ValueError(f"the recipe quantizes nothing in this model. Skipped: {told or 'no module has a weight matrix'}")
    _check_observers(plan)
    _check_ties(model, plan)
    _plan_folds(model, plan, flow)
    return plan


def _plan_folds(model: nn.Module, plan: Plan, flow: Flow) -> None:
    by_name = {match.name: match for match in plan.matches}
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    for producer, norm in flow.pairs:
        match = by_name.get(producer)
        if match is None:
            plan.skipped[norm] = f"not folded: {producer} stays in float"
        elif match.scheme.output is not None:
            plan.skipped[norm] = f"not folded: the output of {producer} is quantized in front of it"
        elif owners[id(match.module._parameters.get("weight"))] > 1:
            plan.skipped[norm] = f"not folded: another module shares the weight of {producer}"
        else:
            plan.pairs.append((producer, norm))
    for norm, reason in flow.reasons.items():
        plan.skipped[norm] = f"not folded: {reason}"
