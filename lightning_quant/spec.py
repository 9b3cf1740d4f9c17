"""How one tensor is quantized (`QuantSpec`), how one module is (`QuantScheme`), and the presets, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

Dtype = Literal["int", "float8_e4m3fn", "float8_e5m2", "fp4", "nf4"]
Granularity = Literal["tensor", "channel", "group", "token"]

_FLOAT_BITS: dict[str, int] = {"float8_e4m3fn": 8, "float8_e5m2": 8, "fp4": 4, "nf4": 4}


def _check_fields(cls: type, data: Mapping[str, Any]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is made from a mapping of its fields, not from {data!r}")
    valid = [f.name for f in fields(cls)]
    unknown = [key for key in data if key not in valid]
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized: no algorithm, no kernel, only primitives.

    Args:
        bits: width of a code, 2 to 8 (8 for float8, 4 for fp4 and nf4).
        dtype: `"int"`; `"float8_e4m3fn"`, `"float8_e5m2"` (Micikevicius et al. 2022, arXiv:2209.05433, section 3);
            `"nf4"` (Dettmers et al. 2023, arXiv:2305.14314, section 3) or `"fp4"` as bitsandbytes has it.
        signed: codes in [-2^(bits-1), 2^(bits-1) - 1], else in [0, 2^bits - 1].
        symmetric: the zero point is 0, else the range [min, max] is covered.
        granularity: which elements share a scale: the whole `"tensor"`; an output `"channel"`; a `"group"` of `group_size`
            neighbours within a channel (the last one may be shorter; for nf4 and fp4 within the flattened tensor);
            a `"token"`, that is one feature vector (one sample for convolutions), always dynamic.
        group_size: elements in a group.
        dynamic: the range is measured on every forward pass instead of calibrated.
        double_quant: scales are stored in 8 bits, too (arXiv:2305.14314, section 3); nf4 and fp4 in groups only.

    Raises:
        ValueError: a value, or a combination, that does not exist; the message says which do.

    Example:
        >>> QuantSpec(bits=4, granularity="group", group_size=128)  # doctest: +ELLIPSIS
        QuantSpec(bits=4, dtype='int', signed=True, symmetric=True, granularity='group', group_size=128, ...)
    """

    bits: int = 8
    dtype: Dtype = "int"
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    dynamic: bool = False
    double_quant: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", get_args(Dtype)), ("granularity", get_args(Granularity))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"QuantSpec {name}={getattr(self, name)!r}: valid are {', '.join(allowed)}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise ValueError(f"QuantSpec bits={self.bits!r}: must be an int")
        if self.dtype == "int" and not 2 <= self.bits <= 8:
            raise ValueError(f"QuantSpec bits={self.bits}: integers have 2 to 8 bits")
        if self.dtype != "int":
            if self.bits != _FLOAT_BITS[self.dtype]:
                raise ValueError(f"QuantSpec dtype={self.dtype!r} has bits={_FLOAT_BITS[self.dtype]}, not {self.bits}")
            if not (self.signed and self.symmetric):
                raise ValueError(f"QuantSpec dtype={self.dtype!r} is signed and symmetric")
        if self.granularity == "group":
            if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
                raise ValueError(f"QuantSpec group_size={self.group_size!r}: granularity='group' needs a positive int")
        elif self.group_size is not None:
            raise ValueError(f"QuantSpec group_size={self.group_size}: only with granularity='group'")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("QuantSpec granularity='token' needs dynamic=True: the number of tokens is not fixed")
        if self.double_quant and not self.flat_groups:
            raise ValueError(f"QuantSpec double_quant=True: for nf4 and fp4 in groups, not for {self.label}")

    @property
    def is_int(self) -> bool:
        return self.dtype == "int"

    @property
    def flat_groups(self) -> bool:
        """Groups run over the flattened tensor (bitsandbytes' blocks), not within a channel."""
        return self.granularity == "group" and self.dtype in ("nf4", "fp4")

    @property
    def label(self) -> str:
        """A short name for tables, such as `int4 group64 asym`."""
        kind = f"{'int' if self.signed else 'uint'}{self.bits}" if self.is_int else self.dtype
        where = f"group{self.group_size}" if self.granularity == "group" else self.granularity
        more = (("asym", not self.symmetric), ("dynamic", self.dynamic), ("double-quantized", self.double_quant))
        return " ".join([kind, where] + [word for word, holds in more if holds])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        _check_fields(cls, data)
        return cls(**data)

    def encode(self) -> str:
        """The spec as one string, for operator schemas; `QuantSpec.decode` is the inverse."""
        return _encode(self)

    @staticmethod
    def decode(text: str) -> QuantSpec:
        return _decode(text)


@lru_cache(maxsize=1024)
def _encode(spec: QuantSpec) -> str:
    flags = f"{spec.signed:d}{spec.symmetric:d}{spec.dynamic:d}{spec.double_quant:d}"
    return f"{spec.bits}:{spec.dtype}:{flags}:{spec.granularity}:{spec.group_size or 0}"


