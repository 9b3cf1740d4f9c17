"""How a whole model is quantized: patterns to schemes, what to leave alone, observers and algorithms."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from lightning_quant.spec import PRESETS, Granularity, QuantScheme, _check_fields, get_preset

# fields of the default scheme's weight spec that a Recipe takes by keyword
_OVERRIDES = ("bits", "group_size", "symmetric", "granularity", "double_quant")


def matches(pattern: str, name: str, type_names: Sequence[str] = ()) -> bool:
    """Whether a recipe's pattern names a module.

    Args:
        pattern: a glob on the qualified name, `re:` and a regular expression matched from its start, or a type's name.
        name: the module's qualified name.
        type_names: the names of the module's class and its bases.

    Example:
        >>> matches("*.q_proj", "layers.0.q_proj"), matches("re:layers[.]0", "layers.0.fc"), matches("Linear", "fc", ["Linear"])
        (True, True, True)
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or pattern in type_names


def as_scheme(value: str | QuantScheme | Mapping[str, Any] | None) -> QuantScheme | None:
    """A scheme from a preset's name, a dict or a QuantScheme; None stays None (float)."""
    if value is None or isinstance(value, QuantScheme):
        return value
    if isinstance(value, str):
        return get_preset(value).scheme
    if isinstance(value, Mapping):
        return QuantScheme.from_dict(value)
    raise ValueError(f"a scheme is a preset's name, a dict, a QuantScheme or None, not {type(value).__name__}")


def _patterns(value: str | Iterable[str], what: str) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ValueError(f"Recipe {what}: {value!r} is no pattern or list of patterns")
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"Recipe {what}: {pattern!r} is not a string")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"Recipe {what}: {pattern!r} is not a regular expression ({error})") from None
    return patterns


