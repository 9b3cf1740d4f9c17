"""Adapters merged into their base, with what each way of storing the result costs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.adapters import ADAPTER, RECORD, adapter_root, is_base_hook
from lightning_quant.fitting import INFO
from lightning_quant.loftq import round_to_grid
from lightning_quant.nn import FakeModule, PackedModule
from lightning_quant.qlora import as_dtype, base_recipe, pack_in_place
from lightning_quant.recipe import Recipe
from lightning_quant.report import table
from lightning_quant.surgery import packed_modules, replace_modules
from lightning_quant.unpacking import unpack_module


@dataclass(frozen=True)
class MergeRow:
    """A layer: the size of what was merged, and errors of the ways to store the sum, all relative to the sum's norm.

    Args:
        layer: its name in the merged model.
        change: of the adapter's part.
        errors: way -> error. Where it is as large as `change`, little of the fine-tuning is left.
    """

    layer: str
    change: float
    errors: dict[str, float]


@dataclass
class Merged:
    """A merged model, and a row for each layer that had an adapter."""

    model: nn.Module
    rows: list[MergeRow] = field(default_factory=list)

    def __str__(self) -> str:
        ways = list(self.rows[0].errors) if self.rows else []
        cells = [(row.layer, f"{row.change:.2e}", *(f"{row.errors[way]:.2e}" for way in ways)) for row in self.rows]
        count = max(len(self.rows), 1)
        mean = [sum(row.errors[way] for row in self.rows) / count for way in ways]
        cells.append(("mean", f"{sum(row.change for row in self.rows) / count:.2e}", *(f"{value:.2e}" for value in mean)))
        return table(("layer", "change", *ways), cells)


@torch.no_grad()
def merge_adapter(
    model: nn.Module, *, dtype: str | torch.dtype = "float32", recipe: str | Mapping[str, Any] | Recipe | None = None
) -> Merged:
    """A copy of a fine-tuned model with its adapter in the weights and PEFT's wrappers gone; the model itself stays as it is.

    A packed base is dequantized and the adapter added to it in float32. That sum is what was trained; storing it in few bits again
    costs about as much as packing the base did, and may cost more than the adapter has gained: the rows tell for each layer.
    A base with quantizers (`QATCallback`, then `LoRACallback`) gives a prepared model for `lq.convert`, already on its grid.

    Args:
        model: trained with `LoRACallback`.
        dtype: of the merged weights, such as `"bfloat16"`.
        recipe: pack the result by it: a preset or mode of `QuantPrecision` (weights alone, no data). For others merge first, and
            give the model to `lq.quantize`.

    Returns:
        the model, float, packed or prepared, in eval mode, and the errors in `rows`; printed as a table.

    Raises:
        ValueError: there is no adapter, or a layer that cannot be merged.

    Example:
        >>> from lightning_quant.adapters import inject
        >>> from lightning_quant.qlora import as_dtype, base_recipe, pack_in_place
        >>> net = pack_in_place(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), base_recipe("nf4"))
        >>> _ = inject(net, r=4, alpha=8, dropout=0.0, target_modules="all-linear", init="default", modules_to_save=[], options={})
        >>> merged = merge_adapter(net, dtype="bfloat16")
        >>> type(merged.model[0]).__name__, sorted(merged.rows[0].errors)
        ('Linear', ['bfloat16', 'nf4 group64'])
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapter_root(model)  # or raise
    kind = as_dtype(dtype)
    again = None if recipe is None else base_recipe(recipe)
    merged = _without_hooks(copy.deepcopy(model)).eval()
    rows: list[MergeRow] = []
    for name, part in list(merged.named_modules()):
        if isinstance(part, LoraLayer) and isinstance(part, nn.Module):
            plain, row = _merge_layer(name, part, kind, again)
            replace_modules(merged, {id(part): plain})
            rows.append(row)
        elif isinstance(part, AuxiliaryTrainingWrapper):
            saved: Any = part
            replace_modules(merged, {id(part): saved.modules_to_save[ADAPTER]})
    for packed in packed_modules(merged).values():
        replace_modules(merged, {id(packed): unpack_module(packed, kind)})
    fakes = any(isinstance(part, FakeModule) for part in merged.modules())
    if not fakes:
        merged.__dict__.pop(INFO, None)
        if kind != torch.float32:
            for value in merged.parameters():
                if value.is_floating_point():
                    value.data = value.data.to(kind)
    root = merged
    for part in merged.modules():
        if hasattr(part, "peft_config"):
            root = part
            del part.peft_config
    if hasattr(root, "_hf_peft_config_loaded"):
        root._hf_peft_config_loaded = False  # type: ignore[assignment]
    for value in merged.parameters():
        value.requires_grad_(value.is_floating_point() or value.is_complex())
    if again is not None:
        if fakes:
            raise ValueError("the base has quantizers of its own: merge without a recipe, and give the result to lq.convert")
        pack_in_place(merged, again)
    return Merged(merged, rows)


def _without_hooks(model: nn.Module) -> nn.Module:
    model.__dict__.pop(RECORD, None)
    for kind in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        hooks = getattr(model, kind)
        setattr(model, kind, OrderedDict((key, hook) for key, hook in hooks.items() if not is_base_hook(hook)))
    return model


def _merge_layer(name: str, layer: Any, dtype: torch.dtype, recipe: Recipe | None) -> tuple[nn.Module, MergeRow]:
    base = layer.get_base_layer()
    if isinstance(base, FakeModule):
        return _merge_fake(name, layer, base)
    spec = base.scheme.weight if isinstance(base, PackedModule) else None
    plain = unpack_module(base, torch.float32) if isinstance(base, PackedModule) else base.float()
    weight: Tensor = plain.weight  # type: ignore[assignment]
    before = weight.detach().clone()
    layer.base_layer = plain
    try:
        layer.merge(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    exact = layer.get_base_layer().weight.detach().float()
    size = exact.norm().clamp(min=1e-30)
    matrix = exact.t() if type(plain).__name__ == "Conv1D" else exact
    errors = {str(dtype).removeprefix("torch."): ((exact.to(dtype).float() - exact).norm() / size).item()}
    specs = [spec, recipe.scheme.weight if recipe is not None and recipe.scheme is not None else None]
    for grid in dict.fromkeys(each for each in specs if each is not None):
        errors[grid.label] = ((round_to_grid(matrix.contiguous(), grid) - matrix).norm() / size).item()
    layer.get_base_layer().weight.data = exact.to(dtype)
    return plain, MergeRow(name, ((exact - before).norm() / size).item(), errors)


def _merge_fake(name: str, layer: Any, base: FakeModule) -> tuple[nn.Module, MergeRow]:
    """The base takes the sum, which its quantizer has rounded all along."""
    exact = base.get_weight("weight").detach().clone()
    base.adapter = []
    own = base.get_weight("weight")
    change, size = (exact - own).norm(), exact.norm().clamp(min=1e-30)
    own.data = exact
    assert base.scheme.weight is not None
    error = ((base.fake_weight().detach() - exact).norm() / size).item()
    return base, MergeRow(name, (change / size).item(), {base.scheme.weight.label: error})
