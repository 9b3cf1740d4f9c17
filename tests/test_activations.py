from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_quant as lq
from lightning_quant import sequential
from lightning_quant.activations import (
    Activations,
    Budget,
    Calls,
    Pool,
    Ref,
    available_memory,
    checksum,
    flatten_call,
    format_bytes,
    parse_bytes,
)
from tests.chains import make
from tests.helpers import assert_same_state, thinned


def test_values_come_back_to_the_bit_from_memory_and_from_files(tmp_path: Path) -> None:
    values = [torch.randn(5, 7).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    values += [torch.randn(6, 8).t(), torch.randn(4, 6)[:, 1:3], torch.randn(1, 5).expand(3, 5), torch.tensor([True, False])]
    values += [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(0, 3), torch.tensor(2.5)]
    with Budget(0, tmp_path) as none, Budget(10**6) as plenty:
        files, memory = Activations(none), Activations(plenty)
        for value in values:
            files.append(value)
            memory.append(value)
        assert files.spilled == sum(value.numel() > 0 for value in values)
        assert memory.spilled == 0
        for value, one, two in zip(values, files, memory, strict=True):
            assert torch.equal(one, value)
            assert torch.equal(two, value)
            assert one.stride() == two.stride()  # how sums are rounded depends on it
            if value.is_contiguous(memory_format=torch.channels_last) and value.dim() == 4:
                assert one.stride() == value.stride()


def test_a_view_does_not_keep_the_whole() -> None:
    with Budget(10**6) as budget:
        kept = Activations(budget)
        kept.append(torch.randn(1000, 10)[3])
        assert budget.used == 40
        assert kept[0].untyped_storage().nbytes() == 40


def test_the_budget_is_never_exceeded_and_is_given_back(tmp_path: Path) -> None:
    budget = Budget(100, tmp_path)
    one, two = Activations(budget), Activations(budget)
    for index in range(6):
        (one, two)[index % 2].append(torch.full((10,), float(index)))
        assert budget.used <= 100
    assert (budget.used, one.spilled + two.spilled) == (80, 4)
    one[0] = torch.full((3,), 9.0)  # smaller: its place is given back
    assert budget.used == 52
    two[2] = torch.zeros(10)  # from a file into memory
    assert (budget.used, one[0].tolist(), [value[0].item() for value in two]) == (92, [9.0] * 3, [1.0, 3.0, 0.0])
    assert len(list(tmp_path.rglob("*.pt"))) == one.spilled + two.spilled == 3
    two.clear()
    one.clear()
    assert budget.used == 0
    assert not list(tmp_path.rglob("*.pt"))
    assert budget.largest == 92
    budget.close()
    assert not list(tmp_path.iterdir())


def test_files_are_gone_also_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with Budget(0, tmp_path) as budget:
            kept = Activations(budget)
            kept.append(torch.ones(4))
            assert list(tmp_path.rglob("*.pt"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


def test_budgets_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    with Budget(0, tmp_path) as one, Budget(0, tmp_path) as two:
        first, second = Activations(one), Activations(two)
        first.append(torch.zeros(3))
        second.append(torch.ones(3))
        assert (first[0].sum(), second[0].sum()) == (0, 3)


def test_a_pool_keeps_a_tensor_once(tmp_path: Path) -> None:
    mask = torch.tril(torch.ones(6, 6))
    for limit in (0, 10**6):
        with Budget(limit, tmp_path) as budget:
            pool = Pool(budget)
            refs = [pool.put(value) for value in (mask, mask.clone(), mask + 1, mask.bool(), mask.reshape(36))]
            assert refs == [Ref(0), Ref(0), Ref(1), Ref(2), Ref(3)]
            assert torch.equal(pool.get(refs[1]), mask)
            assert pool.get("other") == "other"
            mask_before = mask.clone()
            mask += 5  # the model goes on with its own
            assert torch.equal(pool.get(refs[0]), mask_before)
            mask -= 5


def test_tensors_that_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_quant.activations.checksum", lambda tensor, start=0: 1)
    pool = Pool(Budget())
    assert [pool.put(torch.tensor([value])) for value in (1.0, 2.0, 1.0)] == [Ref(0), Ref(1), Ref(0)]


def test_checksums_tell_shapes_types_and_values() -> None:
    x = torch.arange(6.0)
    sums = [checksum(value) for value in (x, x.view(2, 3), x.double(), x.flip(0), x.bfloat16(), torch.zeros(0))]
    assert len(set(sums)) == 6
    assert checksum(x.view(2, 3).t().contiguous().t()) == sums[1]


def test_calls_are_put_together_again() -> None:
    class Cache:
        pass

    x, mask = torch.randn(2, 3), torch.ones(3)
    leaves, spec = flatten_call((x, {"mask": mask, "flag": True}), {"cache": Cache(), "also": x})
    assert not any(isinstance(leaf, Cache) for leaf in leaves)  # it would grow with every replay
    budget = Budget()
    hidden, pool = Activations(budget), Pool(budget)
    hidden.append(x)
    slots = tuple(slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == x.shape)
    rest = [pool.put(leaf) if isinstance(leaf, Tensor) and leaf.shape != x.shape else leaf for leaf in leaves]
    calls = Calls(hidden, [rest], [spec], slots, pool)
    args, kwargs = calls[0]
    assert torch.equal(args[1]["mask"], mask)
    assert args[1]["flag"] is True
    assert kwargs["cache"] is None
    assert args[0] is kwargs["also"]
    args[0].zero_()  # a block may write into its input
    assert torch.equal(calls[0][0][0], x)
    assert torch.equal(calls.with_hidden(0, x + 1)[0][0], x + 1)


def test_bytes_as_text() -> None:
    assert [parse_bytes(value) for value in (None, 0, 5, "5", "1 kB", "1.5MB", "2 GiB")] == [
        *(None, 0, 5, 5, 1000, 1_500_000, 2 * 2**30)
    ]
    for value in ("", "MB", "-1 MB", "1 XB", 1.5, True, -3, [1]):
        with pytest.raises(ValueError, match="memory_budget="):
            parse_bytes(value)  # type: ignore[arg-type]
    assert [format_bytes(value) for value in (0, 999, 1000, 2.5e6, 7e9, 3e12)] == [
        *("0 B", "999 B", "1.0 kB", "2.5 MB", "7.0 GB", "3.0 TB")
    ]
    assert available_memory() is None or available_memory() > 10**6


# --- whole runs -----------------------------------------------------------------------------------------------------

RECIPES = {
    "gptq": lq.Recipe("w4a16", group_size=8, algorithms=["gptq"]),
    "smoothquant": lq.Recipe("w8a8", algorithms=["smoothquant"]),
    "autoround": lq.Recipe("w4a16", group_size=8, algorithms=["autoround"], algorithm_options={"autoround": {"iterations": 3}}),
}


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[Budget]:
    """Those that runs have made; each of them checks that it keeps to its limit."""
    made: list[Budget] = []

    class Watched(Budget):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.files = 0
            made.append(self)

        def new_file(self) -> Path:
            assert self.used <= self.limit
            self.files += 1
            return super().new_file()

    monkeypatch.setattr(sequential, "Budget", Watched)
    return made


@pytest.mark.parametrize(("name", "recipe"), thinned(["llama", "t5", "resnet", "gemma"], RECIPES, of=3))
def test_a_small_budget_gives_the_same_to_the_bit(
    name: str, recipe: str, budgets: list[Budget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches = make(name)
    states = []
    for limit in (None, 20_000 if name == "resnet" else 2500, "0 MB"):
        states.append(lq.quantize(model, RECIPES[recipe], batches, memory_budget=limit).state_dict())
        assert_same_state(states[-1], states[0])
        assert budgets[-1].used == 0
        assert budgets[-1].largest <= budgets[-1].limit
    assert [bool(budget.files) for budget in budgets] == [False, True, True]
    assert budgets[1].largest > 0
    assert not list(tmp_path.iterdir())


def test_files_of_a_run_that_fails_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches = make("llama")
    seen: list[bool] = []

    def fail(*args: Any) -> None:
        seen.append(any(tmp_path.rglob("*.pt")))
        raise RuntimeError("stop")

    monkeypatch.setattr(sequential._Step, "apply", fail)
    for folder in (None, tmp_path / "work"):
        with pytest.raises(RuntimeError, match="stop"):
            lq.quantize(model, RECIPES["gptq"], batches, memory_budget=0, work_dir=folder)
    assert seen == [True, True]
    assert {path.name for path in tmp_path.rglob("*")} <= {"work", "run.json", ".lock"}


@pytest.mark.slow
def test_the_process_stays_small(tmp_path: Path) -> None:
    """The largest size of a process with and without a budget, from the kernel."""
    import subprocess
    import sys

    code = (
        "import sys, torch, lightning_quant as lq\n"
        "from pathlib import Path\n"
        "from tests.chains import Block, Loop, plain\n"
        "torch.set_num_threads(1)\n"
        "torch.manual_seed(0)\n"
        "model = Loop(Block, plain)\n"
        "batches = [torch.randn(20_000, 16) for _ in range(100)]\n"  # 1.28 MB each
        "limit = None if sys.argv[1] == 'None' else sys.argv[1]\n"
        "recipe = lq.Recipe('w4a16', group_size=8, algorithms=['gptq'])\n"
        "status = lambda: next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in l)\n"
        "lq.quantize(model, recipe, batches[:2])\n"
        "before = status()\n"
        "lq.quantize(model, recipe, batches, memory_budget=limit)\n"
        "print((status() - before) / 1000)\n"
    )
    added = {}
    for limit in ("None", "10 MB"):
        done = subprocess.run([sys.executable, "-c", code, limit], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        added[limit] = float(done.stdout)
    assert added["None"] > 100  # 100 batches of 1.28 MB
    assert added["10 MB"] < 40
