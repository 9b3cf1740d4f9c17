"""A teacher: a frozen copy of a model, kept small, that is run in the place of another model's modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_quant.calibration import quantizers
from lightning_quant.quantize import _check_copyable, _uncompiled
from lightning_quant.sharding import is_sharded, plain_copy


def _kept_as(module: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """The dtype that each parameter is kept in: what autocast casts anyway may be kept small, but for recurrent layers."""
    for part in module.modules():
        for value in part.parameters(recurse=False):
            small = dtype is not None and value.dim() > 1 and value.is_floating_point() and not isinstance(part, nn.RNNBase)
            yield value, dtype if small and value.element_size() > 2 and dtype is not None else value.dtype


@dataclass
class Teacher:
    """A frozen model in eval mode, that belongs to no other.

    Args:
        module: what `freeze` made.
        dtype: autocast's in its passes; None: as the surroundings have it.
        whole: whether it is called as a whole in the place of whatever module the student calls; else its modules have the
            student's names.
    """

    module: nn.Module
    dtype: torch.dtype | None = None
    whole: bool = False

    @torch.no_grad()
    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the module in the place of the student's of that name."""
        module = self.module if self.whole else self.module.get_submodule(name)
        device = next((value.device for value in self.module.parameters()), torch.device("cpu"))
        if self.dtype is not None:
            with torch.autocast(device.type, self.dtype):
                return module(*args, **kwargs)
        if not torch.is_autocast_enabled(device.type):  # under "bf16-true" inputs are not float32
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
        return module(*args, **kwargs)

    def find(self, name: str) -> str | None:
        """The name in here of a student's module: its own, or of a teacher called as a whole the longest ending of it."""
        modules = dict(self.module.named_modules())
        parts = name.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) if self.whole else 1)]
        return next((end for end in ends if end in modules), None)

    def tensors(self) -> dict[str, Tensor]:
        """What tells it from another: parameters and saved buffers, but for quantizers', which are off."""
        found: dict[str, Tensor] = {}
        of_quantizers = {id(part) for quantizer in quantizers(self.module) for part in quantizer.modules()}
        for name, part in self.module.named_modules():
            if id(part) not in of_quantizers:
                own = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
                own = {key: value for key, value in own.items() if key not in part._non_persistent_buffers_set}
                found.update({f"{name}.{key}" if name else key: value.detach() for key, value in own.items()})
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, in its dtypes.

        Raises:
            ValueError: it is of another model.
        """
        mine = self.tensors()
        strange = [name for name in mine if name not in tensors or tensors[name].shape != mine[name].shape]
        if strange:
            raise ValueError(f"it has no {', '.join(strange[:3])} of this model's shape")
        for name, value in mine.items():
            where, _, key = name.rpartition(".")
            part = self.module.get_submodule(where)
            own = part._parameters[key] if key in part._parameters else part._buffers[key]
            assert own is not None
            own.data = tensors[name].detach().to(value.device, copy=True)


def freeze(module: nn.Module, dtype: torch.dtype | None, student: nn.Module | None = None) -> nn.Module:
    """A copy in eval mode and without gradients, whose quantizers, if it has any of QAT, are off where it is the student's.

    Args:
        dtype: what matrices are kept in; None: as they are.
        student: parameters that it shares are cloned; others share the storage of `module`, where their dtype stays.

    Raises:
        ValueError: it cannot be copied.
    """
    _check_copyable(module)
    own = {value.untyped_storage().data_ptr() for value in student.parameters()} if student is not None else set()
    if is_sharded(module):
        module = plain_copy(module)
    memo: dict[int, Any] = {}
    for value, kept in _kept_as(module, dtype):
        if type(value) is nn.Parameter:
            held = value.detach().to(kept, copy=value.untyped_storage().data_ptr() in own)
            memo[id(value)] = nn.Parameter(held, requires_grad=False)
    made = _uncompiled(copy.deepcopy(module, memo)).eval().requires_grad_(False)
    for part in made.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False
        elif isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # the fused path takes one dtype; it is only taken for activations that it knows
    for quantizer in quantizers(made) if module is student else ():
        quantizer.observing = quantizer.quantizing = quantizer.linked = False
    return made


def as_teacher(module: nn.Module, student: nn.Module, dtype: torch.dtype | None) -> Teacher:
    """A teacher for a student, from the student itself or any other module.

    A LightningModule has the student's names; any other module is called as a whole.
    """
    whole = not isinstance(module, L.LightningModule) and module is not student
    return Teacher(freeze(module, dtype, student), dtype, whole)
