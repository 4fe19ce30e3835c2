"""Random input: schedulers, processes, grids and configs under values that hypothesis makes up, valid and not.

Either an argument is refused with a `ValueError` or `TypeError` that names it, or what comes out keeps what is promised: ids in
their range, known tokens untouched, no mask left, times strictly falling from 1 to 0, a config that survives JSON, samples that
depend on the seed and the config alone. The examples are the same in each run (`derandomize`).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from typing import Any

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scheduler_cases import BUDGETS, CASES, SchedulerCase
from tiny import seeded
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DiscreteScheduler,
    InformationCurve,
    LearnedScheduler,
    UniformProcess,
    optimal_times,
)
from discrete_schedulers.schedulers.scheduling_utils import CHOICES, KINDS, kinds_of_arguments


def examples(number: int) -> settings:
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def names_one(error: Exception, *names: str) -> None:
    """An error of the library: it names an argument, and no library below speaks."""
    text = str(error)
    assert re.search(r"`[^`]+`|'\w+'", text), text
    assert not re.search(r"object has no attribute|not supported between|unsupported operand|size of tensor", text), (
        text
    )
    assert not names or any(name in text for name in names), f"none of {names} in {text!r}"


def run(scheduler: DiscreteScheduler, logits: Tensor, known: Tensor, generator: Any) -> Tensor:
    """What the pipeline's loop does: known tokens (-1: none) are put back after each call."""
    frozen = known >= 0
    x = torch.where(frozen, known, scheduler.sample_prior(tuple(known.shape), generator))
    for t in scheduler.timesteps:
        scheduler.model_inputs(t, x, frozen, generator)
        x = torch.where(frozen, known, scheduler.step(logits, t, x, generator=generator).prev_sample)
    return x


@st.composite
def runs(draw: st.DrawFn) -> tuple[SchedulerCase, DiscreteScheduler, Tensor, Tensor, int]:
    """A scheduler, logits of any size, what is known, and a seed."""
    case = draw(st.sampled_from(CASES))
    vocab_size, length = draw(st.integers(2, 9)), draw(st.integers(1, 12))
    scheduler = case.build(vocab_size)
    scheduler.set_timesteps(draw(st.sampled_from(BUDGETS[:-1])))
    seed = draw(st.integers(0, 2**20))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    logits = (scale * torch.randn(2, length, vocab_size, generator=seeded(seed))).to(dtype)
    known = torch.randint(0, vocab_size - case.is_absorbing, (2, length), generator=seeded(seed + 1))
    known[torch.rand(2, length, generator=seeded(seed + 2)) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -1
    return case, scheduler, logits, known, seed


@examples(150)
@given(runs())
def test_whole_runs(made: tuple[SchedulerCase, DiscreteScheduler, Tensor, Tensor, int]) -> None:
    case, scheduler, logits, known, seed = made
    width, steps = logits.shape[-1], scheduler.num_inference_steps
    assert steps is not None
    x = run(scheduler, logits, known, seeded(seed))
    assert x.dtype == torch.int64
    assert 0 <= int(x.min()) <= int(x.max()) < width
    assert torch.equal(x[known >= 0], known[known >= 0])
    assert not case.is_absorbing or (x != width - 1).all()
    scheduler.set_timesteps(steps)
    assert torch.equal(run(scheduler, logits, known, seeded(seed)), x), "the same seed gives other samples"
    again = case.cls.from_config(json.loads(scheduler.to_json_string()))
    again.set_timesteps(steps)
    assert torch.equal(run(again, logits, known, seeded(seed)), x), "the config does not say all"


@examples(25)
@given(st.sampled_from(CASES), st.integers(2, 6))
def test_save_and_load(case: SchedulerCase, vocab_size: int) -> None:
    """The same config, bit for bit, and the same samples."""
    scheduler = case.build(vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        loaded = case.cls.from_pretrained(folder)
    hidden = ("_use_default_values", "_name_or_path", "_class_name", "_diffusers_version")
    own, its = ({k: v for k, v in s.config.items() if k not in hidden} for s in (scheduler, loaded))
    assert json.dumps(own, sort_keys=True) == json.dumps(its, sort_keys=True)
    logits = torch.randn(2, 8, vocab_size, generator=seeded(1))
    samples = []
    for one in (scheduler, loaded):
        one.set_timesteps(3)
        samples.append(run(one, logits, torch.full((2, 8), -1), seeded(2)))
    assert torch.equal(*samples)


ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 1),
    st.text(max_size=3),
    st.lists(st.floats(-1, 2), max_size=3),
    st.dictionaries(st.sampled_from(["1", "2", "x"]), st.lists(st.floats(0, 1), max_size=3), max_size=2),
)


