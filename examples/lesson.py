"""The classic experiment in one command: quantize a language model, measure what it lost, train back only the layers to blame.

    python examples/lesson.py                                     # a small model of its own, trained on Python's sources
    python examples/lesson.py --model FOLDER --text FILE          # a causal language model that transformers saved

1. The float model is measured on held-out text: its perplexity, and its exact match.
2. It is quantized with 512 calibration prompts: rounded to nearest, by GPTQ, by AWQ; each is measured again.
3. Where GPTQ or AWQ lost more than `--tolerance` percent of either, each layer is quantized alone to see what it costs, and only
   those that make up `--blame` of the costs are trained on from there, the float model being the teacher. The rest stays quantized
   and stands still. The result is packed and measured.

Exact match is the share of places in the held-out text, each with half a window or more before it, at which greedy decoding
continues with the very `--answer` tokens that the text has there. Losses are relative: perplexity above float's, exact match below.

The model of its own reads bytes; it is trained once and kept in `--cache`. Its text is the sources of Python's standard library,
every tenth file of which is held out; of a `--text` the last tenth is.
"""

from __future__ import annotations

import argparse
import logging
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_quant as lq
from lightning_quant.report import table

ALGORITHMS = {"nearest": [], "GPTQ": ["gptq"], "AWQ": ["awq"]}
# AWQ's scales that no layer takes over would have to stay beside the weights, and such layers cannot be trained on
OPTIONS: dict[str, dict[str, Any]] = {"AWQ": {"awq": {"explicit": False}}}


