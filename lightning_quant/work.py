"""A folder in which a long quantization keeps what is done, so that a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_quant.activations import checksum
from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule, PackedModule
from lightning_quant.nn.base import described_modules
from lightning_quant.nn.experts import make_unreached_dynamic
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme

# entries of a unit's file: kind, index into the names of its metadata, and the key in that module's state_dict
_SEPARATOR = "|"


def _checksum(named: Mapping[str, Tensor], start: int = 0) -> int:
    """Of names, shapes, dtypes and values."""
    for name in sorted(named):
        start = checksum(named[name], zlib.crc32(name.encode(), start))
    return start


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers without those of quantizers, which the recipe decides on."""
    ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FakeQuantize))
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value for name, value in named if not name.startswith(ours)}


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a folder
        return metadata.version("lightning-quant")
    return ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _lock(folder: Path) -> Any:
    """A lock against other processes that lasts as long as what is returned, or the process; another one's raises."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, this one does not keep out its own process
    except OSError:
        file.close()
        raise ValueError(f"work_dir {str(folder)!r}: another run is at work there: wait for it, or give another folder") from None
    return file


class Work:
    """What units of a model came out as, one file each; written under a temporary name, then renamed. Of ranks the first writes.

    Args:
        folder: made if it does not exist; None: nothing is kept.
        model: prepared, as it was before any unit was quantized.
        recipe: of the run.
        data: number of calibration batches and their checksum.

    Raises:
        ValueError: the folder is that of another run, and the message says what differs; or another run is at work there.
    """

    def __init__(self, folder: Path | None, model: nn.Module, recipe: Recipe, data: tuple[int, int] = (0, 0)) -> None:
        self.folder, self.numbers = folder, {}  # type: Path | None, dict[str, int]
        self.writes, self.device = not has_ranks() or dist.get_rank() == 0, next(model.parameters()).device
        self._read: dict[str, tuple[dict[str, str], dict[str, Tensor]] | None] = {}
        self._held: Any = None
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"work_dir {str(folder)!r} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._held = _lock(folder) if self.writes else None
        head = {
            "recipe": recipe.to_dict(),
            "model": _checksum(_float_tensors(model)),
            "dtypes": sorted({str(value.dtype) for value in model.parameters()}),
            "calibration batches": data[0],
            "calibration data": data[1],
            "torch": torch.__version__,
            "lightning_quant": _version(),
            "ranks": dist.get_world_size() if has_ranks() else 1,
        }
        self._claim(folder / "run.json", json.loads(json.dumps(head)))
        if has_ranks():
            dist.barrier()  # nobody makes files before the first rank has cleaned up

    def __del__(self) -> None:
        if getattr(self, "_held", None) is not None:
            self._held.close()

    def _claim(self, path: Path, head: dict[str, Any]) -> None:
        """See that the folder is this run's, and clean up what a killed one left half done."""
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                found = {}
            differing = [key for key, value in head.items() if found.get(key) != value]
            if differing:
                raise ValueError(
                    f"work_dir {str(path.parent)!r} holds the work of another run (it differs in: {', '.join(differing)}): give "
                    f"another folder, or delete this one"
                )
        elif any(path.parent.glob("*.safetensors")):
            raise ValueError(f"work_dir {str(path.parent)!r} holds other files: give a new or an empty folder")
        if self.writes:
            for left in path.parent.glob("*.tmp"):
                left.unlink()
            for left in path.parent.glob("activations-*"):
                shutil.rmtree(left, ignore_errors=True)
            if not path.exists():
                _write(path, json.dumps(head))

    def _path(self, name: str) -> Path:
        """A unit's file: its number in the order in which units come, and its name, which may be any text."""
        assert self.folder is not None
        number = self.numbers.setdefault(name, len(self.numbers))
        return self.folder / f"{number:04d}-{quote(name, safe='')[:80]}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a unit was finished before. What is not as it was written is not trusted, and a warning names it."""
        if self.folder is None:
            return False
        path = self._path(name)
        if name not in self._read:
            self._read[name] = _read(path) if path.exists() else None
            mine = torch.tensor(float(self._read[name] is not None), device=self.device)
            if has_ranks():
                all_reduce(mine, "min")
            if not mine:
                self._read[name] = None
        return self._read[name] is not None

    def save(
        self,
        unit: Unit,
        packed: dict[str, tuple[FakeModule, PackedModule]],
        model: nn.Module,
        before: dict[str, Tensor],
    ) -> None:
        """Keep a unit's result.

        Args:
            before: the float parameters as they were: what has another storage now was changed.
        """
        if self.folder is None or not self.writes:
            return
        names: list[str] = []
        tensors: dict[str, Tensor] = {}

        def add(kind: str, name: str, state: dict[str, Tensor]) -> None:
            tensors.update({_SEPARATOR.join((kind, str(len(names)), key)): value for key, value in state.items()})
            names.append(name)

        for name, (_, module) in packed.items():
            add("packed", name, module.state_dict())
        for name, fake in unit.modules.items():
            if name not in packed:
                add("fake", name, fake.state_dict())
        for name, value in model.named_parameters():
            if name in before and before[name].data_ptr() != value.data_ptr() and name.rpartition(".")[0] not in unit.modules:
                add("float", name, {"": value})
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        told = {"notes": json.dumps(unit.notes), "names": json.dumps(names)}
        told["checksum"] = str(_checksum(plain, zlib.crc32(f"{told['notes']}{told['names']}".encode())))
        path = self._path(unit.name)
        temporary = path.with_suffix(".tmp")
        save_file(plain, temporary, metadata=told)
        os.replace(temporary, path)

    def load(self, unit: Unit, ready: dict[str, FakeModule], model: nn.Module) -> dict[str, tuple[FakeModule, PackedModule]]:
        """Bring a unit into the state that `save` found it in, and return its packed modules."""
        found = self._read.pop(unit.name)
        assert found is not None
        told, tensors = found
        unit.notes.update(json.loads(told["notes"]))
        names, parts = json.loads(told["names"]), {}  # type: list[str], dict[tuple[str, str], dict[str, Tensor]]
        for entry, value in tensors.items():
            kind, number, key = entry.split(_SEPARATOR, 2)
            parts.setdefault((kind, names[int(number)]), {})[key] = value
        packed = {}
        for (kind, name), state in parts.items():
            if kind == "float":
                parameter = model.get_parameter(name)
                parameter.data = state[""].to(parameter.device, copy=True)  # not a view of the file, wherever that is aligned
            elif kind == "fake":
                _restore(unit.modules[name], state)
            else:
                packed[name] = (ready[name], _build(name, ready[name], state))
        return packed


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """A unit's file; None with a warning if it is damaged."""
    with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError):
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not iterable)
        if int(told["checksum"]) == _checksum(tensors, zlib.crc32(f"{told['notes']}{told['names']}".encode())):
            return told, tensors
    warnings.warn(f"{path} is damaged: what it holds is done anew", stacklevel=2)
    return None


