"""Float models on disk, read and packed layer by layer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_quant.fitting import INFO
from lightning_quant.nn.attention import disable_fast_path
from lightning_quant.plan import plan_model
from lightning_quant.qlora import as_dtype, base_recipe, pack_module
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import ModelInfo, replace_modules


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are made in this context have a shape and no memory; buffers are as ever."""

    def move(parent: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return None if value is None or value.is_meta else nn.Parameter(value.to("meta"), value.requires_grad)

    handle = torch_module.register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class _Weights:
    """Tensors of safetensors files by name, read one at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = Path(path)
        if source.is_file():
            files = [source]
        else:
            files = sorted(source.glob("*.safetensors"))
            index = source / "model.safetensors.index.json"
            if index.is_file():
                named = json.loads(index.read_text())["weight_map"].values()
                files = [source / name for name in dict.fromkeys(named)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"{', '.join(missing[:3])} does not exist" if missing else f"{source} holds no .safetensors file and is none"
            )
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def shape(self, name: str) -> list[int]:
        with safe_open(self.files[name], "pt") as opened:
            return list(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as opened:  # a file that is closed takes its pages along
            return opened.get_tensor(name).clone()


def load_pretrained(
    path: str | os.PathLike[str],
    recipe: str | Mapping[str, Any] | Recipe = "nf4",
    *,
    build: Callable[[], nn.Module] | nn.Module | None = None,
    ignore: str | list[str] | tuple[str, ...] = ("lm_head",),
    double_quant: bool = False,
    dtype: str | None = None,
    backend: str = "",
) -> nn.Module:
    """Read a float model from safetensors and pack each layer as soon as its weights are there.

    At no time is there more than the packed model and one layer in float.

    Args:
        path: a `.safetensors` file, or a folder of them: as `save_pretrained` writes it, sharded or not.
        recipe: what `QuantPrecision` takes as `mode`.
        build: makes the float model, or is one whose parameters are on the meta device; by default the causal language model that
            the folder's `config.json` describes.
        ignore: patterns of modules that stay in float.
        double_quant: keep the scales of nf4 and fp4 in 8 bits.
        dtype: of what stays in float, such as `"bfloat16"`; by default as in the file.
        backend: as in `pack_in_place`.

    Returns:
        the packed model, in eval mode.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: no floating dtype, or the file's tensors are not the model's; the message names the first that differ.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> net = nn.Sequential(nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), f"{folder}/net.safetensors")
        ...     packed = load_pretrained(f"{folder}/net.safetensors", "int8", build=lambda: nn.Sequential(nn.Linear(64, 8)))
        >>> type(packed[0]).__name__
        'PackedLinear'
    """
    known = base_recipe(recipe, (ignore,) if isinstance(ignore, str) else tuple(ignore), double_quant)
    float_dtype = None if dtype is None else as_dtype(dtype)
    weights = _Weights(path)
    model = _skeleton(Path(path), build)
    real = [name for name, value in model.named_parameters() if not value.is_meta]
    if real:
        raise ValueError(
            f"build returned a model with weights ({', '.join(real[:3])}): make it on the meta device, or give a function"
        )
    owners = _owners(model)
    keys = _match_keys(model, weights)
    plan = plan_model(model, known, training=True)
    notes = {match.name: match.note for match in plan.matches if match.note}
    filled: set[int] = set()
    float_bytes = 0

    def fill(module: nn.Module) -> None:
        nonlocal float_bytes
        for value in list(module.parameters()):
            if id(value) in filled or not value.is_meta:
                continue
            read = weights.read(keys[id(value)])
            if float_dtype is not None and read.is_floating_point():
                read = read.to(float_dtype)
            float_bytes += read.numel() * read.element_size()
            new = nn.Parameter(read, value.requires_grad and read.is_floating_point())
            filled.add(id(new))
            for owner, name in owners.pop(id(value)):
                owner._parameters[name] = new

    built: dict[int, nn.Module] = {}
    for match in reversed(plan.matches):  # what attention holds comes before it; nothing else may hold on to a float layer
        fill(match.module)
        packed = pack_module(match, known, backend, built)
        built[id(packed)] = packed
        replace_modules(model, {id(match.module): packed})
        match.module = packed
    fill(model)
    _fill_buffers(model, weights)
    disable_fast_path(model)
    model.__dict__[INFO] = ModelInfo(known, "ste", plan.skipped, {}, notes, float_bytes)
    return model.eval()


def _skeleton(path: Path, build: Callable[[], nn.Module] | nn.Module | None) -> nn.Module:
    if isinstance(build, nn.Module):
        return build
    with parameters_on_meta():
        if build is not None:
            return build()
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json that tells which model it is: give build=, a function that makes it")
        from transformers import AutoConfig, AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        return model


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter is registered; a tied one in several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append((module, name))
    return found


def _match_keys(model: nn.Module, weights: _Weights) -> dict[int, str]:
    """Parameter -> the file's name of it. A model and its file may differ by the base model's prefix."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[int, str] = {}
    problems = []
    shapes = {id(value): list(value.shape) for value in model.parameters()}
    for key, known in names.items():
        tried = [*known, *(prefix + name for name in known), *(name.removeprefix(prefix) for name in known)]
        stored = next((name for name in tried if name in weights.files), None)
        if stored is None:
            problems.append(f"the file has no {known[0]!r}")
        elif weights.shape(stored) != shapes[key]:
            problems.append(f"{known[0]!r} is {tuple(shapes[key])}, in the file {tuple(weights.shape(stored))}")
        else:
            found[key] = stored
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights are not those of this {type(model).__name__}: {'; '.join(problems[:3])}{more}")
    return found


def _fill_buffers(model: nn.Module, weights: _Weights) -> None:
    for name, value in model.named_buffers():
        if name in weights.files:
            if value.is_meta:
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner)._buffers[last] = weights.read(name)
            else:
                value.copy_(weights.read(name))
        elif value.is_meta:
            raise ValueError(f"the buffer {name!r} is on the meta device and not in the file: make only parameters there")
