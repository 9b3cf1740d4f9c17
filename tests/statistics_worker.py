"""What two processes do together: `torchrun --standalone --nproc_per_node 2 -m tests.statistics_worker FOLDER`.

Each has half of the batches; the second one's reach an expert that the first one's do not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.algorithms import ALGORITHMS
from lightning_quant.algorithms.base import Algorithm
from tests.chains import Block

RECIPES = {
    "gptq": lq.Recipe("w4a16", group_size=8, algorithms=["awq", "gptq"]),
    "smoothquant": lq.Recipe("w8a8", algorithms=["smoothquant"]),
    "autoround": lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 4}}),
    "block_ap": lq.Recipe("w4a16", group_size=8, algorithms=["block_ap"], algorithm_options={"block_ap": {"iterations": 8}}),
    "adaround": lq.Recipe("w4a16", group_size=8, algorithms=["adaround"], algorithm_options={"adaround": {"iterations": 8}}),
    "images": lq.Recipe(
        lq.QuantScheme(lq.QuantSpec(4, granularity="tensor"), lq.QuantSpec(8, symmetric=False, granularity="tensor")),
        algorithms=["equalization", "adaround", "bias_correction"],
        algorithm_options={"adaround": {"iterations": 40}},
    ),
    "images, gptq": lq.Recipe("w4a4", algorithms=["equalization", "gptq", "bias_correction"], edges=None),
}


class Routed(Block):
    """Batches whose first value is positive go through an expert of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.expert[0].of_expert = self.expert[2].of_expert = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.expert(x) if x[0, 0] > 0 else out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Routed() for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for block in net.blocks:
        for part in (block.down, block.expert[2]):
            part.weight.data[0].zero_()  # nothing changes the value that decides
            part.bias.data[0] = 0
    return net


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 6)):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers[-2].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 4)).eval()


def images(rank: int, world: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)][rank::world]


def task(name: str) -> tuple[Any, Any]:
    """The model of a recipe, and its batches."""
    return (convolutions, images) if name.startswith("images") else (model, batches)


def batches(rank: int, world: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    made = [torch.randn(8, 16, generator=generator) for _ in range(4)]
    for index, batch in enumerate(made):
        batch[0, 0] = 1.0 if index % 2 else -1.0
    return made[rank::world]


def run(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    seen: dict[str, Tensor] = {}
    ALGORITHMS["look"] = Algorithm(
        lambda unit: seen.update({name: value.clone() for name, value in unit.statistics["hessian"].items()}),
        "rounder",
        ("hessian", "low", "high", "rows"),
    )
    try:
        lq.quantize(model(), lq.Recipe("w4a16", group_size=8, algorithms=["look"]), batches(rank, world))
    finally:
        del ALGORITHMS["look"]
    found: dict[str, Any] = {"hessians": seen}
    for name, recipe in RECIPES.items():
        options = {"memory_budget": 600, "work_dir": folder / name} if folder is not None else {}
        make, data = task(name)
        found[name] = lq.quantize(make(), recipe, data(rank, world), **options).state_dict()
        if folder is not None:  # all is there
            found[f"{name} again"] = lq.quantize(make(), recipe, data(rank, world), **options).state_dict()
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    torch.save(run(dist.get_rank(), dist.get_world_size(), out), out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
