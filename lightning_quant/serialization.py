"""Packed models on disk: safetensors beside a JSON description, and modules rebuilt from what a state_dict says of itself."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.export.compressed_tensors import (
    from_compressed,
    is_pretrained,
    quantization_config,
    reason_against,
    to_compressed,
)
from lightning_quant.fitting import INFO
from lightning_quant.nn import PackedModule, Unsupported, find_entry
from lightning_quant.nn.attention import PackedMultiheadAttention, disable_fast_path
from lightning_quant.nn.base import EXTRA_STATE, FORMAT, described_modules
from lightning_quant.nn.experts import UnfusedExperts, holds_experts
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme
from lightning_quant.surgery import ModelInfo, get_info, is_packed

CONFIG, INDEX = "quantization.json", "model.safetensors.index.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _split_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors once each, and which names share them."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}: only tensors can be saved; encode it in get_extra_state")
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()) if tensor.numel() else name
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            kept[name] = tensor.detach().contiguous() if whole else tensor.detach().clone().contiguous()  # views may overlap
    return kept, aliases


def save_quantized(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a packed model: `model-<hash>.safetensors` and `quantization.json` (recipe, versions, checksum).

    Of a transformers model also what `from_pretrained` reads (`config.json` with compressed-tensors' `quantization_config`, and an
    index), for integers and float8 without static activations; where that cannot be, a warning tells why.

    The description is replaced last and at once, so that a reader finds the old model or the new one. Under
    `torch.distributed` rank 0 writes and the others wait.

    Args:
        directory: made if need be; other files in it are left alone.

    Returns:
        the directory.

    Raises:
        ValueError: the model is not packed.

    Example:
        >>> import tempfile, lightning_quant as lq
        >>> net = nn.Sequential(nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lq.save_quantized(lq.quantize(net, "w8a16"), folder)
        ...     again = lq.load_quantized(nn.Sequential(nn.Linear(64, 8)), folder)
        >>> type(again[0]).__name__
        'PackedLinear'
    """
    if not is_packed(model):
        raise ValueError("only a packed model can be saved: quantize it first (lq.quantize or trainer.quantize)")
    target = Path(directory)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        _write(model, target)
    if distributed:
        torch.distributed.barrier()
    return target