def _give(module: nn.Module, state: dict[str, Tensor], key: str) -> None:
    """A parameter that the module has got since: a bias of bias correction, a scale of the input."""
    path, _, last = key.rpartition(".")
    owner = module.get_submodule(path)
    if last in ("pre_scale", "bias") and owner._parameters.get(last) is None:
        owner.register_parameter(last, nn.Parameter(torch.empty_like(state[key]), last == "bias"))


def _restore(module: FakeModule, state: dict[str, Tensor]) -> None:
    """Give a fake module a saved state. Its tensors get storage of their own: another model may share the old."""
    for key in state:
        _give(module, state, key)  # attention holds another fake module
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    module.load_state_dict(state)


def _build(name: str, module: FakeModule, state: dict[str, Tensor]) -> PackedModule:
    """The packed module that was saved, and the fake one as it was then."""
    if QuantScheme.from_dict(described_modules(state, "packed")[""]["scheme"]) != module.scheme:
        make_unreached_dynamic({name: module})  # an expert: the earlier run did it, and kept the note
    for key in state:
        _give(module, state, key)
    packed = module.packed_type.empty(module, module.scheme)
    packed.load_state_dict(state)
    for key in packed.optional_float:  # transforms divide biases, too
        value, own = getattr(packed, key), module._parameters.get(key)
        if value is not None and own is not None:
            own.data = value.detach().to(own.dtype).clone()
    return packed
