"""`prepare` a model in place, `convert` it to a packed copy, and what both need to know of a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.fitting import INFO, check_state, is_check
from lightning_quant.fold import fold_norm
from lightning_quant.gradients import Rule
from lightning_quant.methods import check_schemes, get_method, resolve_options
from lightning_quant.nn import FakeModule, PackedModule, make_fake
from lightning_quant.nn.attention import FakeMultiheadAttention, disable_fast_path
from lightning_quant.nn.base import Setup
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.plan import Match, Plan, model_bytes, plan_model
from lightning_quant.recipe import Recipe
from lightning_quant.sharding import is_sharded
from lightning_quant.spec import QuantSpec


@dataclass
class ModelInfo:
    """What a quantized model remembers of its making; kept on its root, copied and pickled with it."""

    recipe: Recipe
    method: str = "ste"
    skipped: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    float_bytes: int | None = None
    method_options: dict[str, float] = field(default_factory=dict)


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


# --- prepare --------------------------------------------------------------------------------------------------------


def _observer(spec: QuantSpec | None, rule: Rule, otherwise: str, narrow: str | None = None) -> str:
    """Where a range comes from: below 8 bits where the rule learns its scale from, or `narrow`."""
    if spec is None or not spec.is_int or spec.bits >= 8:
        return otherwise
    return rule.observer if rule.fake is not None else narrow or otherwise


def _setup(match: Match, recipe: Recipe, method: str, options: dict[str, float], training: bool) -> Setup:
    rules, scheme = get_method(method), match.scheme
    plain, narrow = ("moving_average", None) if training else ("minmax", "mse")
    return Setup(
        scheme,
        match.name,
        method,
        options,
        recipe.observer or _observer(scheme.input or scheme.output, rules.activation, plain, narrow),
        recipe.observer_options,
        recipe.weight_observer or _observer(scheme.weight, rules.weight, "minmax"),
        recipe.weight_observer_options,
    )


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others, given by their ids, wherever these are registered."""
    for parent in list(model.modules()) if new else ():
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    method: str = "ste",
    method_options: Mapping[str, float] | None = None,
    training: bool = True,
) -> nn.Module:
    """Do what a plan made for this very model says; see `prepare`."""
    if is_sharded(model):
        raise ValueError("the model is sharded already (fully_shard): prepare it before, or copy it with plain_copy")
    options = resolve_options(method, method_options)
    check_schemes(method, {match.name: match.scheme for match in plan.matches})
    modules, float_bytes = dict(model.named_modules()), model_bytes(model)
    folds = dict(plan.pairs)
    replace_modules(model, {id(modules[name]): experts for name, experts in plan.unfused.items()})
    if not training:
        for producer, norm in folds.items():
            fold_norm(modules[producer], modules[norm])
        replace_modules(model, {id(modules[norm]): nn.Identity() for norm in folds.values()})
    for match in plan.matches:
        setup = _setup(match, plan.recipe, method, options, training)
        fake = make_fake(match.module, match.entry)
        fake.attach(setup)
        if training and match.name in folds:
            assert isinstance(fake, FoldableModule)
            fake.fold(modules[folds[match.name]], folds[match.name])
        fake.observe_weights()
        for _, quantizer in fake.quantizers():
            quantizer.observing = training and quantizer.is_weight
    if (mesh := getattr(model, "device_mesh", None)) is not None:  # a LightningModule's, under ModelParallelStrategy
        shard_scales(model, mesh["data_parallel"])
    disable_fast_path(model)
    model.register_load_state_dict_pre_hook(check_state)
    notes = {match.name: match.note for match in plan.matches if match.note}
    folded = {norm: producer for producer, norm in plan.pairs}
    model.__dict__[INFO] = ModelInfo(plan.recipe, method, plan.skipped, folded, notes, float_bytes, options)
    return model


