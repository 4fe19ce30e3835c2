"""What keeps `step` fast, without a clock: no wait for values, one graph for all calls, few operations on few bytes.

Seconds depend on the machine; the numbers of operations, of bytes that are written and of waits do not.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteDDIMScheduler,
    DiscreteScheduler,
    EntropyBoundScheduler,
    EulerScheduler,
    FlowMatchingScheduler,
    LearnedScheduler,
    LSDScheduler,
    MaskGITScheduler,
    PathPlanningScheduler,
    PredictorCorrectorScheduler,
    PsiScheduler,
    RemaskingScheduler,
    RowLogits,
    TauLeapingScheduler,
    ThresholdScheduler,
    UniformEntropyBoundScheduler,
    sampling,
)

B, L, V, STEPS = 2, 32, 600, 16
FACTORISED: dict[str, tuple[type[DiscreteScheduler], dict[str, Any]]] = {
    "ancestral, counts": (AncestralScheduler, {}),
    "ancestral, bernoulli": (AncestralScheduler, {"unmasking": "bernoulli"}),
    "ancestral, sharpened": (AncestralScheduler, {"temperature": 0.7, "top_p": 0.9}),
    "Euler": (EulerScheduler, {}),
    "tau-leaping": (TauLeapingScheduler, {}),
    "LSD": (LSDScheduler, {}),
    "ancestral, uniform": (AncestralScheduler, {"process": "uniform"}),
    "flow matching": (FlowMatchingScheduler, {"divergence_free": 0.5}),
    "learned": (LearnedScheduler, {}),
    "remasking": (RemaskingScheduler, {}),
    "predictor-corrector": (PredictorCorrectorScheduler, {"num_corrector_steps": 1}),
    "psi": (PsiScheduler, {}),
    "DDIM": (DiscreteDDIMScheduler, {}),
    "Euler, uniform": (EulerScheduler, {"process": "uniform"}),
    "from a law": (TauLeapingScheduler, {"process": "uniform", "jumps": "reject"}),
}
COMPILED = list(FACTORISED)[:7]


def build(cls: type[DiscreteScheduler], kwargs: dict[str, Any], vocab_size: int = V) -> DiscreteScheduler:
    is_uniform = kwargs.get("process") == "uniform" or cls.processes == ("uniform",)
    scheduler = cls(vocab_size=vocab_size, mask_token_id=None if is_uniform else vocab_size - 1, **kwargs)
    scheduler.set_timesteps(STEPS)
    return scheduler


def state_of(scheduler: DiscreteScheduler, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a sample, half of it masks where there are any."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(0, V - 1, (B, L), generator=generator)
    if scheduler.config.mask_token_id is not None:
        sample[:, ::2] = V - 1
    return torch.randn(B, L, V, generator=generator) * 3, sample


# No wait for values


class NoWaits(TorchDispatchMode):
    """Fails at operations for which the host waits for a device: reading a value, and shapes that depend on values. What was
    marked, and all that is made of it, is on the device; the scheduler's own grid is on the host."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")

    def __init__(self, *marked: Tensor) -> None:
        super().__init__()
        for tensor in marked:
            tensor.is_of_device = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        flat = [b for a in args for b in (a if isinstance(a, list | tuple) else [a]) if isinstance(b, Tensor)]
        is_of_device = any(getattr(tensor, "is_of_device", False) for tensor in flat)
        by_value = name in self.waits or (name == "index" and any(i.dtype == torch.bool for i in flat[1:]))
        if by_value and is_of_device:
            raise AssertionError(f"{name} waits for a device")
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and is_of_device:
                made.is_of_device = True
        return result


@contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU plays a device whose values nobody may look at."""
    from discrete_schedulers import processes
    from discrete_schedulers.schedulers import scheduling_utils

    with monkeypatch.context() as patch:
        for module in (sampling, processes, scheduling_utils):
            patch.setattr(module, "on_host", lambda _: False)
        patch.setattr(sampling, "needs_fixed_shapes", lambda _: True)
        yield


@pytest.mark.parametrize("name", FACTORISED)
def test_a_dense_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And draws what the step draws that gathers rows."""
    scheduler = build(*FACTORISED[name])
    logits, sample = state_of(scheduler)
    kept = logits.clone()
    for index in (0, 3, STEPS - 1):
        scheduler.set_timesteps(STEPS)
        expected = scheduler.step(logits, index, sample, generator=torch.Generator().manual_seed(1)).prev_sample
        scheduler.set_timesteps(STEPS)
        with as_on_a_device(monkeypatch), NoWaits(logits, sample):
            found = scheduler.step(logits, index, sample, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.equal(found, expected)
        assert index == 0 or not torch.equal(found, sample)
        assert torch.equal(logits, kept)


def test_rows_of_all_positions_wait_for_nothing() -> None:
    logits, sample = state_of(build(AncestralScheduler, {}))
    rows = RowLogits.everywhere(logits)
    with NoWaits(logits, sample):
        picked = rows.pick(sample)
        put = rows.put(picked + 1, sample)
    assert torch.equal(picked, sample.flatten())
    assert torch.equal(put, sample + 1)


def test_the_mode_sees_waits() -> None:
    """Rows that are gathered, and values that are looked at."""
    scheduler = build(AncestralScheduler, {})
    logits, sample = state_of(scheduler)
    with NoWaits(logits, sample), pytest.raises(AssertionError, match="waits for a device"):
        scheduler.step(logits, 3, sample)
    looks = [
        lambda x: (x > 0).any().item(),
        lambda x: bool(x.sum()),
        lambda x: x[x > 0],
        lambda x: float(x[0, 0, 0] * 2),
    ]
    for look in looks:
        with NoWaits(logits), pytest.raises(AssertionError, match="waits for a device"):
            look(logits)


@pytest.mark.parametrize("name", FACTORISED)
def test_a_dense_step_on_the_meta_device(name: str) -> None:
    """There are no values there at all: what asks for one fails."""
    scheduler = build(*FACTORISED[name])
    logits, sample = state_of(scheduler)
    output = scheduler.step(logits.to("meta"), 3, sample.to("meta"))
    assert output.prev_sample.shape == sample.shape
    assert output.prev_sample.device.type == "meta"


def test_bad_logits_fail_on_a_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build(AncestralScheduler, {})
    logits, sample = state_of(scheduler)
    logits[0, 0, 5] = float("nan")
    with as_on_a_device(monkeypatch), pytest.raises(RuntimeError, match="`model_output` has NaN"):
        scheduler.step(logits, STEPS - 1, sample)


@pytest.mark.parametrize("is_capturing", [False, True])
@pytest.mark.parametrize("is_compiling", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "meta"])
def test_what_is_asked_of_a_device(
    kind: str, is_compiling: bool, is_capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its kind alone: values are looked at on the host, and shapes may not depend on them in a graph."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    values: Any = SimpleNamespace(device=SimpleNamespace(type=kind))
    assert sampling.on_host(values) == (kind == "cpu" and not is_compiling)
    assert sampling.needs_fixed_shapes(values) == (is_compiling or kind == "meta" or (kind == "cuda" and is_capturing))
    eager = 2**19 if kind == "cpu" else 2**23  # 2 MB in float32, and 34
    assert sampling.chunk_size(values) == (sys.maxsize if is_compiling else eager)


# One graph


@pytest.mark.parametrize("name", [COMPILED[0], *[pytest.param(n, marks=pytest.mark.slow) for n in COMPILED[1:]]])
def test_step_compiles_without_a_break(name: str) -> None:
    """`fullgraph=True` fails at any break; one more graph takes the index as a number and serves all other calls."""
    scheduler = build(*FACTORISED[name])
    logits, sample = state_of(scheduler)
    kept = logits.clone()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    for index in (3, 5, 8, 11):
        torch.manual_seed(index)
        expected = scheduler.step(logits, index, sample).prev_sample
        torch.manual_seed(index)
        assert torch.equal(compiled(logits, index, sample).prev_sample, expected)
        assert torch.equal(logits, kept)
        assert not torch.equal(expected, sample)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# Few operations on few bytes


class Count(TorchDispatchMode):
    """Counts operations and the bytes of tensors that they make, views apart (how many one index takes depends on the version
    of torch), and the numbers that they write, in place too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes, self.largest, self.written = 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        flat = [*args, *(kwargs or {}).values()]
        given = {a.untyped_storage().data_ptr() for a in flat if isinstance(a, Tensor)}
        writes = func.overloadpacket.__name__.endswith("_") or "out" in (kwargs or {})
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                size = made.numel() * made.element_size()
                self.bytes, self.largest = self.bytes + size, max(self.largest, size)
                self.written += 0 if "empty" in func.overloadpacket.__name__ else made.numel()
            elif isinstance(made, Tensor) and writes:
                self.written += made.numel()
        return result


class Budget(NamedTuple):
    """What one step may do at B = 2, L = 1024, V = 4000, N = 16: a little more than it does.

    Args:
        cls (`type`): Scheduler.
        kwargs (`dict`): Its arguments.
        given (`str`): `"all"` logits, or the chosen `"rows"`.
        rows_written (`float`): Bytes of all tensors that are made, for each row that the step needs, in float32 rows.
        operations (`int`): Operations in all, views apart.
    """

    cls: type[DiscreteScheduler]
    kwargs: dict[str, Any]
    given: str
    rows_written: float
    operations: int


WIDE, LONG = 4000, 1024
BUDGETS = {
    "ancestral, given rows": Budget(AncestralScheduler, {}, "rows", 1.35, 84),
    "ancestral": Budget(AncestralScheduler, {}, "all", 1.4, 107),
    "ancestral, bernoulli": Budget(AncestralScheduler, {"unmasking": "bernoulli"}, "all", 1.4, 87),
    "ancestral, temperature": Budget(AncestralScheduler, {"temperature": 0.7}, "rows", 3.4, 118),
    "Euler": Budget(EulerScheduler, {}, "all", 1.4, 87),
    "tau-leaping": Budget(TauLeapingScheduler, {}, "all", 1.4, 87),
    "LSD": Budget(LSDScheduler, {}, "all", 1.4, 87),
    "remasking": Budget(RemaskingScheduler, {}, "all", 1.4, 110),
    "learned": Budget(LearnedScheduler, {}, "all", 1.4, 123),
    "confidence": Budget(ConfidenceScheduler, {}, "all", 0.46, 224),
    "confidence, given rows": Budget(ConfidenceScheduler, {}, "rows", 0.46, 197),
    "confidence by margin": Budget(ConfidenceScheduler, {"score": "margin"}, "all", 0.42, 354),
    "entropy bound": Budget(EntropyBoundScheduler, {}, "all", 0.38, 321),
    "threshold": Budget(ThresholdScheduler, {}, "all", 0.46, 227),
    "MaskGIT": Budget(MaskGITScheduler, {}, "all", 0.5, 300),
    "path planning": Budget(PathPlanningScheduler, {}, "all", 0.32, 306),
    "DDIM, uniform": Budget(DiscreteDDIMScheduler, {}, "all", 0.9, 111),
    "entropy bound, uniform": Budget(UniformEntropyBoundScheduler, {}, "all", 0.45, 305),
    "ancestral, uniform": Budget(AncestralScheduler, {"process": "uniform"}, "all", 0.65, 150),
    "Psi": Budget(PsiScheduler, {}, "all", 0.6, 157),
    "tau-leaping, uniform": Budget(TauLeapingScheduler, {"process": "uniform"}, "all", 0.65, 184),
    "from a law": Budget(TauLeapingScheduler, {"process": "uniform", "jumps": "reject"}, "all", 27.5, 5647),
}


def counted(budget: Budget, dtype: torch.dtype, length: int = LONG, vocab_size: int = WIDE) -> tuple[Count, int]:
    """A step in the middle of a run, and the rows it needs."""
    scheduler = build(budget.cls, budget.kwargs, vocab_size)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, length, vocab_size, generator=generator).to(dtype)
    sample = torch.randint(0, vocab_size - 1, (B, length), generator=generator)
    if scheduler.config.mask_token_id is not None:
        sample[:, ::2] = vocab_size - 1
    index = STEPS // 2
    positions = scheduler.positions(index, sample, torch.Generator().manual_seed(1))
    positions = torch.ones_like(sample, dtype=torch.bool) if positions is None else positions
    given = RowLogits(logits[positions], positions) if budget.given == "rows" else logits
    with Count() as count:
        scheduler.step(given, index, sample, generator=torch.Generator().manual_seed(1))
    return count, int(positions.sum())


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_does_little(name: str) -> None:
    """No tensor is larger than a chunk of rows, with float32 and with bfloat16 logits (one upcast more), and the operations
    and bytes stay within the budget. A lost fast path, a copy of all logits or of all rows, fails here."""
    budget = BUDGETS[name]
    # bfloat16: a copy in half the bytes and one in float32
    for dtype, more in [
        (torch.float32, 0.0),
        *([(torch.bfloat16, 0.55)] if name in ("ancestral", "confidence") else []),
    ]:
        count, rows = counted(budget, dtype)
        if budget.cls is not UniformEntropyBoundScheduler:  # it returns its annealed logits
            assert count.largest <= 2**22  # a chunk in float64
        assert count.bytes <= (budget.rows_written + more) * rows * WIDE * 4
        assert count.operations <= budget.operations + 10 * (more > 0)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("entropy bound", 3.1),  # logits times a factor, weights, products
        ("entropy bound, uniform", 3.2),
        ("confidence by margin", 2.1),
        ("confidence", 2.25),
        ("confidence, given rows", 2.25),
        ("ancestral", 2.25),
        ("Euler", 2.25),
    ],
)
def test_wide_rows_are_written_few_times(name: str, passes: float) -> None:
    """Numbers that are written for each number of the rows that are read: what a real vocabulary's step takes its time for.
    Copies of the rows before they are worked on, or repairs of 0 * -inf, fail here."""
    for dtype in (torch.float32, torch.bfloat16):
        more = dtype == torch.bfloat16  # the copy is multiplied by itself
        count, rows = counted(BUDGETS[name], dtype, 96, 20_000)
        assert count.written <= (passes + more) * rows * 20_000, count.written / rows / 20_000


@pytest.mark.parametrize(
    "scheduler",
    [
        AncestralScheduler(V, V - 1, temperature=0.7),
        UniformEntropyBoundScheduler(V),
        LSDScheduler(V, process="uniform", scale="log_score"),
    ],
)
def test_large_outputs_are_made_when_they_are_asked_for(scheduler: DiscreteScheduler) -> None:
    """And are as of their call, whatever the scheduler does next; in dictionaries, tuples and copies too."""
    scheduler.set_timesteps(STEPS)
    logits, sample = state_of(scheduler)
    expected = scheduler.shaped_logits(logits, 3, sample)
    outputs = [scheduler.step(logits, 3, sample, generator=torch.Generator().manual_seed(1)) for _ in range(4)]
    outputs += [copy.deepcopy(outputs[0]), pickle.loads(pickle.dumps(outputs[0]))]
    scheduler.set_timesteps(5)
    with Count() as count:
        assert outputs[0].prev_sample.shape == sample.shape
    assert count.bytes == 0
    first, *others = [output.pred_logits for output in outputs]
    assert torch.equal(first, expected)
    assert all(torch.equal(first, other) for other in others)
    keys = ["prev_sample", "pred_original_sample", "pred_logits"]
    if scheduler.config.process == "uniform":
        assert torch.equal(outputs[2].pred_original_sample, expected.argmax(-1))
    else:
        keys.remove("pred_original_sample")
    assert list(outputs[1].keys()) == keys
    assert torch.equal(outputs[1].to_tuple()[-1], expected)
    assert [type(value) for value in outputs[2].values()] == [Tensor] * len(keys)
    assert torch.equal(outputs[3]["pred_logits"], expected)


def test_the_count_sees_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as large as everything, or a copy of the rows more, would fail above."""
    budget = BUDGETS["confidence"]
    monkeypatch.setattr(sampling, "CPU_CHUNK", B * LONG * WIDE)
    large, _ = counted(budget, torch.float32)
    assert large.largest > 2**22
    chosen = RowLogits.chosen
    monkeypatch.setattr(RowLogits, "chosen", lambda logits, where: RowLogits(chosen(logits, where).logits, where))
    copied, rows = counted(budget, torch.float32)
    assert copied.bytes > budget.rows_written * rows * WIDE * 4


@pytest.mark.skipif("PYTEST_XDIST_WORKER_COUNT" not in os.environ, reason="there is one process")
def test_workers_share_the_cores() -> None:
    """Two workers with two threads each took four times as long for all tests as with one."""
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    assert torch.get_num_threads() * workers <= max(workers, os.cpu_count() or 1)
