"""A step of quantization-aware training against the same step in float: time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/qat_step.py --threads 1 --json out.json     # ResNet-20 and SmolLM2-135M: five minutes
    python benchmarks/qat_step.py --only resnet --method lsq --recipe w4a4
    python benchmarks/qat_step.py --only lm --model FOLDER     # any causal language model as transformers saves it
    python benchmarks/qat_step.py --quick                      # does it run?

A step is forward, backward and optimizer, with observers on. The float and the quantized model take turns, step by step and in
both orders, in one process; a ratio is that of one turn, and what is printed are medians. CPU seconds are all threads' and mean
something on a machine that others use, too; seconds by the clock do only on an idle one.

Memory is measured in a process of its own for each model: the peak of what torch has allocated for tensors, weights included, and
the peak of the process's resident memory over what it had before the model was made. Inputs are random. Without --model the
language model has SmolLM2-135M's sizes and random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT, HERE = Path(__file__).resolve().parents[1], str(Path(__file__).resolve().parent)
sys.path[:] = [HERE, str(ROOT / "examples"), *(path for path in sys.path if path != HERE)]

import timing  # noqa: E402
from cifar10 import ResNet20  # noqa: E402

sys.path.remove(HERE)  # kernels.py has the name of a package that transformers looks for

import lightning_quant as lq  # noqa: E402
from lightning_quant.calibration import drop_weights, keep_weights, set_flags  # noqa: E402
from lightning_quant.methods import METHODS  # noqa: E402
from lightning_quant.report import table  # noqa: E402

RECIPES = {"resnet": "w8a8", "lm": "w4a8-dynamic"}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = {**SMOLLM2, "vocab_size": 512, "hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 2}

Step = Callable[[], Any]


def resnet(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    images, labels = torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    return ResNet20(), lambda model: nn.functional.cross_entropy(model(images), labels)


def language_model(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    model: Any
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(**(TINY if args.quick else SMOLLM2)))
    ids = torch.randint(model.config.vocab_size, (1, args.tokens))
    return model.train(), lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


PARTS = {"resnet": resnet, "lm": language_model}


def make_step(part: str, kind: str, args: argparse.Namespace) -> Step:
    """One step of a part's model: `kind` is float or QAT."""
    torch.manual_seed(0)
    model, loss = PARTS[part](args)
    if kind == "QAT":
        lq.prepare(model, args.recipe or RECIPES[part], method=args.method)
        set_flags(model, observing=True, following=True, quantizing=True)
    if args.compile:
        model.compile()
    optimizer: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[args.optimizer](model.parameters(), lr=1e-4)

    keep_weights(model, kind == "QAT")  # as QATCallback does

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(args.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                found = loss(model)
            found.backward()
        drop_weights(model)
        optimizer.step()

    return step


def step_times(part: str, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of each step: clock -> kind -> one a turn."""
    calls = {kind: make_step(part, kind, args) for kind in ("float", "QAT")}
    times: dict[str, dict[str, list[float]]] = {clock: {kind: [] for kind in calls} for clock in ("CPU", "wall")}
    for turn in range(args.warmup + args.rounds):
        for kind in list(calls)[:: 1 - 2 * (turn % 2)]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[kind]()
            if turn >= args.warmup:
                times["CPU"][kind].append(time.process_time() - cpu)
                times["wall"][kind].append(time.perf_counter() - wall)
    return times


def status(key: str) -> int:
    """Bytes of this process, by the kernel's name for them; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def steps(part: str, kind: str, args: argparse.Namespace) -> None:
    step = make_step(part, kind, args)
    for _ in range(3):
        step()


def peak_memory(part: str, kind: str, args: argparse.Namespace) -> dict[str, int]:
    """Peaks of this process, in bytes: resident, and what tensors have."""
    before = status("VmRSS")
    steps(part, kind, args)
    resident = status("VmHWM") - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steps(part, kind, args)
    now = peak = 0
    found: Any = profile.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"tensors": peak, "resident": resident}


def in_child(part: str, kind: str, given: Sequence[str]) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--only", part, "--child", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} {kind}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(part: str, args: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    memory = {} if args.no_memory else {kind: in_child(part, kind, given) for kind in ("float", "QAT")}
    times = step_times(part, args)
    ratios = {}
    for clock, found in times.items():
        pairs = [own / by for own, by in zip(found["QAT"], found["float"], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
        ratios[clock] = {"median": middle, "quartiles": [low, high]}
    seconds = {clock: timing.medians(found) for clock, found in times.items()}
    rows = [
        (f"{clock} seconds", *(f"{seconds[clock][kind]:.3f}" for kind in ("float", "QAT")), f"{ratios[clock]['median']:.3f}")
        for clock in times
    ]
    for what in memory.get("float", {}):
        sizes = [memory[kind][what] for kind in ("float", "QAT")]
        rows.append((f"peak MB, {what}", *(f"{size / 1e6:.1f}" for size in sizes), f"{sizes[1] / max(sizes[0], 1):.3f}"))
    print(f"\n{part} {args.recipe or RECIPES[part]} {args.method}\n{table(('', 'float', 'QAT', 'ratio'), rows)}", flush=True)
    return {"part": part, "seconds": seconds, "ratios": ratios, "memory": memory, "all": times}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", choices=PARTS, help="default: both")
    found.add_argument("--model", type=Path, help="a folder of a causal language model")
    found.add_argument("--recipe", help=f"default {RECIPES}")
    found.add_argument("--method", choices=list(METHODS), default="ste")
    found.add_argument("--batch", type=int, default=128, help="images (default %(default)s)")
    found.add_argument("--tokens", type=int, default=256, help="in one row (default %(default)s)")
    found.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default %(default)s: has no state of its own")
    found.add_argument("--accumulate", type=int, default=1, help="forward and backward passes in a step (default %(default)s)")
    found.add_argument("--bf16", action="store_true", help="under autocast")
    found.add_argument("--compile", action="store_true", help="both models with torch.compile")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--rounds", type=int, default=15, help="timed steps of each (default %(default)s)")
    found.add_argument("--warmup", type=int, default=2, help="steps of each before (default %(default)s)")
    found.add_argument("--no-memory", action="store_true")
    found.add_argument("--quick", action="store_true", help="two steps of small models")
    found.add_argument("--json", type=Path, help="a file to write every time measured to")
    found.add_argument("--child", choices=("float", "QAT"), help=argparse.SUPPRESS)
    return found


def main(given: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if given is None else given)
    args = parser().parse_args(given)
    warnings.filterwarnings("ignore")
    if args.quick:
        args.rounds, args.warmup, args.batch, args.tokens = 2, 1, min(args.batch, 4), min(args.tokens, 16)
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(peak_memory(args.only, args.child, args)))
        return
    about = timing.machine(args.threads)
    print(timing.describe(about))
    results = [run_part(part, args, given) for part in PARTS if args.only in (None, part)]
    timing.write_json(
        args.json, {"machine": about, "settings": {key: str(value) for key, value in vars(args).items()}, "results": results}
    )


if __name__ == "__main__":
    main()
