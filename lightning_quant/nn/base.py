"""What every quantized module shares: a scheme, and a description of itself in its state_dict (`_extra_state`).

A fake module is its float module with another class and quantizers added (`nn.fake`); a packed module is built anew beside it
(`nn.packed`). The description is JSON as bytes, which every checkpoint format can hold.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.spec import QuantScheme

FORMAT = 1
EXTRA_STATE = "_extra_state"


class Unsupported(Exception):
    """A module cannot be quantized; the text is the reason, for `lq.summary`."""


@dataclass(frozen=True)
class Setup:
    """What a fake module is told when it is prepared: its scheme and, resolved from the recipe, how to find its ranges."""

    scheme: QuantScheme
    name: str = ""
    method: str = "ste"
    method_options: dict[str, float] = field(default_factory=dict)
    observer: str = "minmax"
    observer_options: dict[str, Any] = field(default_factory=dict)
    weight_observer: str = "minmax"
    weight_observer_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All but the scheme, which a module describes by itself."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scheme"}


def encode_state(state: dict[str, Any]) -> Tensor:
    """A dict of primitives as a uint8 tensor of JSON."""
    return torch.frombuffer(bytearray(json.dumps(state, sort_keys=True).encode()), dtype=torch.uint8)


def decode_state(state: Tensor) -> dict[str, Any]:
    if state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError("not written by encode_state")
    return json.loads(bytes(state.cpu().tolist()).decode())


def described_modules(state: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Module name -> what it says of itself, for the `"fake"` or `"packed"` modules in a state_dict."""
    found = {}
    for key, value in state.items():
        if key == EXTRA_STATE or key.endswith("." + EXTRA_STATE):
            with contextlib.suppress(ValueError, UnicodeDecodeError, AttributeError):  # someone else's extra state
                told = decode_state(value)
                if isinstance(told, dict) and told.get("kind") == kind and "scheme" in told:
                    found[key.removesuffix(EXTRA_STATE).removesuffix(".")] = told
    return found


def without_input(scheme: QuantScheme) -> tuple[QuantScheme, str]:
    """The scheme for modules whose input are indices."""
    return replace(scheme, input=None), "input: indices, not quantized" if scheme.input else ""


class QuantizedModule(nn.Module):
    """A module with a scheme. `weight_axes` maps each quantized parameter to its channel dimension."""

    scheme: QuantScheme
    kind: ClassVar[str]
    # the first dimension of a token's own features, as in `to_groups`
    input_axis: ClassVar[int] = -1

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {"weight": 0}

    @classmethod
    def adapt(cls, module: nn.Module, scheme: QuantScheme) -> tuple[QuantScheme, str]:
        """The scheme as this module can follow it, and a note of what differs. Raises `Unsupported` with the reason."""
        return scheme, ""

    def _describe(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "scheme": self.scheme.to_dict()}

    def get_extra_state(self) -> Tensor:
        return encode_state(self._describe())

    def set_extra_state(self, state: Tensor) -> None:
        if not isinstance(state, Tensor):
            return  # a placeholder, by which torch.distributed.checkpoint loads a part of a state_dict
        found = decode_state(state)
        if found["format"] > FORMAT:
            raise ValueError(f"saved by a newer lightning_quant (format {found['format']}, this one reads {FORMAT}): upgrade it")
        if found["kind"] != self.kind or QuantScheme.from_dict(found["scheme"]) != self.scheme:
            theirs = QuantScheme.from_dict(found["scheme"]).label
            raise ValueError(
                f"the checkpoint holds a {found['kind']} module ({theirs}), this one{self._where()} is {self.kind} "
                f"({self.scheme.label}): use the recipe that the checkpoint was made with, or lq.load_from_checkpoint"
            )
        self._restore(found)

    def _restore(self, found: dict[str, Any]) -> None:
        """Take over what `_describe` added."""

    def _where(self) -> str:
        """The module's name for messages, where it is known."""
        return ""
