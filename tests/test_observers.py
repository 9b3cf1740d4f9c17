from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_quant.kernels import native
from lightning_quant.kernels.native import fake
from lightning_quant.numerics import calc_qparams, dequantize_rows, qrange, quantize_rows, to_groups
from lightning_quant.observers import OBSERVERS, Observer, make_observer
from lightning_quant.spec import QuantSpec
from tests.helpers import assert_same, spec_id

SPECS = [
    QuantSpec(8, symmetric=False, granularity="tensor"),
    QuantSpec(4, granularity="tensor"),
    QuantSpec(3, symmetric=False),
    QuantSpec(4, signed=False, granularity="tensor"),
    QuantSpec(8, "float8_e4m3fn"),
]
ORDER_DEPENDENT = {"moving_average"}
EXACT = [name for name in OBSERVERS if name not in ORDER_DEPENDENT]
CLIPPING = ["percentile", "mse", "kl"]
REDUCE = {"min": torch.amin, "max": torch.amax, "sum": torch.sum, "mean": torch.mean}


def rows(spec: QuantSpec, columns: int = 600, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if spec.granularity == "tensor" else 3
    return torch.randn(groups, columns, generator=generator) * torch.tensor([1.0, 30.0, 1e-3])[:groups, None] + 0.1


def fed(name: str, spec: QuantSpec, batches: list[Tensor]) -> Observer:
    observer = make_observer(name, spec, batches[0].shape[0])
    for batch in batches:
        observer.update(batch)
    return observer


def error(x: Tensor, found: tuple[Tensor, Tensor], spec: QuantSpec) -> Tensor:
    qparams = calc_qparams(*found, spec)
    return (dequantize_rows(quantize_rows(x, *qparams, spec), *qparams, spec) - x).square().mean(1)


def reduced(observers: list[Observer]) -> None:
    """Run `all_reduce` on every observer at once, each a rank in a thread of its own."""
    barrier, slots = threading.Barrier(len(observers)), [torch.empty(0)] * len(observers)
    failures: list[BaseException] = []

    def reducer(rank: int) -> Callable[[Tensor, str], None]:
        def reduce(tensor: Tensor, op: str) -> None:
            slots[rank] = tensor.clone()
            barrier.wait(10)
            merged = REDUCE[op](torch.stack(slots), dim=0)
            barrier.wait(10)
            tensor.copy_(merged)

        return reduce

    def run(rank: int) -> None:
        try:
            observers[rank].all_reduce(reducer(rank))
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(observers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_the_table_holds_the_designs_observers():
    assert {"minmax", "moving_average", "percentile", "mse", "kl"} <= set(OBSERVERS)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", OBSERVERS)
def test_state_is_bounded_and_the_range_usable(name, spec):
    observer = make_observer(name, spec, rows(spec).shape[0])
    assert not observer.has_data
    before = {key: (value.shape, value.dtype) for key, value in observer.state_dict().items()}
    for seed in range(30):
        observer.update(rows(spec, 50, seed) * 2.0 ** (seed % 7))
    assert {key: (value.shape, value.dtype) for key, value in observer.state_dict().items()} == before
    assert set(before) >= set(observer.reductions)
    assert observer.has_data
    low, high = observer.range()
    assert (low < high).all()
    scale, _ = calc_qparams(low, high, spec)
    assert scale.shape == (rows(spec).shape[0],)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", EXACT)
def test_batches_do_not_matter(name, spec):
    x = rows(spec)
    whole = fed(name, spec, [x])
    split = fed(name, spec, list(x.split([1, 99, 250, 250], dim=1)))
    backwards = fed(name, spec, list(x.split(150, dim=1))[::-1])
    for other in (split, backwards):
        assert_same(other.state_dict(), whole.state_dict())
        assert_same(other.range(), whole.range())


def test_a_moving_average_is_one():
    spec = QuantSpec(8, granularity="tensor")
    observer = make_observer("moving_average", spec, 1, {"momentum": 0.25})
    for batch in ([[-1.0, 2.0]], [[-3.0, 6.0]], [[-3.0, 3.0]]):
        observer.update(torch.tensor(batch))
    assert [bound.item() for bound in observer.range()] == [-1.875, 3.0]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", EXACT)
def test_ranks_merge_to_what_one_would_have_seen(name, spec):
    small, large = rows(spec, seed=1), rows(spec, seed=2) * 37  # so that the histograms' widths differ
    ranks = [fed(name, spec, [small]), fed(name, spec, [large])]
    reduced(ranks)
    alone = fed(name, spec, [small, large])
    for rank in ranks:
        assert_same(rank.state_dict(), alone.state_dict())
        assert_same(rank.range(), alone.range())


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_rank_without_data_does_not_spoil_the_others(name):
    spec = QuantSpec(8, symmetric=False, granularity="tensor")
    x = rows(spec)
    ranks = [fed(name, spec, [x]), make_observer(name, spec, 1)]
    reduced(ranks)
    for rank in ranks:
        assert rank.has_data
        assert_same(rank.range(), fed(name, spec, [x]).range())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", OBSERVERS)
def test_nan_and_inf_raise_and_leave_the_state(name, bad):
    spec = QuantSpec(8, granularity="tensor")
    observer = fed(name, spec, [rows(spec)])
    before = {key: value.clone() for key, value in observer.state_dict().items()}
    spoilt = rows(spec)
    spoilt[0, :2] = bad
    with pytest.raises(ValueError, match="2 of 600 values are nan or inf"):
        observer.update(spoilt)
    assert_same(observer.state_dict(), before)
    with pytest.raises(ValueError, match="2 of 600 values are nan or inf"):
        observer.measure(spoilt, partial(torch.ones_like, spoilt))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", OBSERVERS)
def test_reset(name, spec):
    x = rows(spec)
    observer = fed(name, spec, [x * 1000])
    observer.reset()
    assert not observer.has_data
    observer.update(x)
    assert_same(observer.state_dict(), fed(name, spec, [x]).state_dict())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CLIPPING)
def test_an_outlier_is_clipped(name, symmetric):
    spec = QuantSpec(4, symmetric=symmetric, granularity="tensor")
    x = rows(spec, 40000)
    x[0, 123] = 40.0
    for low, high in (fed(name, spec, [x]).range(), make_observer(name, spec, 1).measure(x, partial(torch.ones_like, x))):
        largest = torch.maximum(-low, high) if symmetric else high
        assert 2 < largest.item() < 20


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_mse_is_never_worse_than_minmax(spec):
    x = rows(spec, 2000)
    x[:, 0] *= 20
    best = error(x, make_observer("mse", spec, x.shape[0]).measure(x, partial(torch.ones_like, x)), spec)
    whole = error(x, (x.amin(1), x.amax(1)), spec)
    streamed = error(x, fed("mse", spec, list(x.split(500, 1))).range(), spec)
    assert (best <= whole).all()
    assert (streamed <= whole * 1.001).all()
    if spec == SPECS[1]:
        assert (best < whole / 2).all()


@pytest.mark.skipif(native.library() is None, reason="needs the C library")
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 5000), (15, 33), (16, 33), (400, 64)], ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.is_int], ids=spec_id)
def test_mse_search_in_c_finds_what_torch_finds(spec, shape, monkeypatch):
    x = torch.randn(*shape) * torch.rand(shape[0], 1) * 3
    x[shape[0] // 2] = 0
    counts = torch.randint(0, 5, shape)
    observer = make_observer("mse", spec, shape[0])
    ranges = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("LQ_BACKEND", backend)
        ranges.append(observer.measure(x, lambda: counts))
        assert (fake.search(x, counts.float(), *ranges[-1], spec, [0.5]) is None) == (backend == "reference")
    errors = [observer._error(x, counts, *found) for found in ranges]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
    equal = [one == two for one, two in zip(*ranges, strict=True)]  # of errors that are equal but for rounding either is right
    assert torch.stack(equal).float().mean() > 0.99


def test_percentile_counts():
    spec = QuantSpec(8, symmetric=False, granularity="tensor")
    x = torch.arange(1, 1001.0)[None]
    low, high = make_observer("percentile", spec, 1, {"percentile": 99}).measure(x, partial(torch.ones_like, x))
    assert (low.item(), high.item()) == (11, 990)
    low, high = make_observer("percentile", spec, 1, {"percentile": 100}).measure(x, partial(torch.ones_like, x))
    assert (low.item(), high.item()) == (1, 1000)


def assert_streaming_agrees(name: str, spec: QuantSpec, x: Tensor, tolerance: Tensor) -> None:
    streamed = fed(name, spec, [x]).range()
    observer = make_observer(name, spec, x.shape[0])
    measured = observer.measure(x, partial(torch.ones_like, x))
    assert not observer.has_data
    if name == "mse":
        tolerance = tolerance + 0.02 * x.abs().amax(1)  # a search may stop at a neighbouring step of its grid
        assert (error(x, streamed, spec) <= error(x, measured, spec) * 1.01).all()
    for one, two in zip(streamed, measured):
        assert ((one - two).abs() <= tolerance).all()


def bin_width(x: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(len(x)), torch.frexp(x.abs().amax(1)).exponent) / 2048


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "kl"])  # on a sample, its minimum jumps between bins
def test_measuring_at_once_agrees_with_streaming_to_a_bin(name, spec):
    x = rows(spec, 4000)
    assert_streaming_agrees(name, spec, x, bin_width(x))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("name", OBSERVERS)
