"""The table of PTQ algorithms. Recipes name the ones to run, in order; without any, weights are rounded to nearest."""

from __future__ import annotations

from lightning_quant.algorithms.adaround import ADAROUND
from lightning_quant.algorithms.autoround import AUTOROUND
from lightning_quant.algorithms.awq import AWQ
from lightning_quant.algorithms.base import Algorithm, check_options, check_order
from lightning_quant.algorithms.bias_correction import BIAS_CORRECTION
from lightning_quant.algorithms.block_ap import BLOCK_AP
from lightning_quant.algorithms.equalization import EQUALIZATION
from lightning_quant.algorithms.gptq import GPTQ
from lightning_quant.algorithms.smoothquant import SMOOTHQUANT
from lightning_quant.recipe import Recipe

ALGORITHMS: dict[str, Algorithm] = {
    "equalization": EQUALIZATION,
    "smoothquant": SMOOTHQUANT,
    "awq": AWQ,
    "gptq": GPTQ,
    "adaround": ADAROUND,
    "autoround": AUTOROUND,
    "block_ap": BLOCK_AP,
    "bias_correction": BIAS_CORRECTION,
}


def get_algorithms(recipe: Recipe) -> dict[str, Algorithm]:
    """The algorithms of a recipe by name, in its order.

    Raises:
        ValueError: an unknown name or option, or an order that cannot work; the message lists what is valid.
    """
    check_order(recipe.algorithms, ALGORITHMS)
    check_options(recipe, ALGORITHMS)
    return {name: ALGORITHMS[name] for name in recipe.algorithms}
