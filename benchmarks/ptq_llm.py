"""Post-training quantization of a small language model: perplexity, time and memory of each algorithm.

    python benchmarks/ptq_llm.py --data DATA --model FOLDER

FOLDER holds a causal language model as transformers saves it, DATA `wikitext-2/valid.txt`. Calibration: 64 windows of 512 tokens
from token 100,000 on. Evaluation: the first 32 windows of 512 tokens. All linear layers but the head are quantized. "seconds" are
those of the CPU, so that what else runs on the machine does not count; "passes" are these in units of one float32 forward pass over
the calibration set in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_quant as lq
from lightning_quant.report import table

WINDOW = 512


def recipes() -> dict[str, lq.Recipe]:
    """Row -> recipe."""

    def weights(preset: str, size: int, symmetric: bool, *algorithms: str, **options: Any) -> lq.Recipe:
        return lq.Recipe(preset, group_size=size, symmetric=symmetric, algorithms=algorithms, algorithm_options=options)

    quick, middle, long = ({"autoround": {"iterations": count}} for count in (40, 100, 200))
    return {
        "w4a16 g64 asym, nearest": weights("w4a16", 64, False),
        "w4a16 g64 asym, gptq": weights("w4a16", 64, False, "gptq"),
        "w4a16 g64 asym, awq + gptq": weights("w4a16", 64, False, "awq", "gptq"),
        "w4a16 g64 sym, nearest": weights("w4a16", 64, True),
        "w4a16 g64 sym, autoround 40": weights("w4a16", 64, True, "autoround", **quick),
        "w4a16 g64 asym, autoround 200": weights("w4a16", 64, False, "autoround", **long),
        "w4a16 g64 asym, awq + autoround 200": weights("w4a16", 64, False, "awq", "autoround", **long),
        "w4a16 g128 asym, nearest": weights("w4a16", 128, False),
        "w4a16 g128 asym, awq + autoround 100": weights("w4a16", 128, False, "awq", "autoround", **middle),
        "w3a16 g64 asym, nearest": weights("w3a16", 64, False),
        "w3a16 g64 asym, awq + autoround 200": weights("w3a16", 64, False, "awq", "autoround", **long),
        "w2a16 g64 asym, nearest": weights("w2a16", 64, False),
        "w2a16 g64 asym, awq + autoround 200": weights("w2a16", 64, False, "awq", "autoround", **long),
        "w8a8-dynamic, nearest": lq.Recipe("w8a8-dynamic"),
        "w8a8-dynamic, smoothquant": lq.Recipe("w8a8-dynamic", algorithms=["smoothquant"]),
        "w8a8 static, nearest": lq.Recipe("w8a8"),
        "w8a8 static, smoothquant": lq.Recipe("w8a8", algorithms=["smoothquant"]),
    }


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, windows: int) -> float:
    """Of windows each on its own; a window's first token is only read."""
    loss = 0.0
    for start in range(0, windows * WINDOW, WINDOW):
        window = ids[None, start : start + WINDOW]
        logits = model(input_ids=window).logits[0, :-1].float()
        loss += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return math.exp(loss / (windows * (WINDOW - 1)))


def status(key: str) -> float:
    """A line of the process's status, MB: `VmRSS` is its size now, `VmHWM` the largest since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def forget_peak() -> float:
    """Give back what is not used, let the peak start from here, and return the size now, MB."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--only", default="", help="rows whose name this regular expression is in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer((args.data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    starts = range(100_000, 100_000 + args.windows * WINDOW, WINDOW)
    batches = [{"input_ids": ids[None, start : start + WINDOW], "use_cache": False} for start in starts]
    begin = time.process_time()
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
    one_pass = time.process_time() - begin
    rows: list[tuple[Any, ...]] = [("float", f"{perplexity(model, ids, 32):.3f}", "", "", "")]
    print(f"one float pass: {one_pass:.1f} s; float perplexity {rows[0][1]}", flush=True)
    for name, recipe in recipes().items():
        if not re.search(args.only, name):
            continue
        before, begin = forget_peak(), time.process_time()
        qmodel = lq.quantize(model, recipe, batches, calibration_batches=len(batches))
        seconds, added = time.process_time() - begin, status("VmHWM") - before
        row = (name, f"{perplexity(qmodel, ids, 32):.3f}", f"{seconds:.0f}", f"{seconds / one_pass:.2f}", f"{added:.0f}")
        rows.append(row)
        print("  ".join(row), flush=True)
        del qmodel
    print(f"\n{table(('scheme', 'perplexity', 'seconds', 'passes', 'MB added to the peak'), rows)}")


if __name__ == "__main__":
    main()
