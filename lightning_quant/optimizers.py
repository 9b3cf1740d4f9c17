"""Optimizers by name: torch's AdamW, and bitsandbytes' with 8-bit and paged states (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# name -> class in bitsandbytes.optim; torch's own are not in here
BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw8bit": "PagedAdamW8bit",
    "lion8bit": "Lion8bit",
    "paged_lion8bit": "PagedLion8bit",
}
TORCH: dict[str, type[Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def make_optimizer(
    params: nn.Module | Iterable[nn.Parameter] | Iterable[dict[str, Any]], name: str = "adamw", **options: Any
) -> Optimizer:
    """An optimizer for `configure_optimizers`; its state is in Lightning's checkpoints and resumes exactly.

    Args:
        params: a module (what of it requires a gradient), parameters, or groups.
        name: `"adamw"`, `"adam"`, `"sgd"` of torch; `"adamw8bit"`, `"paged_adamw"`, `"paged_adamw8bit"`, `"lion8bit"`,
            `"paged_lion8bit"` of bitsandbytes. 8-bit states take 2 bytes a parameter instead of 8; tensors below 4096
            elements keep theirs in float32. Paged states move between GPU and host memory, on CUDA only.
        options: such as `lr` and `weight_decay`.

    Raises:
        ValueError: an unknown name, no parameter to train, or parameters where such an optimizer cannot run.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> make_optimizer(nn.Linear(4, 4), "adamw", lr=1e-3).defaults["lr"]
        0.001
    """
    if name not in TORCH and name not in BITSANDBYTES:
        raise ValueError(f"unknown optimizer {name!r}; valid: {', '.join([*TORCH, *BITSANDBYTES])}")
    given: list[Any] = list(params.parameters() if isinstance(params, nn.Module) else params)
    if given and not isinstance(given[0], dict):
        given = [value for value in given if value.requires_grad]
    if not given:
        raise ValueError(f"optimizer {name!r}: no parameter requires a gradient; with QuantPrecision add LoRACallback")
    if name in TORCH:
        return TORCH[name](given, **options)
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"optimizer {name!r} is bitsandbytes': install it (pip install bitsandbytes), or use 'adamw'")
    values = [value for group in given for value in group["params"]] if isinstance(given[0], dict) else given
    devices = {value.device.type for value in values}
    if name.startswith("paged") and devices != {"cuda"}:
        raise ValueError(
            f"optimizer {name!r} pages its state between a CUDA GPU and the host, and the parameters are on "
            f"{', '.join(sorted(devices))}: use {name.removeprefix('paged_')!r}"
        )
    import bitsandbytes.optim

    made: Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[name])(given, **options)
    return made
