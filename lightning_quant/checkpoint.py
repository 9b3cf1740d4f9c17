"""Lightning checkpoints of quantized models: rebuild the structure that a checkpoint describes, then load it."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_quant.adapters import BASE_KEY
from lightning_quant.fitting import INFO, check_state
from lightning_quant.nn import FakeModule, find_entry, make_fake
from lightning_quant.nn.attention import disable_fast_path
from lightning_quant.nn.base import Setup, described_modules
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.plan import model_bytes
from lightning_quant.recipe import Recipe
from lightning_quant.serialization import build_packed, load_quantized
from lightning_quant.spec import QuantScheme
from lightning_quant.surgery import ModelInfo, is_prepared

M = TypeVar("M", bound=L.LightningModule)


def load_from_checkpoint(
    module_class: type[M],
    checkpoint_path: str | os.PathLike[str],
    map_location: Any = "cpu",
    **kwargs: Any,
) -> M:
    """`module_class.load_from_checkpoint` for checkpoints of prepared (QAT) and packed models, and of float ones.

    The plain one builds a float module, whose keys such a checkpoint does not have; this one first gives it the structure that
    the checkpoint describes.

    Args:
        module_class: the LightningModule's class.
        checkpoint_path: a `.ckpt` that a Trainer saved; read with `weights_only=True`.
        map_location: as in `torch.load`.
        kwargs: the constructor's arguments, over the hyperparameters that were saved.

    Returns:
        the module, prepared or packed as it was saved.

    Raises:
        ValueError: no Lightning checkpoint, or one of another model.
    """
    checkpoint = _read(checkpoint_path, map_location)
    module = module_class(**init_arguments(module_class, checkpoint, kwargs))
    if is_overridden("configure_model", module):
        module.configure_model()
    return _fill(module, checkpoint, str(checkpoint_path))


def restore(model: M, path: str | os.PathLike[str]) -> M:
    """A copy of a module with the structure and the weights of a checkpoint; the module itself stays as it is.

    Args:
        model: the float module, or one that is prepared as the checkpoint's was.
        path: a float, prepared (QAT) or packed `.ckpt`, read with `weights_only=True`, or a folder of `lq.save_quantized`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no Lightning checkpoint, or one of another model.
    """
    if Path(path).is_dir():
        return load_quantized(configured(model), path)  # type: ignore[return-value]
    checkpoint = _read(path, "cpu")
    return _fill(configured(model), checkpoint, str(path))


def configured(model: M) -> M:
    """A copy whose `configure_model` was run, so that all of its layers exist."""
    module = copy.deepcopy(model)
    if is_overridden("configure_model", module):
        module.configure_model()
    return module


def checkpoint_kind(path: str | os.PathLike[str]) -> str:
    """What a checkpoint holds: `"float"`, `"fake"` (prepared) or `"packed"` modules; Lightning's sharded folders count as float."""
    source = Path(path)
    if source.is_dir():
        return "float" if (source / ".metadata").exists() else "packed"
    state = _read(source, "cpu")["state_dict"]
    return next((kind for kind in ("packed", "fake") if described_modules(state, kind)), "float")


def _read(path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"the checkpoint {os.fspath(path)!r} does not exist")
    checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{os.fspath(path)} is no Lightning checkpoint: it has no state_dict")
    return checkpoint


def _fill(module: M, checkpoint: dict[str, Any], source: str) -> M:
    """Give a module the structure and the weights of a checkpoint."""
    if BASE_KEY in checkpoint["state_dict"]:
        raise ValueError(
            f"{source} holds an adapter without its base: give it as ckpt_path to a Trainer with the LoRACallback (and "
            f"QuantPrecision) that it was saved with"
        )
    module.on_load_checkpoint(checkpoint)
    state, float_bytes = checkpoint["state_dict"], model_bytes(module)
    if described := described_modules(state, "packed"):
        if is_prepared(module):
            raise ValueError(f"{source} holds a packed model, but the model given is prepared: give the float one")
        module = build_packed(module, state, source)  # type: ignore[assignment]
    elif is_prepared(module):
        if not described_modules(state, "fake"):
            raise ValueError(f"{source} holds a float model, but the model given is prepared: give the float one")
    else:
        described = rebuild_prepared(module, state, source)
    if described:
        module.__dict__[INFO] = replace(_recorded(checkpoint, described), float_bytes=float_bytes)
    try:
        module.load_state_dict(state, strict=module.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit this {type(module).__name__}: {error}") from None
    return module


def init_arguments(module_class: type, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments as `save_hyperparameters` kept them: by name, or all in one."""
    saved = dict(checkpoint.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    name = checkpoint.get(L.LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if name and name != "kwargs":
        return {name: saved, **given}
    takes = inspect.signature(module_class.__init__).parameters  # type: ignore[misc]
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
        saved = {key: value for key, value in saved.items() if key in takes}
    return {**saved, **given}


def _recorded(checkpoint: dict[str, Any], described: dict[str, dict[str, Any]]) -> ModelInfo:
    """The recipe as `QATCallback` saved it, else one that names every module."""
    setup: dict[str, Any] = next((told["setup"] for told in described.values() if "setup" in told), {})
    method, options = setup.get("method", "ste"), setup.get("method_options", {})
    folded = {told["folded"]: name for name, told in described.items() if told.get("folded")}
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("QATCallback") and "recipe" in state:
            return ModelInfo(Recipe.from_dict(state["recipe"]), method, {}, folded, method_options=options)
    return ModelInfo(
        Recipe(schemes={name: told["scheme"] for name, told in described.items()}), method, {}, folded, method_options=options
    )


def rebuild_prepared(module: nn.Module, state: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Give a float module the quantizers that a state_dict describes, in place; returns the descriptions."""
    modules = dict(module.named_modules(remove_duplicate=False))
    described = described_modules(state, "fake")
    missing = [name for name in described if name not in modules]
    if missing:
        raise ValueError(f"{source} was not made from this {type(module).__name__}: it has no module {', '.join(missing[:3])}")
    for name, told in described.items():
        if isinstance(modules[name], FakeModule):
            continue  # under its other name
        fake = make_fake(modules[name], find_entry(modules[name]))
        fake.attach(Setup(QuantScheme.from_dict(told["scheme"]), **told["setup"]))
        if isinstance(fake, FoldableModule) and told.get("folded"):
            fake.fold(modules[told["folded"]], told["folded"])
    if described:
        disable_fast_path(module)
        module.register_load_state_dict_pre_hook(check_state)
    return described
