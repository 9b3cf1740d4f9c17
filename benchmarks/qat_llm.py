"""QAT of a small language model with its float self as the teacher: how much of what rounding loses does it bring back?

    python benchmarks/qat_llm.py --data DATA --model FOLDER --json out.json --plot out.png
    python benchmarks/qat_llm.py --data DATA --model FOLDER --json out.json --only "w2a16"    # rows in the file are not run again

FOLDER holds a causal language model as transformers saves it, DATA `wikitext-2/valid.txt`. Weights have asymmetric groups of 64;
all linear layers but the head are quantized. Training: windows of the text past token 100,000, in bfloat16
(`precision="bf16-mixed"`), by AdamW. Evaluation: the packed model's perplexity on the first 32 windows of 512 tokens.

"nearest" rounds and does not train. "start" is where QAT starts: what PTQ (`ALGORITHMS`) makes of `--calibration` windows of the
text that it trains on, whose scales learn from there (method "lsq"); or with `--from nearest` the rounded weights, whose ranges
follow them (method "ste"). `--starts` keeps PTQ's models in a folder, for another run on the same text: a row "start" that is
measured then has the time of loading it. "float, trained on" is the model trained in float on the same tokens for the same steps at
the same rate: what the training alone is worth. Recovery is (nearest - QAT) / (nearest - reference), against the float start and
this one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [HERE, *(path for path in sys.path if path != HERE)]

import timing  # noqa: E402
from ptq_llm import WINDOW, forget_peak, perplexity, status  # noqa: E402

sys.path.remove(HERE)  # kernels.py has the name of a package that transformers looks for

import lightning_quant as lq  # noqa: E402
from lightning_quant.report import table  # noqa: E402

TRAIN_FROM = 100_000
# where bars end that would be longer
MOST = 30.0


class Setting(NamedTuple):
    """Args:
    lr: the highest learning rate of weights; what is farther from float may move farther.
    iterations: of AutoRound, for PTQ's start.
    """

    lr: float
    iterations: int


SCHEMES = {
    "w4a16": Setting(3e-5, 200),
    "w3a16": Setting(1e-4, 100),
    "w4a8-dynamic": Setting(3e-5, 50),
    "w2a16": Setting(1e-4, 200),
}
ALGORITHMS = ["awq", "autoround"]
FLOAT, TRAINED, NEAREST, START, QAT = "float", "float, trained on", "nearest", "start", "QAT"
Row = dict[str, Any]


def setting(args: argparse.Namespace, scheme: str) -> Setting:
    """A scheme's, unless the command line says otherwise."""
    return Setting(args.lr or SCHEMES[scheme].lr, args.iterations or SCHEMES[scheme].iterations)