def _write(model: nn.Module, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _split_aliases(model.state_dict())
    info = get_info(model)
    described: dict[str, Any] | None = None
    extra: dict[str, Any] = {}
    apart: dict[str, Tensor] = {}
    if is_pretrained(model):
        reason = reason_against(model)
        if reason is None:
            tensors, apart, described = to_compressed(model, tensors)
        else:
            warnings.warn(
                f"only lq.load_quantized can read {target}, and not transformers: compressed-tensors cannot hold it, as {reason}",
                stacklevel=3,
            )
    mark = uuid.uuid4().hex[:8]
    temporary, config_temporary = target / f".model-{mark}.tmp", target / f".{CONFIG}-{mark}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        checksum = _sha256(temporary)
        name, beside = f"model-{checksum[:12]}.safetensors", f"zero-points-{checksum[:12]}.safetensors"
        config = {
            "format": FORMAT,
            "versions": {"lightning_quant": _version("lightning-quant"), "torch": torch.__version__},
            "weights": name,
            "sha256": checksum,
            "aliases": aliases,
            "recipe": info.recipe.to_dict() if info else None,
            "method": info.method if info else "ste",
            "method_options": info.method_options if info else {},
            "skipped": info.skipped if info else {},
            "folded": info.folded if info else {},
            "notes": info.notes if info else {},
            "float_bytes": info.float_bytes if info else None,
            "described": described,
            "zero_points": beside if apart else None,
        }
        if described is not None:
            extra = _for_transformers(model, tensors, name)
        config_temporary.write_text(json.dumps(config, indent=2))
        os.replace(temporary, target / name)
        if apart:
            save_file(apart, temporary)
            os.replace(temporary, target / beside)
        for file, content in extra.items():
            part = target / f".{file}-{mark}.tmp"
            part.write_text(json.dumps(content, indent=2))
            os.replace(part, target / file)
        if described is None:
            _drop_stale(target)
        os.replace(config_temporary, target / CONFIG)
    finally:
        temporary.unlink(missing_ok=True)
        config_temporary.unlink(missing_ok=True)
    for pattern in ("model-????????????.safetensors", "zero-points-????????????.safetensors"):
        for stale in target.glob(pattern):
            if stale.name not in (name, beside if apart else name):
                stale.unlink()


def _drop_stale(target: Path) -> None:
    """Remove what an earlier save wrote for transformers, whose weights are gone."""
    path = target / "config.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text()).get("quantization_config", {}).get("quant_method") == "compressed-tensors":
            path.unlink()
            (target / INDEX).unlink(missing_ok=True)


def _for_transformers(model: Any, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The files by which `from_pretrained` finds a packed model's weights and how they are quantized."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": quantization_config(model)}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    files = {"config.json": config, INDEX: {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, name)}}
    generation = getattr(model, "generation_config", None)
    return files if generation is None else {**files, "generation_config.json": generation.to_dict()}


def _read_config(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {source} holds no model written by lq.save_quantized")
    try:
        config = json.loads(path.read_text())
        found = int(config["format"])
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or save the model again") from None
    if found > FORMAT:
        wrote = config.get("versions", {}).get("lightning_quant", "?")
        raise ValueError(
            f"{path} has format {found}, written by lightning_quant {wrote}; this version reads up to {FORMAT}: upgrade it"
        )
    missing = [key for key in ("weights", "sha256", "aliases", "recipe") if key not in config]
    if missing:
        raise ValueError(f"{path} is damaged ({', '.join(missing)} missing): copy or save the model again")
    return config


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _read_config(source)
    weights = source / config["weights"]
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist, but {CONFIG} names it: copy the model again")
    found = _sha256(weights)
    if found != config["sha256"]:
        raise ValueError(
            f"{weights} is damaged: its SHA-256 is {found[:12]}..., {CONFIG} says {config['sha256'][:12]}... "
            f"(a changed byte, or a file cut short): copy the model again"
        )
    state = load_file(weights)
    if not config.get("described"):
        return config, state
    apart = load_file(source / config["zero_points"]) if config.get("zero_points") else {}
    return config, from_compressed(state, apart, config["described"])


def load_quantized(module: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Read a packed model.

    Args:
        module: the float model it was made from, with any weights; it is not changed. Built under `torch.device("meta")` it
            takes no memory, and no float weight of a quantized module is ever allocated. A model that computes buffers it does
            not save (rotary embeddings) has to be built on the CPU: such a buffer is in no file.
        directory: what `save_quantized` wrote.

    Returns:
        a new packed model in eval mode, on the device of `module` (the CPU, if that is meta).

    Raises:
        FileNotFoundError: no model there.
        ValueError: a damaged file, a newer format, or a `module` that does not fit; the message names the first differences.
    """
    source = Path(directory)
    config, state = _read(source)
    for alias, kept in config["aliases"].items():
        state[alias] = state[kept]
    model = build_packed(module, state, str(source))
    for alias, kept in config["aliases"].items():
        _tie(model, alias, kept)
    recipe = Recipe.from_dict(config["recipe"]) if config["recipe"] else Recipe()
    told = {key: config.get(key, {}) for key in ("method_options", "skipped", "folded", "notes")}
    model.__dict__[INFO] = ModelInfo(recipe, config.get("method", "ste"), **told, float_bytes=config.get("float_bytes"))
    first = next(module.parameters(), None)
    if first is not None and first.device.type not in ("meta", "cpu"):
        model.to(first.device)
    return model


def _tie(model: nn.Module, alias: str, kept: str) -> None:
    owner, _, name = kept.rpartition(".")
    value = model.get_submodule(owner)._parameters.get(name)
    owner, _, name = alias.rpartition(".")
    if value is not None:
        model.get_submodule(owner)._parameters[name] = value


def _not_the_model(source: str, module: nn.Module, problems: list[str]) -> ValueError:
    told = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return ValueError(f"{source} was not made from this {type(module).__name__}: {told}")


def build_packed(module: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    """A packed copy of a float `module` that holds the tensors of `state`. Raises ValueError if they do not fit."""
    described = described_modules(state, "packed")
    if not described:
        raise ValueError(f"{source} holds no packed modules")
    unfused = _unfused(module, described)
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, experts in unfused.items():
        modules.update({f"{name}.{path}": part for path, part in experts.named_modules(remove_duplicate=False) if path})
    built: dict[str, PackedModule] = {}
    by_id: dict[int, PackedModule] = {}  # a module may have several names
    problems: list[str] = []
    # a name without a float module belongs to a part of another packed module (q_proj of attention)
    for name, told in described.items():
        parent = name.rpartition(".")[0]
        if name not in modules:
            if not isinstance(modules.get(parent), nn.MultiheadAttention):
                problems.append(f"it has no module {name!r}")
            continue
        if id(modules[name]) in by_id:
            built[name] = by_id[id(modules[name])]
            continue
        try:
            packed = find_entry(modules[name]).packed.empty(modules[name], QuantScheme.from_dict(told["scheme"]), "meta")
        except (Unsupported, ValueError, AttributeError, TypeError) as error:
            problems.append(f"{name!r} is a {type(modules[name]).__name__}: {error}")
            continue
        prefix = f"{name}." if name else ""
        if f"{prefix}bias" in state and getattr(packed, "bias", 0) is None:  # came from a folded BatchNorm
            packed.register_parameter("bias", nn.Parameter(torch.empty_like(state[f"{prefix}bias"], device="meta")))
        if f"{prefix}pre_scale" in state:
            packed.add("pre_scale", torch.empty_like(state[f"{prefix}pre_scale"], device="meta"))
        packed._float_dtype = getattr(torch, told["dtype"])
        built[name] = by_id[id(modules[name])] = packed
    if problems:
        raise _not_the_model(source, module, problems)
    memo = _memo(module, modules, built, state)
    for name, experts in unfused.items():
        memo[id(modules[name])] = copy.deepcopy(experts, memo)
    model: nn.Module = copy.deepcopy(module, memo)
    for name, packed in built.items():
        if isinstance(packed, PackedMultiheadAttention):
            packed.out_proj = built.get(f"{name}.out_proj") or copy.deepcopy(modules[f"{name}.out_proj"], memo)  # type: ignore[assignment]
    _fill(model, state, source, module)
    disable_fast_path(model)
    return model.eval()


def _unfused(module: nn.Module, described: Iterable[str]) -> dict[str, UnfusedExperts]:
    """Fused experts whose layers are described one by one, taken apart; under each of their names."""
    inside = {name[:end] for name in described for end, letter in enumerate(name) if letter == "."}
    found: dict[str, UnfusedExperts] = {}
    by_id: dict[int, UnfusedExperts] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if name in inside and holds_experts(part):
            if id(part) not in by_id:
                with contextlib.suppress(Unsupported):  # then the names are missing, and told
                    by_id[id(part)] = UnfusedExperts(part)
            if id(part) in by_id:
                found[name] = by_id[id(part)]
    return found


def _memo(
    module: nn.Module, modules: dict[str, nn.Module], built: dict[str, PackedModule], state: dict[str, Tensor]
) -> dict[int, Any]:
    """What deepcopy shall put in place of what: packed modules, folded BatchNorms, and meta tensors for what the file holds."""
    memo: dict[int, Any] = {id(modules[name]): packed for name, packed in built.items()}
    for name, part in modules.items():
        prefix = f"{name}." if name else ""
        if isinstance(part, _BatchNorm) and not any(key.startswith(prefix) for key in state):
            memo[id(part)] = nn.Identity()
    for owner, part in modules.items():
        for key, parameter in part._parameters.items():
            if parameter is not None and (f"{owner}.{key}" if owner else key) in state:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return memo


def _fill(model: nn.Module, state: dict[str, Tensor], source: str, module: nn.Module) -> None:
    own = model.state_dict()
    problems = [f"it has no {name!r}" for name in state if name not in own]
    problems += [f"the file has no {name!r}" for name in own if name not in state]
    for name, value in own.items():
        if name in state and not name.endswith(EXTRA_STATE) and value.shape != state[name].shape:
            problems.append(f"{name!r} is {tuple(value.shape)}, in the file {tuple(state[name].shape)}")
    if problems:
        raise _not_the_model(source, module, problems)
    model.load_state_dict(state, assign=True)
    for name, part in model.named_modules():
        for weight in part.weight_axes(part) if isinstance(part, PackedModule) else ():
            shape = getattr(part, f"{weight}_shape").tolist()
            if shape != list(part.packed_shape(weight)):
                problems.append(f"{name}.{weight} is {part.packed_shape(weight)}, in the file {shape}")
    left = [name for name, value in _tensors(model) if value.is_meta]
    if left:
        problems.append(f"{', '.join(left[:3])}: on the meta device and not in the file; build the model on the CPU")
    if problems:
        raise _not_the_model(source, module, problems)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
