"""Mixed precision of a small language model: 3.5 bits on average against 3 bits everywhere, and 4 bits on a random half.

    python benchmarks/mixed_llm.py --data DATA --model FOLDER

FOLDER and DATA as in `ptq_llm.py`, and so is the evaluation. Sensitivity is the SQNR of the logits on one calibration window, each
linear layer quantized alone; weights are rounded to nearest, in groups of 64, asymmetric.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from pathlib import Path

import torch
from ptq_llm import perplexity

import lightning_quant as lq
from lightning_quant.report import table


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256, help="of the window that sensitivity is measured on")
    parser.add_argument("--halves", type=int, default=2, help="random halves to try")
    parser.add_argument("--sensitivity", type=Path, help="a file to keep, and find, the sensitivities in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer((args.data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    recipes = {bits: lq.Recipe("w4a16", bits=bits, group_size=64, symmetric=False) for bits in (3, 4, 5)}
    begin = time.perf_counter()
    if args.sensitivity and args.sensitivity.exists():
        found = lq.Sensitivity.from_json(args.sensitivity)
    else:
        batches = [{"input_ids": ids[None, 100_000 : 100_000 + args.tokens], "use_cache": False}]
        found = lq.sensitivity(model, list(recipes.values()), batches=batches, forward=lambda model, batch: model(**batch).logits)
        if args.sensitivity:
            found.to_json(args.sensitivity)
    seconds = time.perf_counter() - begin
    names = sorted({choice.layer for choice in found.choices})
    rows = []

    def measure(name: str, recipe: lq.Recipe) -> None:
        rows.append((name, f"{perplexity(lq.quantize(model, recipe), ids, 32):.3f}"))
        print("  ".join(rows[-1]), flush=True)

    measure("3 bits everywhere", recipes[3])
    for seed in range(args.halves):
        half = random.Random(seed).sample(names, len(names) // 2)
        schemes = dict.fromkeys(half, recipes[4].scheme)
        measure(f"4 bits on a random half ({seed}), else 3", lq.Recipe(recipes[3].scheme, schemes=schemes))
    measure("3.5 bits, by sensitivity", lq.allocate(found, "3.5 bits"))
    measure("4 bits everywhere", recipes[4])
    print(f"\nsensitivity of {len(names)} layers: {seconds:.0f} s\n{table(('weights', 'perplexity'), rows)}")


if __name__ == "__main__":
    main()