@lru_cache(maxsize=1024)
def _decode(text: str) -> QuantSpec:
    bits, dtype, flags, granularity, group_size = text.split(":")
    signed, symmetric, *rest = (flag == "1" for flag in flags)
    return QuantSpec(int(bits), dtype, signed, symmetric, granularity, int(group_size) or None, *rest)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantScheme:
    """How one module is quantized: a spec for its weight, its input and its output; None leaves that tensor in float.

    Example:
        >>> QuantScheme(weight=QuantSpec(8), input=QuantSpec(8, granularity="token", dynamic=True)).needs_data
        False
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    output: QuantSpec | None = None

    def __post_init__(self) -> None:
        for role in ("weight", "input", "output"):
            spec = getattr(self, role)
            if spec is not None and not isinstance(spec, QuantSpec):
                raise ValueError(f"QuantScheme {role}={spec!r}: must be a QuantSpec or None")
        if self.weight is None:
            if self.input is not None or self.output is not None:
                raise ValueError("QuantScheme without a weight spec: nothing would be packed; give weight=QuantSpec(...)")
            return
        if self.weight.dynamic or self.weight.granularity == "token":
            raise ValueError("QuantScheme weight: weights do not change at run time; use dynamic=False and no token granularity")
        for role, spec in (("input", self.input), ("output", self.output)):
            if spec is None:
                continue
            if spec.granularity not in ("tensor", "token"):
                raise ValueError(
                    f"QuantScheme {role} granularity={spec.granularity!r}: activations take 'tensor', or 'token' with dynamic=True"
                )
            if spec.dtype in ("nf4", "fp4"):
                raise ValueError(f"QuantScheme {role} dtype={spec.dtype!r}: a storage format for weights; use int or float8")

    @property
    def needs_data(self) -> bool:
        """Whether an activation range has to be calibrated or trained."""
        return any(spec is not None and not spec.dynamic for spec in (self.input, self.output))

    @property
    def label(self) -> str:
        parts = [("w", self.weight), ("in", self.input), ("out", self.output)]
        return ", ".join(f"{role}: {spec.label}" for role, spec in parts if spec is not None) or "float"

    def to_dict(self) -> dict[str, Any]:
        return {role: spec and spec.to_dict() for role, spec in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantScheme:
        _check_fields(cls, data)
        return cls(**{role: spec if spec is None else QuantSpec.from_dict(spec) for role, spec in data.items()})

    def with_weight(self, **changes: Any) -> QuantScheme:
        """The scheme with fields of its weight spec replaced; `group_size=n` implies group granularity."""
        if self.weight is None:
            raise ValueError("this scheme keeps the weight in float: there is nothing to override")
        _check_fields(QuantSpec, changes)
        if changes.get("group_size") is not None:
            changes.setdefault("granularity", "group")
        elif "granularity" in changes and changes["granularity"] != "group":
            changes.setdefault("group_size", None)
        return replace(self, weight=replace(self.weight, **changes))


@dataclass(frozen=True)
class Preset:
    """A named scheme, and the preset that the first and last layer take instead (None: the same)."""

    scheme: QuantScheme
    edges: str | None = None


def _group(bits: int, group_size: int, symmetric: bool) -> QuantSpec:
    return QuantSpec(bits, symmetric=symmetric, granularity="group", group_size=group_size)


def _static(bits: int) -> QuantScheme:
    # post-ReLU activations fill [0, max]: an asymmetric range spends no code on what never occurs
    return QuantScheme(QuantSpec(bits), QuantSpec(bits, symmetric=False, granularity="tensor"))


_TOKEN8 = QuantSpec(8, granularity="token", dynamic=True)
_FP8_TOKEN = QuantSpec(8, "float8_e4m3fn", granularity="token", dynamic=True)

PRESETS: dict[str, Preset] = {
    "w8a8": Preset(_static(8)),
    "w8a8-dynamic": Preset(QuantScheme(QuantSpec(8), _TOKEN8)),
    "w8a16": Preset(QuantScheme(QuantSpec(8))),
    "w4a16": Preset(QuantScheme(_group(4, 128, symmetric=True))),
    "w4a8-dynamic": Preset(QuantScheme(_group(4, 128, symmetric=True), _TOKEN8)),
    "w3a16": Preset(QuantScheme(_group(3, 64, symmetric=False))),
    "w2a16": Preset(QuantScheme(_group(2, 64, symmetric=False))),
    "w4a4": Preset(_static(4), edges="w8a8"),
    "w3a3": Preset(_static(3), edges="w8a8"),
    "w2a2": Preset(_static(2), edges="w8a8"),
    "fp8": Preset(QuantScheme(QuantSpec(8, "float8_e4m3fn"), _FP8_TOKEN)),
    "nf4": Preset(QuantScheme(QuantSpec(4, "nf4", granularity="group", group_size=64))),
}


def get_preset(name: str) -> Preset:
    """The preset of that name; a wrong name lists the valid ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; valid: {', '.join(PRESETS)}")
    return PRESETS[name]