def shard_scales(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every learned scale an FSDP2 group of its own: float32 in any precision, where a group has one dtype.

    `prepare` does it for a LightningModule in a Trainer with `ModelParallelStrategy`; elsewhere call it before `fully_shard`.

    Args:
        model: prepared with `method="lsq"`, not sharded yet.
        mesh: the one-dimensional mesh that the model will be sharded over.
    """
    for fake in fake_modules(model).values():
        for _, quantizer in fake.quantizers():
            if quantizer.learned:
                fully_shard(quantizer, mesh=mesh, reshard_after_forward=False)


def prepare(
    model: nn.Module,
    recipe: Recipe | str | dict[str, Any],
    *,
    method: str = "ste",
    method_options: Mapping[str, float] | None = None,
    training: bool = True,
    call: Callable[[], Any] | None = None,
) -> nn.Module:
    """Give a float model's modules their quantizers, in place; nothing is quantized yet, so it still computes in float.

    Modules change their class and keep their identity, names, parameters, hooks and order.

    Args:
        model: any float module.
        recipe: what `as_recipe` takes.
        method: a key of `METHODS`; see `QATCallback`.
        method_options: its options, by name.
        training: for QAT: BatchNorms stay and learn, folded into the quantized weights; else (PTQ) they are folded for good.
        call: runs `model` on an example, to find BatchNorms and the order of layers where tracing does not get through.

    Returns:
        `model`.

    Raises:
        ValueError: a method that does not exist or does not fit the recipe, and see `plan_model`; nothing was changed then.

    Example:
        >>> net = prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8-dynamic")
        >>> type(net[0]).__name__, isinstance(net[0], nn.Linear)
        ('FakeLinear', True)
    """
    resolve_options(method, method_options)
    plan = plan_model(model, recipe, call, training=training)
    return apply_plan(model, plan, method=method, method_options=method_options, training=training)


def relink_norms(model: nn.Module) -> None:
    """Find folded BatchNorms anew by name: they may have been replaced since, as `sync_batchnorm=True` does.

    Raises:
        RuntimeError: a folded BatchNorm is gone.
    """
    modules = dict(model.named_modules())
    present = {id(module) for module in modules.values()}
    for name, fake in fake_modules(model).items():
        if isinstance(fake, FoldableModule) and fake.norm is not None and id(fake.norm) not in present:
            found = modules.get(fake.folded_name)
            if not isinstance(found, _BatchNorm):
                raise RuntimeError(f"{name}: the BatchNorm {fake.folded_name!r} that is folded into it is no longer in the model")
            fake.folded_norm = [found]


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
    Modules that are packed already are taken over as they are.

    Raises:
        ValueError: the model is not prepared.
        RuntimeError: an activation's range was never observed, or a module still has more bits than its recipe says; the message
            names it.
    """
    if not is_prepared(model):
        raise ValueError("nothing to convert: prepare the model first (QATCallback, or quantize with a recipe)")
    return pack_all(model)


def _check_widths(fakes: Mapping[str, FakeModule]) -> None:
    for name, fake in fakes.items():
        specs = [spec for spec in (fake.scheme.weight, fake.scheme.input, fake.scheme.output) if spec is not None and spec.is_int]
        wide = [spec.bits for spec in specs if spec.bits < fake.min_bits]
        if wide:
            raise RuntimeError(
                f"{name}: its training is at {fake.min_bits} bits so far, and its recipe has {wide[0]}: train on to the last width "
                f"of QATCallback(bits=...); before, the model can be evaluated, but not packed"
            )


def pack_all(model: nn.Module) -> nn.Module:
    """`convert`, also of a model whose prepared modules were all packed one by one."""
    fakes = fake_modules(model)
    _check_widths(fakes)
    relink_norms(model)
    built: dict[int, nn.Module] = {id(packed): packed for packed in packed_modules(model).values()}
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
    hooks = converted._load_state_dict_pre_hooks
    converted._load_state_dict_pre_hooks = OrderedDict((key, hook) for key, hook in hooks.items() if not is_check(hook))
    return converted.eval()


def param_groups(module: nn.Module, *, scale_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
    """Optimizer groups with the learned scales and zero points apart: their own rate, and no weight decay.

    Args:
        module: a module prepared with `method="lsq"` (or any other: then there is only the first group).
        scale_lr: the rate of scales and zero points; by default `lr` of `options`, or the optimizer's. Adam undoes LSQ's
            gradient scale, so with it a tenth of `lr` or less does better.
        options: of the first group, such as `lr` and `weight_decay`.

    Returns:
        groups for any torch optimizer: first what the float model has, in its order, then the quantizers' parameters.

    Example:
        >>> net = prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8", method="lsq")
        >>> [len(group["params"]) for group in param_groups(net, lr=1e-3, weight_decay=1e-4, scale_lr=1e-4)]
        [2, 3]
    """
    learned = learned_parameters(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [value for value in trained if id(value) not in learned], **options}]
    scales = [value for value in trained if id(value) in learned]
    if scales:
        rate = scale_lr if scale_lr is not None else options.get("lr")
        groups.append({"params": scales, "weight_decay": 0.0, **({} if rate is None else {"lr": rate})})
    return groups


def learned_parameters(module: nn.Module) -> set[int]:
    """The learned scales and zero points, by id."""
    return {id(value) for fake in fake_modules(module).values() for _, part in fake.quantizers() for value in part.parameters()}


def widen_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """A float run's optimizer state for an optimizer that also has learned scales: they start without state.

    Args:
        module: the prepared module.
        optimizer: of any groups, in which the float parameters come in the order that they had in the float run.
        state: as `optimizer.state_dict()` gave it.

    Returns:
        the state to load; None (load what is given) if the groups do not match.
    """
    learned = learned_parameters(module)
    saved, groups = iter(state["param_groups"]), []
    moved: dict[int, int] = {}
    start = 0
    for group in optimizer.param_groups:
        indices = range(start, start + len(group["params"]))
        start += len(indices)
        kept = [index for index, value in zip(indices, group["params"], strict=True) if id(value) not in learned]
        options = {key: value for key, value in group.items() if key != "params"}
        if kept or not indices:
            before = next(saved, None)
            if before is None or len(before["params"]) != len(kept):
                return None
            moved.update(zip(before["params"], kept, strict=True))
            options = {**options, **before}
        groups.append({**options, "params": list(indices)})
    if next(saved, None) is not None:
        return None
    return {**state, "state": {moved[index]: value for index, value in state["state"].items()}, "param_groups": groups}
