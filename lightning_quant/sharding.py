"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: read, write and copy what each rank holds a part of.

All ranks must call what gathers (`whole`, `whole_parameters`, `plain_copy`), in the same order.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

M = TypeVar("M", bound=nn.Module)

# where the hooks come from that shard and gather a module's parameters
_SHARDING = ("torch.distributed.fsdp", "torch.distributed.tensor")
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
# torch.distributed._composable keeps what was applied to a module under such names
_APPLIED = "__composable_api_state_key"


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model went through `fully_shard`, or a parameter is a DTensor."""
    return any(isinstance(part, FSDPModule) for part in model.modules()) or any(isinstance(p, DTensor) for p in model.parameters())


def is_managed(part: nn.Module) -> bool:
    """Whether FSDP2 replaces this module's own parameters in every forward pass: what is written to them there is lost."""
    return getattr(part, "_is_fsdp_managed_module", False)


def reshard(model: nn.Module) -> None:
    """Bring back the sharded parameters, where a forward pass has left gathered copies: only they keep what is written."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded; no gradient then."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into one that may be sharded."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        value = DTensor.from_local(value.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = value.redistribute(mesh, target.placements)  # nothing is sent: each rank takes its part
    target.copy_(value)


@contextlib.contextmanager
def whole_parameters(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, these modules' own parameters are gathered copies, for reading."""
    own = [(part, name, value) for part in modules for name, value in part.named_parameters(recurse=False)]
    own = [(part, name, value) for part, name, value in own if isinstance(value, DTensor)]
    try:
        for module, name, value in own:
            module._parameters[name] = nn.Parameter(whole(value), value.requires_grad)
        yield
    finally:
        for module, name, value in own:
            module._parameters[name] = value


def _plain_attributes(part: nn.Module) -> dict[str, Any]:
    """A module's attributes without what sharding has added."""
    attributes = {key: value for key, value in part.__dict__.items() if key not in _MARKS}
    removed: set[int] = set()
    for key in [key for key in attributes if key.endswith("_hooks")]:
        hooks = attributes[key]
        foreign = [handle for handle, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_SHARDING)]
        removed.update(foreign)
        if foreign:
            attributes[key] = type(hooks)((handle, hook) for handle, hook in hooks.items() if handle not in foreign)
    for key in [key for key in attributes if "_hooks_" in key]:  # which hooks take keywords, or always run
        kept = [(handle, value) for handle, value in attributes[key].items() if handle not in removed]
        attributes[key] = type(attributes[key])(kept)
    for key in [key for key in attributes if key.startswith(_APPLIED)]:
        attributes[key] = {
            what: state for what, state in attributes[key].items() if getattr(what, "__name__", what) != "fully_shard"
        }
        if not attributes[key]:
            del attributes[key]
    return attributes


def _plain_class(part: nn.Module) -> type:
    order = type(part).__mro__
    return order[order.index(FSDPModule) + 1] if isinstance(part, FSDPModule) else order[0]


@contextlib.contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Take from modules, while it lasts, what sharding has made of them; their parameters stay sharded."""
    before = [(part, type(part), dict(part.__dict__)) for part in model.modules()]
    try:
        for part, _, _ in before:
            attributes = _plain_attributes(part)
            part.__class__ = _plain_class(part)
            part.__dict__.clear()
            part.__dict__.update(attributes)
        yield
    finally:
        for part, cls, attributes in before:
            part.__class__ = cls
            part.__dict__.clear()
            part.__dict__.update(attributes)


def plain_copy(model: M) -> M:
    """A deep copy that is not sharded: whole parameters, the classes from before `fully_shard`, and none of its hooks.

    Args:
        model: any module, sharded as a whole, in parts, or not at all. All ranks must call this together; it stays as it is.

    Returns:
        the copy, with the same parameters on all ranks. Buffers are each rank's own.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> torch.equal(plain_copy(net)[0].weight, net[0].weight)
        True
    """
    reshard(model)
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        if isinstance(value, DTensor):
            gathered = whole(value)
            if gathered.data_ptr() == value.to_local().data_ptr():  # one rank holds all of it
                gathered = gathered.clone()
            memo[id(value)] = nn.Parameter(gathered, value.requires_grad) if isinstance(value, nn.Parameter) else gathered
    meshes = [part.__dict__["_device_mesh"] for part in model.modules() if part.__dict__.get("_device_mesh") is not None]
    memo.update({id(mesh): mesh for mesh in meshes})
    with _unmarked(model):
        copied = copy.deepcopy(model, memo)
    for part in copied.modules():
        if "_device_mesh" in part.__dict__:
            part.__dict__["_device_mesh"] = None  # LightningModule's: the mesh it was sharded over
    return copied