def test_on_the_centers_of_bins_they_are_the_same(name, spec):
    x = rows(spec, 4000)
    width = bin_width(x)[:, None]
    assert_streaming_agrees(name, spec, (x / width).floor() * width + width / 2, torch.zeros(len(x)))


@pytest.mark.parametrize("name", EXACT)
def test_the_largest_floats_have_their_own_bins(name):
    spec = QuantSpec(8, symmetric=False, granularity="tensor")
    x = torch.linspace(-1, 1, 999)[None] * 3e38
    low, high = fed(name, spec, list(x.split(333, 1))).range()
    assert low.item() < -2e38
    assert high.item() > 2e38


@pytest.mark.parametrize("name", OBSERVERS)
def test_padding_does_not_count(name):
    spec = QuantSpec(4, symmetric=False, granularity="group", group_size=16)
    x = torch.rand(2, 18) + 3  # a last group of 2 values and 14 paddings
    whole = to_groups(x, spec)
    counts = to_groups(torch.ones_like(x), spec)
    low, high = make_observer(name, spec, 4).measure(whole, lambda: counts)
    alone_spec = QuantSpec(4, symmetric=False)
    alone_x = x[:, 16:].contiguous()
    alone = make_observer(name, alone_spec, 2).measure(alone_x, partial(torch.ones_like, alone_x))
    assert torch.equal(low[1::2].clamp(max=0), alone[0].clamp(max=0))
    assert torch.equal(high[1::2], alone[1])


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-42, 1e38, -3e38])
def test_constants_have_a_range(name, value):
    for spec in (QuantSpec(8, symmetric=False, granularity="tensor"), QuantSpec(4, granularity="tensor")):
        x = torch.full((1, 50), value)
        for low, high in (fed(name, spec, [x]).range(), make_observer(name, spec, 1).measure(x, partial(torch.ones_like, x))):
            scale, _ = calc_qparams(low, high, spec)
            assert scale.isfinite().all()
            assert (scale > 0).all()


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="'median'") as failure:
        make_observer("median", SPECS[0], 1)
    assert all(name in str(failure.value) for name in OBSERVERS)
    with pytest.raises(ValueError, match="'minmax' has no option 'momentum'; valid: none"):
        make_observer("minmax", SPECS[0], 1, {"momentum": 0.1})
    with pytest.raises(ValueError, match="'mse' has no option 'power'; valid: norm, steps"):
        make_observer("mse", SPECS[0], 1, {"power": 2})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moving_average", {"momentum": 0}),
        ("moving_average", {"momentum": 1.5}),
        ("percentile", {"percentile": 50}),
        ("percentile", {"percentile": 101}),
        ("mse", {"norm": 0}),
        ("mse", {"steps": 0}),
        ("kl", {"steps": 0}),
    ],
)
def test_options_are_checked(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}.*must be"):
        make_observer(name, SPECS[0], 1, options)


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits, granularity="tensor") for bits in (2, 3, 4, 8)),
        QuantSpec(4, signed=False, granularity="tensor"),
        QuantSpec(4, symmetric=False, granularity="tensor"),
        QuantSpec(2, signed=False, symmetric=False, granularity="tensor"),
    ],
    ids=spec_id,
)
def test_where_learned_scales_start(spec: QuantSpec) -> None:
    """LSQ: 2 mean|v| / sqrt(q_max); LSQ+: max|mean +- 3 sigma| / 2^(bits - 1) of weights."""
    qmin, qmax = qrange(spec)
    x = torch.randn(1, 5000) * 0.1 + 0.02
    cases = [(x.abs(), not (spec.signed and spec.symmetric))]
    if spec.signed or not spec.symmetric:
        cases.append((x, False))
    for values, unsigned in cases:
        found = make_observer("lsq", spec, 1).measure(values, partial(torch.ones_like, values))
        scale, zero_point = calc_qparams(*found, spec)
        codes = qmax - qmin if unsigned else (qmax - qmin) // 2
        torch.testing.assert_close(scale, 2 * values.abs().mean(1) / codes**0.5)
        if not spec.symmetric:
            assert zero_point.item() == (qmin if unsigned else pytest.approx((qmin + qmax) / 2, abs=0.5))
    found = make_observer("sigma", spec, 1).measure(x, partial(torch.ones_like, x))
    mean, sigma = x.mean().item(), x.std(correction=0).item()
    if spec.symmetric:
        end = max(abs(mean - 3 * sigma), abs(mean + 3 * sigma))
        expected = torch.tensor([end / 2 ** (spec.bits - spec.signed)])
        torch.testing.assert_close(calc_qparams(*found, spec)[0], expected, rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(torch.cat(found), torch.tensor([mean - 3 * sigma, mean + 3 * sigma]), rtol=1e-4, atol=1e-6)