@dataclass(frozen=True, init=False)
class Recipe:
    """How one model is quantized.

    Args:
        scheme: what quantizable modules get by default: a preset's name, a `QuantScheme`, a dict of one, or None for none.
        schemes: pattern -> scheme (or None: float), tried in order, the first match wins, before `scheme`. A pattern is a
            glob on the qualified name, `re:` and a regular expression, or the name of a module type. Embeddings and a language
            model's output head are quantized only when a pattern here names them.
        ignore: patterns of modules that stay float, whatever else matches.
        edges: the scheme of the first and the last quantized layer; by default what the preset says (w8a8 for w4a4, w3a3
            and w2a2, as papers do); None treats them like the rest. Takes effect from three quantized layers on.
        observer: of activation ranges, a key of `OBSERVERS`; by default `moving_average` in QAT, and in PTQ `minmax`, or
            `mse` below 8 bits.
        observer_options: its keyword arguments.
        weight_observer: of weight ranges; by default `minmax`, or what the QAT method starts learned scales from below 8 bits.
        weight_observer_options: its keyword arguments.
        algorithms: PTQ algorithms to run in order, keys of `ALGORITHMS`.
        algorithm_options: algorithm -> its keyword arguments.
        blocks: patterns, each naming the repeated blocks of one chain, for algorithms that go block by block; by default they are
            found.
        fold: (module, BatchNorm) names to fold, instead of the pairs that are found; an empty list folds none.
        bits, group_size, symmetric, granularity, double_quant: override the weight spec of `scheme`.

    Raises:
        ValueError: an unknown preset, field or bad value; valid names are listed.

    Example:
        >>> recipe = Recipe("w4a16", group_size=64, symmetric=False, ignore=["lm_head"], schemes={"*.down_proj": "w8a16"})
        >>> recipe.scheme.weight.label
        'int4 group64 asym'
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    scheme: QuantScheme | None
    schemes: dict[str, QuantScheme | None]
    ignore: tuple[str, ...]
    edges: QuantScheme | None
    observer: str | None
    observer_options: dict[str, Any]
    weight_observer: str | None
    weight_observer_options: dict[str, Any]
    algorithms: tuple[str, ...]
    algorithm_options: dict[str, dict[str, Any]]
    blocks: tuple[str, ...] | None
    fold: tuple[tuple[str, ...], ...] | None

    def __init__(
        self,
        scheme: str | QuantScheme | dict[str, Any] | None = None,
        *,
        schemes: dict[str, str | QuantScheme | dict[str, Any] | None] | None = None,
        ignore: str | Sequence[str] = (),
        edges: str | QuantScheme | dict[str, Any] | None = "auto",
        observer: str | None = None,
        observer_options: dict[str, Any] | None = None,
        weight_observer: str | None = None,
        weight_observer_options: dict[str, Any] | None = None,
        algorithms: str | Sequence[str] = (),
        algorithm_options: dict[str, dict[str, Any]] | None = None,
        blocks: str | Sequence[str] | None = None,
        fold: Sequence[Sequence[str]] | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        granularity: Granularity | None = None,
        double_quant: bool | None = None,
    ) -> None:
        default = as_scheme(scheme)
        values = (bits, group_size, symmetric, granularity, double_quant)
        overrides = dict(zip(_OVERRIDES, values, strict=True))
        changes = {name: value for name, value in overrides.items() if value is not None}
        if changes:
            if default is None:
                raise ValueError(
                    f"Recipe {', '.join(changes)}: overrides a scheme, but no scheme was given; valid: {', '.join(PRESETS)}"
                )
            default = default.with_weight(**changes)
        if edges == "auto":
            edges = PRESETS[scheme].edges if isinstance(scheme, str) else None
        for name, options in (algorithm_options or {}).items():
            if not isinstance(options, Mapping):
                raise ValueError(f"Recipe algorithm_options: {name!r} has {options!r}, which is no mapping of options to values")
        settings = {
            "scheme": default,
            "schemes": {pattern: as_scheme(value) for pattern, value in (schemes or {}).items()},
            "ignore": _patterns(ignore, "ignore"),
            "edges": as_scheme(edges),
            "observer": observer,
            "observer_options": dict(observer_options or {}),
            "weight_observer": weight_observer,
            "weight_observer_options": dict(weight_observer_options or {}),
            "algorithms": _patterns(algorithms, "algorithms"),
            "algorithm_options": {name: dict(options) for name, options in (algorithm_options or {}).items()},
            "blocks": None if blocks is None else _patterns(blocks, "blocks"),
            "fold": None if fold is None else tuple(_patterns(pair, "fold") for pair in fold),
        }
        _patterns(settings["schemes"], "schemes")  # type: ignore[arg-type]
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def lookup(self, name: str, type_names: Sequence[str] = ()) -> tuple[QuantScheme | None, str | None]:
        """The scheme of a module and the pattern that named it (None: the default scheme)."""
        for pattern, scheme in self.schemes.items():
            if matches(pattern, name, type_names):
                return scheme, pattern
        return self.scheme, None

    def ignored(self, name: str, type_names: Sequence[str] = ()) -> str | None:
        """The `ignore` pattern that names a module, if one does."""
        return next((pattern for pattern in self.ignore if matches(pattern, name, type_names)), None)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only: survives YAML, JSON and `torch.load(weights_only=True)`."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["scheme"] = self.scheme and self.scheme.to_dict()
        plain["edges"] = self.edges and self.edges.to_dict()
        plain["schemes"] = {pattern: scheme and scheme.to_dict() for pattern, scheme in self.schemes.items()}
        plain["ignore"], plain["algorithms"] = list(self.ignore), list(self.algorithms)
        plain["algorithm_options"] = {name: dict(options) for name, options in self.algorithm_options.items()}
        plain["blocks"] = None if self.blocks is None else list(self.blocks)
        plain["fold"] = None if self.fold is None else [list(pair) for pair in self.fold]
        plain["observer_options"] = dict(self.observer_options)
        plain["weight_observer_options"] = dict(self.weight_observer_options)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from `to_dict`, or from the constructor's keywords (`{"scheme": "w8a8", "ignore": ["head"]}`)."""
        _check_fields(cls, {key: value for key, value in data.items() if key not in _OVERRIDES})
        return cls(**data)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe; the file is complete or absent."""
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        os.replace(temporary, target)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Recipe:
        try:
            data = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(f"recipe file {str(path)!r} does not exist") from None
        except yaml.YAMLError as error:
            raise ValueError(f"recipe file {str(path)!r} is not YAML: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"recipe file {str(path)!r} holds {type(data).__name__}, not a mapping of Recipe's fields")
        return cls.from_dict(data)


def as_recipe(value: str | os.PathLike[str] | Mapping[str, Any] | QuantScheme | Recipe) -> Recipe:
    """A recipe from a preset's name, a YAML file's path, a dict, a QuantScheme or a Recipe.

    Raises:
        ValueError: none of these; the message lists the presets.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, QuantScheme):
        return Recipe(value)
    if isinstance(value, Mapping):
        return Recipe.from_dict(value)
    if isinstance(value, str) and value in PRESETS:
        return Recipe(value)
    if isinstance(value, (str, os.PathLike)):
        if Path(value).suffix in (".yaml", ".yml"):
            return Recipe.from_yaml(value)
        raise ValueError(f"unknown recipe {str(value)!r}; give a preset ({', '.join(PRESETS)}), a .yaml path, a dict or a Recipe")
    raise ValueError(f"a recipe is a preset's name, a .yaml path, a dict or a Recipe, not {type(value).__name__}")
