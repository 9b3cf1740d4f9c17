"""Which part of a model is trained: patterns or a sensitivity ranking name it, and the rest is frozen while it lasts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.methods import METHODS, get_method
from lightning_quant.mixed import Sensitivity
from lightning_quant.plan import Plan
from lightning_quant.recipe import _patterns, matches
from lightning_quant.sharding import reshard
from lightning_quant.surgery import fake_modules, packed_modules

# of the summed costs of a sensitivity ranking: what its layers that are trained make up together
SHARE = 0.9
SCALES = "scales"
RESTS = ("quantized", "float")


def _matching(model: nn.Module, pattern: str) -> list[str]:
    quantizing = {id(part) for module in model.modules() if isinstance(module, FakeQuantize) for part in module.modules()}
    parts = [(name, part) for name, part in model.named_modules() if name and id(part) not in quantizing]
    return [name for name, part in parts if matches(pattern, name, [cls.__name__ for cls in type(part).__mro__])]


def _no_match(model: nn.Module, pattern: str) -> str:
    names = [name for name, part in model.named_modules() if name and not isinstance(part, FakeQuantize)]
    return f"{pattern!r} names no module of {type(model).__name__}; it has {', '.join(names[:12])}{', ...' * (len(names) > 12)}"


def find_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of modules that patterns, as of a `Recipe`, match.

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> find_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["Linear"])
        ['0']
    """
    found: list[str] = []
    for pattern in patterns:
        mine = _matching(model, pattern)
        if not mine:
            raise ValueError(_no_match(model, pattern))
        found += [name for name in mine if name not in found]
    return found


def packed_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The float32 scales of packed weights whose operators have a gradient by them: linear layers' and convolutions'."""
    found = {}
    for name, module in packed_modules(model).items():
        scale = module._parameters.get("weight_scale")
        if scale is not None and module.operator in ("linear", "conv"):
            found[f"{name}.weight_scale".lstrip(".")] = scale
    return found


class Selection:
    """What is trained, and what becomes of the rest.

    Args:
        train: patterns of modules (all that is in them is trained, and a BatchNorm that is folded into them); a `Sensitivity`: the
            fewest layers that together make up `SHARE` of its costs; `SCALES`: learned scales and zero points, and no weights;
            of a packed model the scales of its weights, whose codes stay (Chen et al. 2024, EfficientQAT, arXiv:2407.11062,
            section 3.3: E2E-QP); None: all.
        rest: `"quantized"`: the rest is quantized, too, and stands still; `"float"`: it is not quantized.

    Raises:
        ValueError: a bad value.
    """

    def __init__(self, train: str | Sequence[str] | Sensitivity | None, rest: str = "quantized") -> None:
        if rest not in RESTS:
            raise ValueError(f"rest={rest!r}: valid are {', '.join(RESTS)}")
        if isinstance(train, Sensitivity):
            train = train.worst(SHARE)
        self.scales = train == SCALES
        try:
            self.patterns = None if train is None else list(_patterns(train, "train"))
        except ValueError as error:
            raise ValueError(str(error).removeprefix("Recipe ")) from None
        if self.patterns == []:
            raise ValueError("train=[]: then nothing would be trained; name layers, or leave it out to train all")
        if rest == "float" and (self.patterns is None or self.scales):
            raise ValueError(f"rest='float' with train={train!r} leaves no rest that could be in float: name layers by train=[...]")
        self.rest = rest
        self._model: nn.Module | None = None
        self._before: dict[str, bool] = {}  # `requires_grad` of the parameters where it was changed
        self._norms: list[nn.Module] = []

    def check_method(self, method: str) -> None:
        """Raises ValueError if a method would give other values to weights that stand still."""
        if self.patterns is not None and self.rest == "quantized" and get_method(method).weight.transform is not None:
            plain = ", ".join(name for name, entry in METHODS.items() if entry.weight.transform is None)
            way = "" if self.scales else "rest='float', or "
            raise ValueError(
                f"train={SCALES if self.scales else self.patterns!r} with method={method!r}, which transforms weights: those that "
                f"stand still would not be the model's own any more. Use {way}another method ({plain})"
            )

    def cut(self, model: nn.Module, plan: Plan) -> Plan:
        """The plan without what stays in float; in place.

        Raises:
            ValueError: nothing is left, or a pattern matches nothing.
        """
        if self.patterns is None or self.rest == "quantized":
            return plan
        chosen: set[str] = set()
        for pattern in self.patterns:  # the plan's experts are no modules of the model yet
            tops = _matching(model, pattern)
            tops += [match.name for match in plan.matches if matches(pattern, match.name)]
            if not tops:
                raise ValueError(_no_match(model, pattern))
            chosen |= {match.name for match in plan.matches if any(_within(match.name, top) for top in tops)}
        if not chosen:
            raise ValueError(
                f"train={self.patterns!r} names no layer that the recipe quantizes: nothing would be, with rest='float'"
            )
        for match in plan.matches:
            if match.name not in chosen:
                plan.skipped[match.name] = "in float: it is not trained, and QATCallback has rest='float'"
        plan.matches[:] = [match for match in plan.matches if match.name in chosen]
        for producer, norm in [pair for pair in plan.pairs if pair[0] not in chosen]:
            plan.pairs.remove((producer, norm))
            plan.skipped[norm] = f"not folded: {producer} stays in float"
        return plan

    def freeze(self, model: nn.Module) -> None:
        """Take `requires_grad` and gradients from all that is not trained, until `release`; again and again does no harm.

        Raises:
            ValueError: a pattern matches nothing, or nothing of what is named could be trained.
        """
        if self.patterns is None or self._model is model:
            return
        self.release()
        trained = self._trained(model)
        parameters = {id(value) for part in trained for value in part.parameters()}
        packed = {id(value) for value in packed_scales(model).values()} if self.scales else set()
        if not packed and not any(value.requires_grad and id(value) in parameters for value in model.parameters()):
            why = "its parameters have requires_grad=False, or it has none"
            if self.scales:
                why = "the method learns no scales, or a packed model has none that could learn (linear layers and convolutions do)"
            raise ValueError(f"train={SCALES if self.scales else self.patterns!r} leaves nothing to be trained: {why}")
        moving = {id(part) for part in trained}
        self._model = model
        self._norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and id(part) not in moving]
        for name, value in model.named_parameters():
            wanted = id(value) in packed or (value.requires_grad and id(value) in parameters)
            if wanted != value.requires_grad:
                self._before[name] = value.requires_grad
                value.requires_grad_(wanted)
                value.grad = None  # optimizers pass over it, weight decay included

    def still(self) -> list[nn.Module]:
        """Bring BatchNorms of the rest to eval mode, so that their statistics stand still; returns those that were changed."""
        moving = [norm for norm in self._norms if norm.training]
        for norm in moving:
            norm.eval()
        return moving

    def release(self) -> None:
        """Give everything its `requires_grad` back."""
        if self._model is not None:
            reshard(self._model)
            for name, value in self._model.named_parameters():  # sharding has replaced them
                if name in self._before:
                    value.requires_grad_(self._before[name])
                    value.grad = None
        self._model, self._before, self._norms = None, {}, []

    def _trained(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose parameters are trained."""
        if self.scales:
            return [part for part in model.modules() if isinstance(part, FakeQuantize)]
        assert self.patterns is not None
        tops = find_modules(model, self.patterns)
        names = {name for name, _ in model.named_modules() if any(_within(name, top) for top in tops)}
        norms = [norm for name, fake in fake_modules(model).items() if name in names for norm in fake.folded_norm]
        return [part for name, part in model.named_modules() if name in names] + norms


def _within(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")
