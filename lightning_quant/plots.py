"""Plots. matplotlib is imported where it is used, and no window or global figure is opened."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from lightning_quant.allocate import code_frontier
from lightning_quant.mixed import Choice, Prediction, Sensitivity, by_layer, predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# layers in the bar plot, and points of the curve
MAX_LAYERS, MAX_POINTS = 40, 400


def plot_sensitivity(sensitivity: Sensitivity, path: str | os.PathLike[str] | None = None) -> Figure:
    """Mean bits a weight against the predicted cost of the best mix, beside the recipes measured; and each layer's costs.

    Args:
        sensitivity: what `lq.sensitivity` measured.
        path: a file to save to as well, of any format that matplotlib writes.

    Returns:
        the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_sensitivity needs matplotlib: pip install 'lightning-quant[plots]'") from error
    ranked = sensitivity.layers()
    shown = dict(list(ranked.items())[:MAX_LAYERS])
    figure = Figure(figsize=(12, max(4.0, 1.5 + 0.22 * len(shown) * max(1, len(sensitivity.recipes) / 3))), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    _plot_curve(curve, sensitivity)
    _plot_layers(bars, sensitivity, shown, len(ranked))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _shown(cost: float, by: str) -> float:
    return -10 * math.log10(cost) if by == "sqnr" else cost


def _plot_curve(axes: Any, sensitivity: Sensitivity) -> None:
    layers = by_layer(sensitivity.choices)
    frontier = code_frontier(list(layers.values()))
    firsts = [choices[0] for choices in layers.values()]
    numel = sum(first.numel for first in firsts)
    # beyond what the widest choices take, only float layers are left to add
    widest = max(choice.code_bits / choice.numel for choice in sensitivity.choices)
    shown = [index for index, size in enumerate(frontier.sizes.tolist()) if size <= 1.1 * widest * numel]
    kept = shown[:: max(1, len(shown) // MAX_POINTS)]
    points = [Prediction(float(frontier.sizes[index]) / numel, 0, float(frontier.costs[index])) for index in kept]
    points.append(Prediction(1.1 * widest, 0, points[-1].cost))
    _line(axes, points, sensitivity.by, "best mix")
    for index, label in enumerate(sensitivity.recipes):
        picked = [next((choice for choice in choices if choice.recipe == label), None) for choices in layers.values()]
        point = predict(firsts, picked)
        if math.isfinite(point.cost) and (point.cost > 0 or sensitivity.by != "sqnr"):
            axes.plot([point.bits], [_shown(point.cost, sensitivity.by)], "o", color=f"C{index}", label=f"{label} everywhere")
    axes.set_xlabel("bits a weight, without scales")
    axes.set_ylabel("predicted SQNR, dB" if sensitivity.by == "sqnr" else f"predicted {sensitivity.by} cost")
    axes.set_title("trade-off")
    axes.grid(alpha=0.3)
    axes.legend()


def _line(axes: Any, points: list[Prediction], by: str, label: str) -> None:
    usable = [point for point in points if point.cost > 0 or by != "sqnr"]
    bits, costs = [point.bits for point in usable], [_shown(point.cost, by) for point in usable]
    axes.step(bits, costs, where="post", color="black", label=label)


def _plot_layers(axes: Any, sensitivity: Sensitivity, shown: dict[str, list[Choice]], total: int) -> None:
    height = 0.8 / len(sensitivity.recipes)
    for index, label in enumerate(sensitivity.recipes):
        places, costs = [], []
        for place, choices in enumerate(shown.values()):
            cost = next((choice.cost for choice in choices if choice.recipe == label), math.nan)
            if math.isfinite(cost):
                places.append(place + (index - (len(sensitivity.recipes) - 1) / 2) * height)
                costs.append(cost)
        axes.barh(places, costs, height, color=f"C{index}", label=label)
    axes.set_yticks(range(len(shown)), [name or "(root)" for name in shown], fontsize=7)
    axes.invert_yaxis()
    if sensitivity.by == "sqnr":
        axes.set_xscale("log")
        axes.set_xlabel("noise power / signal power")
    else:
        axes.set_xlabel(f"{sensitivity.by} cost")
    axes.set_title("each layer alone" + (f", the {len(shown)} worst of {total}" if total > len(shown) else ""))
    axes.legend()
