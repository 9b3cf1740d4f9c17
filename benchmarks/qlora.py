"""QLoRA against bitsandbytes and PEFT wired by hand, and against LoRA on the float base: perplexity, step time, memory, bytes.

    python benchmarks/qlora.py --data DATA --model FOLDER                 # 200 steps each, in a process each
    python benchmarks/qlora.py --data DATA --model FOLDER --steps-only    # step times, alternating in one process

FOLDER holds a causal language model as transformers saves it, DATA `wikitext-2/valid.txt`. All train rank 16 on the same windows in
the same order with the same rate, from token 100,000 on; evaluation: the first 32 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from ptq_llm import forget_peak, perplexity, status
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.report import table

RANK, RATE = 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = (
    *("lightning_quant nf4", "lightning_quant nf4, double", "lightning_quant nf4, loftq"),
    *("bitsandbytes + PEFT", "bfloat16 LoRA on the float base"),
)


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seconds: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self.began)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([value for value in self.parameters() if value.requires_grad], RATE, weight_decay=0.0)


def windows(args: argparse.Namespace, ids: Tensor) -> list[Tensor]:
    """The batches of the training, the same for all."""
    train = ids[100_000:]
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(train) - args.length, (args.steps, args.batch), generator=generator)
    return [torch.stack([train[at : at + args.length] for at in row]) for row in starts.tolist()]


def load(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model, tokenizer((args.data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]


def by_hand(model: nn.Module) -> nn.Module:
    """bitsandbytes' layers put in, PEFT around it."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, False, "nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.data, False, blocksize=64, compress_statistics=False, quant_type="nf4")
            model.set_submodule(name, new.to("cpu"))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))


def plain_steps(model: nn.Module, batches: list[Tensor]) -> Iterator[float]:
    """A training loop in plain torch; yields the CPU seconds of each step."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], RATE, weight_decay=0.0)
    model.train()
    for batch in batches:
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield time.process_time() - began


def base_bytes(model: nn.Module) -> float:
    """Bytes a weight of the adapted layers' base."""
    stored = numel = 0
    for name, value in model.named_parameters():
        layer = next((target for target in TARGETS if f".{target}." in name), None)
        if layer is not None and "lora_" not in name:
            stored += value.numel() * value.element_size()
            state = getattr(value, "quant_state", None)
            stored += 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    for module in model.modules():
        if type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "in_features"):
            numel += module.in_features * module.out_features
    return stored / numel


def train(args: argparse.Namespace, row: str) -> dict[str, Any]:
    model, ids = load(args)
    batches = windows(args, ids)
    before = forget_peak()
    evaluate: Callable[[nn.Module], float] = lambda net: perplexity(net.eval(), ids, args.windows)  # noqa: E731
    if row.startswith("lightning_quant"):
        module = Module(model)
        init = "loftq" if row.endswith("loftq") else "default"
        callbacks: list[L.Callback] = [lq.LoRACallback(r=RANK, target_modules=TARGETS, save="all", init=init)]
        plugin = lq.QuantPrecision("nf4", double_quant=row.endswith("double"))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        torch.manual_seed(0)
        fit = lq.Trainer(max_epochs=1, accelerator="cpu", plugins=[plugin], callbacks=callbacks, fast_dev_run=args.steps, **quiet)
        fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        seconds, trained = module.seconds, module.net
    else:
        if row.startswith("bitsandbytes"):
            trained = by_hand(model)
        else:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            trained = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
        seconds = list(plain_steps(trained, batches))
    peak = status("VmHWM") - before
    return {
        "perplexity": evaluate(trained),
        "seconds": statistics.median(seconds),
        "peak": peak,
        "bytes": base_bytes(trained),
    }


def step_times(args: argparse.Namespace) -> None:
    """Steps of all rows in turn, medians of CPU seconds."""
    model, ids = load(args)
    batches = windows(args, ids)
    runs: dict[str, Iterator[float]] = {}
    for row in ("bfloat16 LoRA on the float base", "lightning_quant nf4", "bitsandbytes + PEFT"):
        copied, _ = load(args)
        if row.startswith("lightning_quant"):
            from lightning_quant.adapters import inject

            net = lq.QuantPrecision("nf4").convert_module(copied)
            inject(net, r=RANK, alpha=2 * RANK, dropout=0, target_modules=TARGETS, init="default", modules_to_save=[], options={})
        elif row.startswith("bitsandbytes"):
            net = by_hand(copied)
        else:
            from peft import LoraConfig, get_peft_model

            net = get_peft_model(copied, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
        runs[row] = plain_steps(net, batches)
    del model
    seconds: dict[str, list[float]] = {row: [] for row in runs}
    for _ in range(args.steps):
        for row, steps in runs.items():
            seconds[row].append(next(steps))
    middle = {row: statistics.median(values[1:]) for row, values in seconds.items()}
    first = next(iter(middle.values()))
    rows = [(row, f"{value:.2f}", f"{value / first:.2f}") for row, value in middle.items()]
    print(table(("step", "CPU seconds", "of bfloat16"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.steps_only:
        step_times(args)
        return
    if args.row:
        print(json.dumps(train(args, args.row)))
        return
    rows = []
    for row in ROWS:
        done = subprocess.run([sys.executable, *sys.argv, "--row", row], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append((row, f"{found['perplexity']:.3f}", f"{found['seconds']:.2f}", f"{found['peak']:.0f}", f"{found['bytes']:.4f}"))
        print("  ".join(rows[-1]), flush=True)
    print(f"\n{table(('after training', 'perplexity', 'CPU s a step', 'MB added to the peak', 'base bytes a weight'), rows)}")


if __name__ == "__main__":
    main()
