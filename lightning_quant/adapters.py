"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by PEFT, on float and packed layers: inject, save without the base, load."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.export.compressed_tensors import is_pretrained
from lightning_quant.loftq import loftq
from lightning_quant.nn import FakeModule, PackedModule
from lightning_quant.nn.base import decode_state, encode_state
from lightning_quant.plan import language_model_heads, plan_model
from lightning_quant.recipe import Recipe

ADAPTER = "default"
# what an adapter's state says of the base that it belongs to
BASE_KEY = "lora_base"
RECORD = "_lightning_quant_adapter"
LOFTQ_ITERATIONS = 5
# PEFT's initialisations that change the base's weights
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq")


def find_root(module: nn.Module) -> tuple[str, nn.Module]:
    """Where adapters go: the only transformers model inside, with its name; else the module itself, whose name is `""`."""
    found: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") or not other for other, _ in found)
        if not inside and is_pretrained(part):
            found.append((name, part))
    return found[0] if len(found) == 1 else ("", module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or any(
        f"{cls.__module__}.{cls.__qualname__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).__mro__
    )


def find_targets(root: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The names, in `root`, of the layers that get an adapter.

    Args:
        target_modules: `"all-linear"`: every linear layer but output heads; a list of names or their last parts; or a regular
            expression that matches a whole name.

    Raises:
        ValueError: nothing matches, or a layer that matches is none that PEFT can adapt.
    """
    heads = language_model_heads(root)
    opaque = {id(part.out_proj) for part in root.modules() if isinstance(part, nn.MultiheadAttention)}
    modules = {name: part for name, part in root.named_modules() if name}
    if target_modules == "all-linear":
        found = [name for name, part in modules.items() if _is_linear(part) and id(part) not in heads | opaque]
    elif isinstance(target_modules, str):
        found = [name for name in modules if re.fullmatch(target_modules, name)]
    else:
        found = [name for name in modules if any(name == each or name.endswith(f".{each}") for each in target_modules)]
    if not found:
        linear = [name for name, part in modules.items() if _is_linear(part)]
        raise ValueError(
            f"target_modules={target_modules!r} names no layer of {type(root).__name__}; its linear layers: "
            f"{', '.join(linear[:8]) or 'none'}{', ...' if len(linear) > 8 else ''}"
        )
    for name in found:
        if isinstance(modules[name], (PackedModule, FakeModule)) and not _is_linear(modules[name]):
            raise ValueError(
                f"target_modules: {name} is a quantized {type(modules[name]).__name__}, which takes no adapter: name linear "
                f"layers, or leave it in float by QuantPrecision(ignore=[{name!r}])"
            )
    return found


def inject(
    module: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | Sequence[str],
    init: str,
    modules_to_save: Sequence[str],
    options: Mapping[str, Any],
) -> str:
    """Give a model's layers adapters, in place, and freeze everything else.

    Returns:
        the name of the submodule that they were made in.

    Raises:
        ValueError: see `find_targets`; or an initialisation that would change packed weights, or a packed module to save.
    """
    from peft import LoraConfig, inject_adapter_in_model

    where, root = find_root(module)
    targets = find_targets(root, target_modules)
    packed = [name for name in targets if isinstance(root.get_submodule(name), PackedModule)]
    if packed and init.startswith(_CHANGE_BASE) and init != "loftq":
        raise ValueError(
            f"init={init!r} changes the base's weights, and {packed[0]} is packed: use 'loftq', 'default' or 'gaussian', or a "
            f"float base"
        )
    for name, part in root.named_modules():
        held = any(name == each or name.endswith(f".{each}") for each in modules_to_save)
        if held and any(isinstance(inner, PackedModule) for inner in part.modules()):
            raise ValueError(f"modules_to_save: {name} is packed and cannot be trained: leave it in float by ignore=[{name!r}]")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        init_lora_weights=True if init in ("default", "loftq") else init,  # type: ignore[arg-type]
        modules_to_save=list(modules_to_save) or None,
        **options,
    )
    fakes = [name for name in targets if isinstance(root.get_submodule(name), FakeModule)]
    if fakes and (dropout or options):
        raise ValueError(
            f"{fakes[0]} is fake-quantized together with its adapter, which cannot be with dropout={dropout} and options "
            f"{dict(options)}: use dropout=0 and plain LoRA"
        )
    config._register_custom_module({FakeModule: fake_lora_layer()} if fakes else {})
    for value in module.parameters():
        value.requires_grad_(False)
    inject_adapter_in_model(config, root)
    for value in root.parameters():  # of a bfloat16 base, too, adapters are trained in float32
        if value.requires_grad and value.is_floating_point():
            value.data = value.data.float()
    module.__dict__[RECORD] = {"root": where}
    return where


@cache
def fake_lora_layer() -> type[nn.Module]:
    """PEFT's layer around a fake-quantized one, which rounds the sum of its weight and the adapter's."""
    from peft.tuners.lora import Linear

    class FakeLoraLinear(Linear):
        def __init__(self, base_layer: FakeModule, adapter_name: str, **kwargs: Any) -> None:
            transposed = base_layer.weight_axes(base_layer)["weight"] == 1
            super().__init__(base_layer, adapter_name, is_target_conv_1d_layer=transposed, **kwargs)
            self.fan_in_fan_out = transposed
            base_layer.adapter = [self]

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = self.base_layer(x, *args, **kwargs)
            return out

    return FakeLoraLinear


def has_adapter(module: nn.Module) -> bool:
    """Whether `inject` was applied to this module."""
    return RECORD in module.__dict__


def adapter_root(module: nn.Module) -> nn.Module:
    """The submodule that adapters were made in."""
    if not has_adapter(module):
        raise ValueError(f"this {type(module).__name__} has no adapter: train it with LoRACallback")
    return module.get_submodule(module.__dict__[RECORD]["root"])


@torch.no_grad()
def start_loftq(module: nn.Module, recipe: Recipe, r: int, target_modules: str | Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Change a float model's weights to what LoftQ quantizes, before it is packed.

    Returns:
        layer of `find_root`'s module -> its adapter's A and B.

    Raises:
        ValueError: the weights are packed already.
    """
    where, root = find_root(module)
    if any(isinstance(part, PackedModule) for part in module.modules()):
        raise ValueError("init='loftq' starts from float weights, and the model is packed already: make its layers in __init__")
    planned = {match.name: match for match in plan_model(module, recipe, training=False).matches}
    found = {}
    for name in find_targets(root, target_modules):
        match = planned.get(f"{where}.{name}" if where else name)
        if match is None or match.scheme.weight is None:
            continue
        layer: Any = match.module
        axis = match.entry.fake.weight_axes(layer)["weight"]
        rest, down, up = loftq(layer.weight.movedim(axis, 0), match.scheme.weight, r, LOFTQ_ITERATIONS)
        layer.weight.copy_(rest.movedim(0, axis))
        found[name] = (down, up)
    return found


@torch.no_grad()
def put_adapter(module: nn.Module, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set the A and B of adapters, so that `B A` is what they add to the weight."""
    root = adapter_root(module)
    for name, (down, up) in values.items():
        layer: Any = root.get_submodule(name)
        layer.lora_A[ADAPTER].weight.copy_(down)
        layer.lora_B[ADAPTER].weight.copy_(up / layer.scaling[ADAPTER])


def adapter_config(module: nn.Module) -> Any:
    """PEFT's `LoraConfig` of the adapter."""
    configs: Any = adapter_root(module).peft_config
    return configs[ADAPTER]


# --- the base's identity --------------------------------------------------------------------------------------------


def _adapter_names(module: nn.Module) -> set[str]:
    """Names of the tensors that belong to adapters: of tuner layers what PEFT added, and trained copies of modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: set[str] = set()
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, BaseTunerLayer) and isinstance(part, nn.Module):
            added = (*part.adapter_layer_names, *part.other_param_names)
            found |= {prefix + key for key, _ in part.named_parameters() if key.split(".")[0] in added}
            found |= {prefix + key for key, _ in part.named_buffers() if key.split(".")[0] in added}
        elif isinstance(part, AuxiliaryTrainingWrapper):
            keys = (key for key in part.state_dict() if not key.startswith("original_module."))
            found |= {prefix + key for key in keys}
    return found


def _base(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = _adapter_names(module)
    for name, value in module.named_parameters():
        if name not in own:
            # wrappers come and go, the base's own names stay
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), value


def fingerprint(module: nn.Module) -> str:
    """A hash of the base's weights, whatever adapters there are."""
    return hash_tensors(dict(_base(module)))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes.

    Example:
        >>> hash_tensors({"a": torch.zeros(2)})[:8]
        '0f69f2b1'
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().contiguous().view(-1)
        if not flat.numel():
            continue
        for piece in flat.split(1 << 24):
            digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- a state without the base ---------------------------------------------------------------------------------------


def leave_out_base(module: nn.Module) -> None:
    """From now on the module's `state_dict()` holds its adapter and buffers, and `load_state_dict` (strictly) takes them.

    The state tells which base it belongs to; loading it over another base raises.
    """
    record = module.__dict__[RECORD]
    record["base"] = fingerprint(module)
    module.register_state_dict_post_hook(_drop_base)
    module.register_load_state_dict_pre_hook(_add_base)


def is_base_hook(hook: Any) -> bool:
    """Whether a hook is one of those of `leave_out_base`."""
    return getattr(hook, "hook", hook) in (_drop_base, _add_base)


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    if prefix or not has_adapter(module):
        return
    own = _adapter_names(module)
    base = {name for name, _ in module.named_parameters(remove_duplicate=False)} - own
    for name in list(state):
        described = name.endswith("_extra_state") and f"{name.removesuffix('_extra_state')}weight_packed" in base
        if name in base or described:
            del state[name]
    state[BASE_KEY] = encode_state({"format": 1, "base": module.__dict__[RECORD]["base"]})


def _add_base(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    found = state.pop(prefix + BASE_KEY, None)
    if found is None or prefix or not has_adapter(module):
        return  # a whole state
    theirs, mine = decode_state(found)["base"], module.__dict__[RECORD]["base"]
    if theirs != mine:
        raise ValueError(
            f"the checkpoint's adapter was trained on another base: its weights have SHA-256 {theirs[:12]}..., those of this "
            f"{type(module).__name__} {mine[:12]}...: start from the same weights, the same recipe and the same double_quant"
        )
    whole: dict[str, Any] = {}
    nn.Module.state_dict(module, destination=whole, prefix="base_only.")  # a prefix, so that `_drop_base` leaves it whole
    own = _adapter_names(module)
    for name, value in whole.items():
        name = name.removeprefix("base_only.")
        if name not in own and name not in state:
            state[name] = value


# --- PEFT's folder --------------------------------------------------------------------------------------------------


def save_adapter(module: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the adapter as PEFT does, for `PeftModel.from_pretrained(base, directory)`.

    Where the module holds one transformers model, that is the base; else the module itself is. The folder appears whole or
    not at all; one that PEFT or this wrote before is replaced.

    Raises:
        ValueError: the module has no adapter.
        FileExistsError: the folder holds something else.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    root = adapter_root(module)
    target = Path(directory)
    if target.exists() and any(target.iterdir()) and not (target / "adapter_config.json").exists():
        raise FileExistsError(f"{target} holds something else than an adapter: give another folder")
    held = get_peft_model_state_dict(root, adapter_name=ADAPTER)
    held.pop(BASE_KEY, None)
    state = {f"base_model.model.{name}": value.detach().cpu().contiguous().clone() for name, value in held.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config = adapter_config(module)
        before, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(temporary)
        finally:
            config.inference_mode = before
        told = json.loads((temporary / "adapter_config.json").read_text())
        (temporary / "adapter_config.json").write_text(json.dumps(told, indent=2, sort_keys=True))
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
