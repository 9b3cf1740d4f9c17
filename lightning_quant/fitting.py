"""Whether a checkpoint fits a prepared model: compared before anything is loaded, and what differs is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.nn import FakeModule
from lightning_quant.nn.base import Setup, described_modules
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.spec import QuantScheme

# where a model's root keeps what is known of its making
INFO = "_quantization"


def add_notes(model: nn.Module, notes: Mapping[str, str]) -> None:
    """Add notes on modules, by name, to what a prepared model keeps for `lq.summary`."""
    if (info := model.__dict__.get(INFO)) is not None:
        for name, note in notes.items():
            info.notes[name] = "; ".join(filter(None, (info.notes.get(name), note)))


def _flat(told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in told.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return flat


def _swap_edges(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Follow the checkpoint in which layers are the first and the last: the order may depend on the example that a stage has."""
    mine = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, FakeModule)}

    def told(states: Mapping[str, Any]) -> dict[str, str]:
        flat = {name: {**_flat(state["scheme"]), **_flat({**state["setup"], "name": ""})} for name, state in states.items()}
        return {name: str(sorted(values.items())) for name, values in flat.items()}

    there, here = told(found), told({name: part._describe() for name, part in mine.items()})
    if there == here or there.keys() != here.keys() or sorted(there.values()) != sorted(here.values()):
        return
    for name, part in mine.items():
        if there[name] != here[name]:
            folded = part.folded_norm
            part.attach(Setup(QuantScheme.from_dict(found[name]["scheme"]), **found[name]["setup"]))
            part.folded_norm = folded


def _adopt_folds(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Fold as the checkpoint was: which pairs are found may depend on the example that a stage has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, told in found.items():
        fake, norm = modules[name], modules.get(told.get("folded") or " ")
        if isinstance(fake, FoldableModule) and (told.get("folded") is None or isinstance(norm, _BatchNorm)):
            fake.folded_norm = []
            if norm is not None:
                fake.fold(norm, told["folded"])
    if (info := model.__dict__.get(INFO)) is not None:
        info.folded = {told["folded"]: name for name, told in found.items() if told.get("folded")}


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    there, here = ({**_flat(told["scheme"]), **_flat({**told["setup"], "name": ""})} for told in (theirs, mine))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return ", ".join(f"{key} {there.get(key)!r} there and {here.get(key)!r} here" for key in keys)


def check_state(model: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """A hook of prepared models: a state_dict that was made with another recipe is refused before anything is loaded.

    Raises:
        ValueError: the text shows the difference.
    """
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if packed := described_modules(state, "packed"):
        raise ValueError(
            f"the checkpoint holds packed integers ({', '.join(list(packed)[:3])}), this model is prepared for training: "
            f"lq.load_from_checkpoint loads it; to train on, take the checkpoint of the training"
        )
    found = described_modules(state, "fake")
    if not found:
        return  # a float checkpoint
    _swap_edges(model, found)
    modules = model.named_modules(remove_duplicate=False)
    mine = {name: module._describe() for name, module in modules if isinstance(module, FakeModule)}
    differences = [f"{name}: {told}" for name in found if name in mine and (told := _difference(found[name], mine[name]))]
    differences += [f"{name}: quantized there and float here" for name in found if name not in mine]
    # a module may keep frozen parts out of its state_dict (strict_loading=False)
    held = [name for name in mine if name not in found and any(key.startswith(f"{name}.") for key in state)]
    differences += [f"{name}: float there and quantized here" for name in held]
    if differences:
        more = f"; and {len(differences) - 5} more modules" if len(differences) > 5 else ""
        raise ValueError(
            f"the checkpoint was made with another recipe than this model was prepared with: {'; '.join(differences[:5])}{more}. "
            f"Use the recipe and method that it was made with, or lq.load_from_checkpoint"
        )
    _adopt_folds(model, found)


def is_check(hook: Any) -> bool:
    return getattr(hook, "hook", None) is check_state