class Bytes:
    """A tokenizer without a vocabulary to learn: a token is a byte of UTF-8, 0 the end of a document."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


class LanguageModel(lq.CausalLMModule):
    """Logs `loss` and `exact_match` in a test.

    Args:
        model: of transformers.
        answer: tokens that have to match.
        options: of `CausalLMModule`.
    """

    def __init__(self, model: Any, *, answer: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.answer = answer

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = batch["input_ids"]
        logits, wanted = self(tokens).logits[:, :-1].float(), tokens[:, 1:]
        self.log("loss", F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), batch_size=len(tokens))
        # greedy decoding goes as the text does as long as each next token, given the text before it, is the text's
        matches = (logits.argmax(-1) == wanted)[:, tokens.shape[1] // 2 - 1 :].unfold(1, self.answer, 1).all(-1)
        self.log("exact_match", matches.float().mean(), batch_size=len(tokens))


class Row(NamedTuple):
    """A model, measured."""

    name: str
    perplexity: float
    exact_match: float
    size: int

    def lost(self, exact: Row) -> tuple[float, float]:
        """Percent of perplexity and of exact match that it is worse than float."""
        return 100 * (self.perplexity / exact.perplexity - 1), 100 * (1 - self.exact_match / max(exact.exact_match, 1e-9))


class Lesson:
    """The data, the float model, and the steps of the experiment."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        train, held_out = split_file(args.text) if args.text else split_library(args.limit_text)
        tokenizer: Any = Bytes()
        if args.model:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(args.model)
        options: dict[str, Any] = {"window": args.window, "batch_size": args.batch, "calibration_windows": args.prompts}
        test_range = (None, args.test_windows * args.window)
        self.data = lq.TextDataModule(tokenizer, train, test=held_out, test_range=test_range, **options)
        self.recipe = lq.Recipe(args.scheme, group_size=args.group_size, symmetric=False)
        self.rows: list[Row] = []

    def trainer(self, steps: int = 0, callbacks: Sequence[L.Callback] = ()) -> lq.Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        options: dict[str, Any] = {"enable_progress_bar": False, "gradient_clip_val": 1.0, "precision": self.args.precision}
        return lq.Trainer(max_steps=steps, callbacks=list(callbacks), **options, **quiet)

    def float(self) -> LanguageModel:
        """The model of `--model`, or that of `--cache`, made first if it is not there."""
        from transformers import AutoModelForCausalLM

        folder = self.args.model or self.args.cache
        if not (folder / "config.json").is_file():
            self.make(folder)
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return LanguageModel(net, answer=self.args.answer)

    def make(self, folder: Path) -> None:
        """Train a small Llama of bytes."""
        from transformers import LlamaConfig, LlamaForCausalLM

        args, start = self.args, time.perf_counter()
        sizes = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": args.layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2 * args.window}
        net = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes, **heads))
        model = LanguageModel(net, answer=args.answer, lr=3e-3, weight_decay=0.01, warmup=0.05)
        self.trainer(args.float_steps).fit(model, datamodule=self.data)
        net.save_pretrained(folder)
        print(f"trained {sum(p.numel() for p in net.parameters()):,} weights in {time.perf_counter() - start:.0f} s: {folder}\n")

    def measure(self, name: str, model: LanguageModel) -> Row:
        (found,) = self.trainer().test(model, datamodule=self.data, verbose=False)
        size = sum(value.numel() * value.element_size() for value in {*model.parameters(), *model.buffers()})
        row = Row(name, torch.tensor(found["loss"]).exp().item(), 100 * found["exact_match"], size)
        self.rows.append(row)
        print(f"{name:<40} perplexity {row.perplexity:>9.3f}  exact match {row.exact_match:>6.2f} %", flush=True)
        return row

    def quantize(self, model: LanguageModel, name: str) -> LanguageModel:
        algorithms, options = ALGORITHMS[name], OPTIONS.get(name, {})
        recipe = lq.Recipe(self.recipe.scheme, algorithms=algorithms, algorithm_options=options)
        batches = -(-self.args.prompts // self.args.batch)
        return self.trainer().quantize(model, self.data, recipe=recipe, calibration_batches=batches, progress=False)

    def blame(self, model: LanguageModel) -> list[str]:
        """The fewest layers that make up `--blame` of what all cost, each quantized alone."""
        found = lq.sensitivity(model, [self.recipe], datamodule=self.data, trainer=self.trainer(), by="loss")
        worst = found.worst(self.args.blame)
        print(f"\n{found.table(limit=8)}\nto blame: {len(worst)} of {len(found.layers())} layers\n")
        return worst

    def repair(self, model: LanguageModel, packed: LanguageModel, layers: list[str]) -> LanguageModel:
        """Train those layers of the packed model from where they are, taught by the float one, and pack it again."""
        student: Any = lq.unpack(packed, method="lsq")
        student.lr, student.warmup = self.args.lr, 0.1
        qat = lq.QATCallback(self.recipe, method="lsq", scale_lr=0.1, train=layers)
        trainer = self.trainer(self.args.steps, [qat, lq.DistillationCallback(teacher=model, alpha=1.0)])
        trainer.fit(student, datamodule=self.data)
        return trainer.quantize()

    def run(self) -> None:
        args = self.args
        L.seed_everything(args.seed, verbose=False)
        model = self.float()
        exact = self.measure("float", model)
        failed: dict[str, LanguageModel] = {}
        for name in ALGORITHMS:
            packed = self.quantize(model, name)
            lost = self.measure(f"{args.scheme}, {name}", packed).lost(exact)
            if name != "nearest" and max(lost) > args.tolerance:
                failed[name] = packed
        layers = self.blame(model) if failed else []
        for name, packed in failed.items():
            repaired = self.repair(model, packed, layers)
            self.measure(f"{args.scheme}, {name}, QAT of {len(layers)} layers", repaired)
        print(f"\n{self.table(exact)}")
        print(f"\n{self.verdict(list(failed), exact)}")

    def table(self, exact: Row) -> str:
        cells = []
        for row in self.rows:
            perplexity, match = row.lost(exact)
            lost = ("", "") if row is exact else (f"{perplexity:+.1f} %", f"{-match:+.1f} %")
            cells.append((row.name, f"{row.perplexity:.3f}", lost[0], f"{row.exact_match:.2f}", lost[1], f"{row.size:,}"))
        return table(("model", "perplexity", "to float", "exact match %", "to float", "bytes"), cells)

    def verdict(self, failed: list[str], exact: Row) -> str:
        if not failed:
            return f"neither lost more than {self.args.tolerance:g} %: nothing to train"
        told = []
        for name in failed:
            row = next(row for row in self.rows if row.name.startswith(f"{self.args.scheme}, {name}, QAT"))
            within = max(row.lost(exact)) <= self.args.tolerance
            told.append(f"{name} lost more than {self.args.tolerance:g} %; after QAT it is {'within' if within else 'still above'}")
        return "\n".join(told)


def split_file(path: Path) -> tuple[list[str], list[str]]:
    """Nine tenths of a text, and the last one."""
    text = path.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return [text[:cut]], [text[cut:]]


def split_library(limit: int) -> tuple[list[str], list[str]]:
    """Sources of Python's standard library, about so many characters: most files, and every tenth."""
    texts: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if sum(map(len, texts)) < limit:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    return [text for index, text in enumerate(texts) if index % 10 != 9], texts[9::10]


def missing(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("the model of its own")
    own.add_argument("--cache", type=Path, default=Path("lesson-model"), help="where it is kept (default %(default)s)")
    own.add_argument("--width", type=int, default=128)
    own.add_argument("--layers", type=int, default=3)
    own.add_argument("--float-steps", type=int, default=500)
    own.add_argument("--limit-text", type=int, default=4_000_000, help="characters of the standard library")
    parser.add_argument("--model", type=Path, help="a folder written by transformers, instead; needs --text")
    parser.add_argument("--text", type=Path, help="a text file, instead of the standard library")
    parser.add_argument("--scheme", default="w2a16", help="a preset (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=512, help="windows to calibrate on")
    parser.add_argument("--test-windows", type=int, default=256, help="held-out windows to measure on, at most")
    parser.add_argument("--window", type=int, default=128, help="tokens in a window")
    parser.add_argument("--batch", type=int, default=8, help="windows in a batch")
    parser.add_argument("--answer", type=int, default=4, help="tokens that an exact match takes")
    parser.add_argument("--tolerance", type=float, default=1.0, help="percent that may be lost")
    parser.add_argument("--blame", type=float, default=0.5, help="share of the costs that the trained layers make up")
    parser.add_argument("--steps", type=int, default=100, help="of QAT")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of QAT")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.model and not (args.model / "config.json").is_file():
        missing(f"no model: {args.model / 'config.json'} does not exist")
    if args.model and not args.text:
        missing("no text: --model needs --text FILE, to calibrate, train and measure on")
    if args.text and not args.text.is_file():
        missing(f"no text: {args.text} does not exist")
    if not 0 < args.answer < args.window // 2:
        parser.error(f"--answer {args.answer}: from 1 to less than half of --window {args.window}")
    if not 0 < args.blame <= 1:
        parser.error(f"--blame {args.blame}: a share, above 0 and at most 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    Lesson(args).run()


if __name__ == "__main__":
    main()