@examples(200)
@given(st.sampled_from(CASES), st.data())
def test_any_value_for_any_argument(case: SchedulerCase, data: st.DataObject) -> None:
    """It is refused by name, or the scheduler works and its config survives JSON."""
    arguments = {"vocab_size": 5, "mask_token_id": 4 if case.is_absorbing else None} | case.kwargs
    name = data.draw(st.sampled_from(sorted(set(kinds_of_arguments(case.cls)) - {"self"})))
    allowed = [*CHOICES.get(name, ())]
    value = data.draw(st.one_of(ANY, st.sampled_from(allowed)) if allowed else ANY)
    try:
        scheduler = case.cls(**(arguments | {name: value}))
        scheduler.set_timesteps(2)
    except (ValueError, TypeError) as error:
        names_one(error)
        return
    kind, is_optional = kinds_of_arguments(case.cls)[name]
    if kind in KINDS and not (is_optional and value is None):
        held = scheduler.config[name]
        assert type(held) is {"int": int, "float": float, "bool": bool}[kind]
        assert math.isfinite(held)
    again = case.cls.from_config(json.loads(scheduler.to_json_string()))
    assert again.config[name] == scheduler.config[name]
    width = scheduler.config.vocab_size
    assume(width < 50)
    try:
        x = run(scheduler, torch.zeros(1, 8, width), torch.full((1, 8), -1), seeded())
    except ValueError as error:  # what only the length of the sample shows
        names_one(error)
        return
    assert 0 <= int(x.min()) <= int(x.max()) < width


BLOCKS = st.dictionaries(
    st.sampled_from(
        ["times", "counts", "rate", "inverse_temperature", "gate_a", "gate_b", "remask", "order", "wobble"]
    ),
    st.lists(st.one_of(st.floats(0, 2), st.sampled_from([0.0, 1.0, math.nan, -1.0])), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


@examples(200)
@given(BLOCKS, st.sampled_from(["absorbing", "uniform"]), st.sampled_from(["uniform", "learned"]))
def test_any_coefficients(blocks: dict[str, list[float]], process: str, grid: str) -> None:
    """Two learned steps of any blocks: refused by name, or a run to the end on a strictly falling grid."""
    mask = 4 if process == "absorbing" else None
    try:
        scheduler = LearnedScheduler(5, mask, process=process, grid=grid, coefficients={"2": blocks})
        scheduler.set_timesteps(2)
        x = run(scheduler, torch.zeros(2, 3, 5), torch.full((2, 3), -1), seeded())
    except ValueError as error:
        names_one(error)
        return
    assert (scheduler.times[0], scheduler.times[-1]) == (1, 0)
    assert (scheduler.times.diff() < 0).all()
    assert mask is None or (x != mask).all()


@examples(60)
@given(
    st.lists(st.floats(0, 9), min_size=1, max_size=20),
    st.integers(1, 40),
    st.sampled_from(CHOICES["noise_schedule"]),
    st.sampled_from(["uniform", "cosine", "optimal"]),
)
def test_any_grid(curve: list[float], steps: int, noise_schedule: str, grid: str) -> None:
    """N + 1 times, strictly falling from 1 to exactly 0, whatever curve they come from."""
    falling = sorted(curve, reverse=True)
    scheduler = AncestralScheduler(5, 4, noise_schedule=noise_schedule, grid=grid, information_curve=falling)
    scheduler.set_timesteps(steps)
    assert scheduler.times.dtype == torch.float64
    assert (len(scheduler.times), scheduler.times[0], scheduler.times[-1]) == (steps + 1, 1, 0)
    assert (scheduler.times.diff() < 0).all()
    shares = optimal_times(InformationCurve.from_config(falling), steps)
    assert (shares.diff() < 0).all()


TIMES = st.one_of(
    st.floats(allow_nan=True), st.floats(0, 1), st.sampled_from([0.0, 1e-17, 2.0**-51, 2.0**-50, 1.0, "x", None])
)


@examples(200)
@given(
    st.sampled_from(["absorbing", "uniform"]),
    st.sampled_from(CHOICES["noise_schedule"]),
    st.integers(2, 6),
    TIMES,
    TIMES,
    st.integers(-1, 7),
)
@example("absorbing", "loglinear", 2, 1e-17, 0.0, 0)  # no noise left in float64
@example("uniform", "linear", 2, 1.0, 1.0, 0)  # nothing but noise
@example("uniform", "cosine", 2, 1.0, 1 - 1e-9, 0)
def test_any_times_and_tokens(kind: str, noise_schedule: str, width: int, t: Any, s: Any, token: int) -> None:
    """A posterior is a law, and add_noise gives ids; or times and tokens are refused by name."""
    process = (
        AbsorbingProcess(width, 0, noise_schedule) if kind == "absorbing" else UniformProcess(width, noise_schedule)
    )
    tokens = torch.full((1, 2), token)
    p_0 = torch.rand(1, 2, width, generator=seeded(1), dtype=torch.float64) + 0.1
    try:
        noisy = process.add_noise(tokens, t, seeded())
        law = process.posterior(tokens, p_0 / p_0.sum(-1, keepdim=True), t, s)
    except ValueError as error:
        names_one(error, "`t`", "`s`", "`x_0`", "`x_t`")
        return
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < width
    assert 0 <= s <= t <= 1
    assert 0 <= token < width
    assert (law >= -1e-12).all()
    torch.testing.assert_close(law.sum(-1), torch.ones(1, 2, dtype=torch.float64))
