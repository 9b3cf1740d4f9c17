"""Mixed precision of a ResNet-20 on CIFAR-10: 3.5 bits on average against 3 bits everywhere, and 4 bits on a random half.

    OMP_NUM_THREADS=1 python benchmarks/mixed_cnn.py --data DATA

DATA as in `ptq_cnn.py`. Weights only, per channel, rounded to nearest. Sensitivity is the SQNR of the logits on 512 training
images, each layer quantized alone to 2, 3, 4, 5 and 6 bits.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from pathlib import Path

import torch
from ptq_cnn import CIFAR10, accuracy, batches, float_model

import lightning_quant as lq
from lightning_quant.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--halves", type=int, default=5, help="random halves to try")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    data = CIFAR10(args.data / "cifar10", limit_train=512)
    data.setup("fit")
    model, test = float_model(data, args.data / "cifar10" / "resnet20-float.safetensors", 0), data.images["test"]
    images = [images for images, _ in batches(*data.images["train"], 512, 128)]
    recipes = {bits: lq.Recipe(lq.QuantScheme(lq.QuantSpec(bits))) for bits in (2, 3, 4, 5, 6)}
    begin = time.perf_counter()
    found = lq.sensitivity(model, list(recipes.values()), batches=images)
    print(f"sensitivity: {time.perf_counter() - begin:.0f} s", flush=True)
    sizes = {choice.layer: choice.numel for choice in found.choices}
    rows = [("float", f"{accuracy(model, *test):.2f}")]

    def measure(name: str, recipe: lq.Recipe) -> float:
        rows.append((name, f"{accuracy(lq.quantize(model, recipe), *test):.2f}"))
        print("  ".join(rows[-1]), flush=True)
        return float(rows[-1][1])

    measure("3 bits everywhere", recipes[3])
    measured = []
    for seed in range(args.halves):
        order, half, taken = random.Random(seed).sample(list(sizes), len(sizes)), [], 0
        for name in order:  # half of the weights
            if taken + sizes[name] <= sum(sizes.values()) // 2:
                half, taken = [*half, name], taken + sizes[name]
        schemes = dict.fromkeys(half, recipes[4].scheme)
        measured.append(measure(f"4 bits on a random half ({seed}), else 3", lq.Recipe(recipes[3].scheme, schemes=schemes)))
    rows.append(("the mean of these", f"{sum(measured) / len(measured):.2f}"))
    measure("3.5 bits, by sensitivity", lq.allocate(found, "3.5 bits"))
    measure("4 bits everywhere", recipes[4])
    print(f"\n{table(('weights', 'accuracy %'), rows)}")


if __name__ == "__main__":
    main()