class Experiment:
    """The text, the float start, and how each row is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args, self.tokenizer = args, AutoTokenizer.from_pretrained(args.model)
        self.text = args.data / "wikitext-2" / "valid.txt"
        self.started: dict[str, Any] = {}
        self.ids = self.tokenizer(self.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]

    def module(self, lr: float = 0.0) -> lq.CausalLMModule:
        from transformers import AutoModelForCausalLM

        L.seed_everything(self.args.seed, verbose=False)
        model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).train()
        if self.args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return lq.CausalLMModule(model, lr=lr, warmup=0.1)

    def recipe(self, scheme: str) -> lq.Recipe:
        return lq.Recipe(scheme, group_size=64, symmetric=False)

    def fit(self, module: lq.CausalLMModule, callbacks: list[L.Callback]) -> lq.Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        options = {"max_steps": self.args.steps, "enable_progress_bar": False, "accelerator": "cpu", "gradient_clip_val": 1.0}
        trainer = lq.Trainer(callbacks=callbacks, precision="bf16-mixed", **options, **quiet)
        windows: dict[str, Any] = {"window": self.args.length, "batch_size": self.args.batch, "train_range": (TRAIN_FROM, None)}
        trainer.fit(module, datamodule=lq.TextDataModule(self.tokenizer, self.text, **windows))
        return trainer

    def perplexity(self, module: Any) -> float:
        return perplexity(module.model.eval(), self.ids, self.args.windows)

    def trained_on(self, scheme: str) -> float:
        module = self.module(setting(self.args, scheme).lr)
        self.fit(module, [])
        return self.perplexity(module)

    def nearest(self, scheme: str) -> float:
        return self.perplexity(lq.quantize(self.module(), self.recipe(scheme)))

    def start(self, scheme: str) -> Any:
        """The packed model that QAT starts from; kept until it is trained."""
        if scheme in self.started:
            return self.started[scheme]
        folder = None
        if self.args.starts is not None:
            made_by = f"{self.args.calibration}-{setting(self.args, scheme).iterations}"
            folder = self.args.starts / f"{self.args.model.name}-{scheme}-{made_by}"
        module = self.module(setting(self.args, scheme).lr)
        if folder is not None and folder.exists():
            made = lq.load_quantized(module, folder)
        else:
            # what awq cannot hand to another layer would stay beside the weights, and such layers cannot be trained on
            options = {"awq": {"explicit": False}, "autoround": {"iterations": setting(self.args, scheme).iterations}}
            recipe = lq.Recipe(self.recipe(scheme).scheme, algorithms=ALGORITHMS, algorithm_options=options)
            starts = range(TRAIN_FROM, TRAIN_FROM + self.args.calibration * WINDOW, WINDOW)
            batches = [{"input_ids": self.ids[None, start : start + WINDOW]} for start in starts]
            made = lq.quantize(module, recipe, batches, calibration_batches=len(batches), progress=False)
            if folder is not None:
                lq.save_quantized(made, folder)
        self.started = {scheme: made}
        return made

    def qat(self, scheme: str) -> float:
        module, method, rates = self.module(setting(self.args, scheme).lr), "ste", None
        teacher = None
        if self.args.begin == "ptq":
            teacher, module, method, rates = module, lq.unpack(self.start(scheme), method="lsq"), "lsq", 0.1
            self.started = {}
        distill = lq.DistillationCallback(teacher, alpha=self.args.alpha, temperature=self.args.temperature)
        trainer = self.fit(module, [lq.QATCallback(self.recipe(scheme), method=method, scale_lr=rates), distill])
        return self.perplexity(trainer.quantize())


class Rows:
    """What is measured: kept in a file as it comes, and found there again.

    Args:
        args: the command line's.
        rows: of the file.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[Row] = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []

    def settings(self, scheme: str, kind: str) -> Row:
        """What a row depends on, besides its scheme and kind; of the float model trained on, the scheme gives the rate."""
        always: Row = {"model": self.args.model.name, "windows": self.args.windows}
        if kind in (FLOAT, NEAREST):
            return always
        if kind in (START, QAT):
            always["from"] = self.args.begin
            ptq = {"calibration": self.args.calibration, "iterations": setting(self.args, scheme).iterations}
            always |= ptq if self.args.begin == "ptq" else {}
        if kind == START:
            return always
        trained = {key: getattr(self.args, key) for key in ("steps", "batch", "length", "seed")}
        trained["lr"] = setting(self.args, scheme).lr
        taught = {"alpha": self.args.alpha, "temperature": self.args.temperature} if kind == QAT else {}
        return {**always, **trained, **taught}

    def model(self, scheme: str, kind: str) -> str:
        return FLOAT if kind in (FLOAT, TRAINED) else scheme

    def find(self, scheme: str, kind: str) -> float | None:
        wanted = {"scheme": self.model(scheme, kind), "kind": kind, **self.settings(scheme, kind)}
        return next((row["perplexity"] for row in self.rows if wanted.items() <= row.items()), None)

    def measure(self, scheme: str, kind: str, make: Callable[[], float]) -> None:
        if self.find(scheme, kind) is not None:
            return
        before, wall, cpu = forget_peak(), time.perf_counter(), time.process_time()
        found = make()
        seconds, own = time.perf_counter() - wall, time.process_time() - cpu
        added = status("VmHWM") - before
        row = {"scheme": self.model(scheme, kind), "kind": kind, **self.settings(scheme, kind), "perplexity": found}
        self.rows.append({**row, "seconds": seconds, "cpu_seconds": own, "added_mb": added})
        print(f"{scheme:<14}{kind:<19}{found:>12.3f}{own:>8.0f} CPU s{added:>8.0f} MB added to the peak", flush=True)
        timing.write_json(self.args.json, {"machine": timing.machine(self.args.threads), "rows": self.rows})

    def recovered(self, scheme: str, reference: str) -> float | None:
        """The share of nearest's loss against a float reference that QAT brings back; None: a row is not there."""
        rounded, trained, exact = (self.find(scheme, kind) for kind in (NEAREST, QAT, reference))
        if rounded is None or trained is None or exact is None:
            return None
        return (rounded - trained) / (rounded - exact)

    def table(self) -> str:
        def shown(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        header = ("scheme", NEAREST, START, QAT, TRAINED, "recovered, of the float start", "of float trained on", "times float")
        start = self.find(FLOAT, FLOAT)
        cells = []
        for scheme in SCHEMES:
            found = self.find(scheme, QAT)
            ratio = None if found is None or start is None else found / start
            shares = [shown(self.recovered(scheme, reference), ".1%") for reference in (FLOAT, TRAINED)]
            values = [shown(self.find(scheme, kind), ",.3f") for kind in (NEAREST, START, QAT, TRAINED)]
            cells.append((scheme, *values, *shares, shown(ratio, ".2f")))
        return f"float {shown(start, '.3f')}\n{table(header, cells)}"


def draw(figure: Any, rows: Rows) -> None:
    """Perplexities, a group of bars for each scheme, and float's as a line."""
    axes = figure.subplots()
    schemes = [scheme for scheme in SCHEMES if rows.find(scheme, NEAREST) is not None]
    kinds = ((-0.3, NEAREST, "tab:gray"), (-0.1, START, "tab:orange"), (0.1, QAT, "tab:blue"), (0.3, TRAINED, "lightgray"))
    for shift, kind, color in kinds:
        found = [(index, rows.find(scheme, kind)) for index, scheme in enumerate(schemes)]
        known = [(index + shift, value) for index, value in found if value is not None]
        if known:
            bars = axes.bar([x for x, _ in known], [min(value, MOST) for _, value in known], 0.2, label=kind, color=color)
            axes.bar_label(bars, labels=[f"{value:,.{1 if value < 1000 else 0}f}" for _, value in known], fontsize=7)
    value = rows.find(FLOAT, FLOAT)
    if value is not None:
        axes.axhline(value, color="black", linewidth=0.8, label=f"float: {value:.2f}")
    axes.set(ylabel="perplexity", ylim=(0, 1.1 * MOST), xticks=range(len(schemes)), xticklabels=schemes)
    axes.legend()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LQ_DATA"), help="the data's folder; default: LQ_DATA")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window of training")
    parser.add_argument("--lr", type=float, help="highest learning rate of weights; default: SCHEMES")
    parser.add_argument("--alpha", type=float, default=1.0, help="the teacher's share of the loss")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--from", dest="begin", choices=("ptq", "nearest"), default="ptq", help="where QAT starts")
    parser.add_argument("--iterations", type=int, help="of AutoRound, for PTQ's start; default: SCHEMES")
    parser.add_argument("--starts", type=Path, help="a folder for what PTQ has made; what is there is not made again")
    parser.add_argument("--windows", type=int, default=32, help="of evaluation")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens that algorithms of PTQ see")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks' activations in the backward pass: less memory"
    )
    parser.add_argument("--only", default="", help="schemes whose name this regular expression is in, and 'float'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="a file to write results to as they come; rows that it has are not run again")
    parser.add_argument("--plot", type=Path, help="a picture to write; needs matplotlib")
    args = parser.parse_args(argv)
    if args.data is None or not (args.data / "wikitext-2" / "valid.txt").is_file():
        parser.error("no data: --data (or LQ_DATA) names a folder with wikitext-2/valid.txt")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    experiment, rows = Experiment(args), Rows(args)
    rows.measure(FLOAT, FLOAT, lambda: experiment.perplexity(experiment.module()))
    for scheme in SCHEMES:
        if re.search(args.only, scheme):
            rows.measure(scheme, NEAREST, lambda scheme=scheme: experiment.nearest(scheme))
            if args.begin == "ptq":
                rows.measure(scheme, START, lambda scheme=scheme: experiment.perplexity(experiment.start(scheme)))
                if rows.find(scheme, QAT) is None:
                    experiment.start(scheme)  # its time and memory are not QAT's
            rows.measure(scheme, QAT, lambda scheme=scheme: experiment.qat(scheme))
    for scheme in SCHEMES:
        if re.search(args.only, FLOAT):
            rows.measure(scheme, TRAINED, lambda scheme=scheme: experiment.trained_on(scheme))
    print(rows.table())
    timing.figure(args.plot, lambda figure: draw(figure, rows), (7.0, 4.5))


if __name__ == "__main__":
    main()
