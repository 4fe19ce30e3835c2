"""Bad input, as tables: each case ends in one clear error, before any long work, and leaves no file behind.

A message names the argument (in backquotes, with two dashes, or as a file), says what came and what is allowed. What looks
odd but is allowed (two states, one position, more steps than positions, nothing to fill in) stands in tables of its own that
say what comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scheduler_cases import CASES, SchedulerCase
from tiny import MASK, WORDS, seeded, tiny_model
from torch import Tensor

import discrete_schedulers
from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DDiTModel,
    DiscreteScheduler,
    InformationCurve,
    LearnedScheduler,
    LSDScheduler,
    NetworkDenoiser,
    RowLogits,
    SpreadScheduler,
    UniformProcess,
    optimal_counts,
    optimal_times,
)
from discrete_schedulers.schedulers.scheduling_utils import KINDS, kinds_of_arguments

NAN, INF = math.nan, math.inf
V, B, L = 6, 2, 8
FACTS: dict[str, Any] = {"vocab_size": len(WORDS), "mask_token_id": MASK}
LOGITS = torch.randn(B, L, V, generator=seeded(1), dtype=torch.float64)
IDS = torch.zeros(B, L, dtype=torch.int64)


# What an error has to be


SUBJECT = re.compile(r"`[^`]+`|--\w+|\w+\.(json|safetensors|bin|txt|xz|parquet)|'[^']+'")
ALLOWED = re.compile(
    r"must|allowed|needs?\b|(is|are) (needed|required|for|missing)|is a number from|has not|at most|known|cannot|has no\b|"
    r"lacks|learned budgets|leaves|newer version|is not (read|JSON|in|a folder)|unexpected keyword|choose from|is another|"
    r"of at least|is of|does not|download it|run the network|to fill in|one (per|for|each)",
    re.IGNORECASE,
)
VAGUE = re.compile(
    r"object has no attribute|not supported between|unsupported operand|size of tensor|out of bounds|Traceback"
)


def assert_clear(error: BaseException, message: str) -> None:
    """Whether an error is of a documented type, matches, and says what came and what is allowed."""
    text = str(error)
    assert isinstance(error, ValueError | TypeError | OSError), f"{type(error).__name__}: {text}"
    assert re.search(message, text, re.DOTALL), f"{message!r} is not in {text!r}"
    assert SUBJECT.search(text), f"no argument is named: {text!r}"
    assert ALLOWED.search(text), f"it is not said what is allowed: {text!r}"
    assert not VAGUE.search(text), f"the words of a library below: {text!r}"


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


class Refusal(NamedTuple):
    """What ran, and how it ended."""

    error: BaseException
    calls: int


class NetworkCalls:
    """How often a network of this library was called."""

    number = 0


@pytest.fixture
def network_calls(monkeypatch: pytest.MonkeyPatch) -> NetworkCalls:
    counter, forward = NetworkCalls(), DDiTModel.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.number += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(DDiTModel, "forward", counted)
    return counter


@pytest.fixture
def refuses(tmp_path: Path, network_calls: NetworkCalls, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a function in an empty folder and holds its error, the calls of networks and the files against what is right."""
    monkeypatch.chdir(tmp_path)

    def check(run: Callable[[], Any], message: str, calls: int = 0) -> None:
        before = files_in(tmp_path)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run()
        assert_clear(caught.value, message)
        assert network_calls.number == calls, "the network was called before the error"
        assert files_in(tmp_path) == before, "files were left behind"

    return check


def test_the_judge_of_messages() -> None:
    """It refuses the messages that made this file necessary."""
    for vague in (
        ValueError("Error"),
        ValueError("`x` is 3"),
        ValueError("it must be positive"),
        RuntimeError("`x` is 3; it must be positive"),
        TypeError("'<=' not supported between instances of 'int' and 'str'; it must be `x`"),
    ):
        with pytest.raises(AssertionError):
            assert_clear(vague, "")
    assert_clear(ValueError("`x` is 3; it must be positive"), "`x` is 3")
    with pytest.raises(AssertionError):
        assert_clear(ValueError("`x` is 3; it must be positive"), "`y`")


# Schedulers: every exported one, with each process it is for


def each_class() -> list[SchedulerCase]:
    found: dict[tuple[type, bool], SchedulerCase] = {}
    for case in CASES:
        found.setdefault((case.cls, case.is_absorbing), case)
    return list(found.values())


EACH = each_class()


def test_every_exported_scheduler_is_here() -> None:
    exported = (
        getattr(discrete_schedulers, name) for name in discrete_schedulers.__all__ if name.endswith("Scheduler")
    )
    concrete = {cls for cls in exported if issubclass(cls, DiscreteScheduler)} - {DiscreteScheduler}
    assert concrete - {case.cls for case in EACH} <= {discrete_schedulers.ForeignScheduler}


def changed(value: float, at: tuple[int, ...] = (1, 0, 2)) -> Tensor:
    """The logits with one number, or one row, changed."""
    logits = LOGITS.clone()
    logits[at] = value
    return logits


NO_LAW = r"`model_output` has NaN, \+inf or no finite entry in \d+ of \d+ rows .*bfloat16 or float32"
STEPS: dict[str, tuple[Callable[[DiscreteScheduler], Any], str]] = {
    "all NaN": (lambda s: whole_run(s, torch.full_like(LOGITS, NAN)), NO_LAW),
    "one NaN": (lambda s: whole_run(s, changed(NAN)), NO_LAW),
    "one +inf": (lambda s: whole_run(s, changed(INF)), NO_LAW),
    "a row of -inf": (lambda s: whole_run(s, changed(-INF, (1, 0))), NO_LAW),
    "all -inf": (lambda s: whole_run(s, torch.full_like(LOGITS, -INF)), NO_LAW),
    "float16 that overflowed": (lambda s: whole_run(s, (1e5 + 1e6 * LOGITS.abs()).half()), NO_LAW),
    "integers for logits": (lambda s: whole_run(s, LOGITS.long()), "`model_output` is torch.int64; .*floating-point"),
    "complex logits": (lambda s: whole_run(s, LOGITS.to(torch.complex64)), "`model_output` is torch.complex64"),
    "bools for logits": (lambda s: whole_run(s, LOGITS > 0), "`model_output` is torch.bool"),
    "a list for logits": (lambda s: whole_run(s, LOGITS.tolist()), "`model_output` is a list; it must be a tensor"),
    "another V": (lambda s: whole_run(s, LOGITS[..., 1:]), r"`model_output` has shape \(2, 8, 5\), but \(2, 8, 6\)"),
    "another L": (lambda s: whole_run(s, LOGITS[:, 1:]), r"`model_output` has shape \(2, 7, 6\), but \(2, 8, 6\)"),
    "another B": (lambda s: whole_run(s, LOGITS[:1]), r"`model_output` has shape \(1, 8, 6\), but \(2, 8, 6\)"),
    "ids too high": (lambda s: s.step(LOGITS, 0, IDS + V), "`sample` has ids from 6 to 6; allowed are 0 to 5"),
    "ids below 0": (lambda s: s.step(LOGITS, 0, IDS - 1), "`sample` has ids from -1 to -1; allowed are 0 to 5"),
    "float ids": (lambda s: s.step(LOGITS, 0, IDS.float()), "`sample` is torch.float32 .*must be int64"),
    "int32 ids": (lambda s: s.step(LOGITS, 0, IDS.int()), "`sample` is torch.int32 .*must be int64"),
    "ids of one axis": (lambda s: s.step(LOGITS, 0, IDS[0]), r"`sample` is torch.int64 of shape \(8,\)"),
    "a list of ids": (lambda s: s.step(LOGITS, 0, IDS.tolist()), "`sample` is a list; it must be an int64 tensor"),
    "no ids": (lambda s: s.step(LOGITS, 0, None), "`sample` is a NoneType; it must be an int64 tensor"),
    "an index too high": (lambda s: s.step(LOGITS, 99, IDS), r"`timestep` is step index 99; allowed are 0 to \d+"),
    "a negative index": (lambda s: s.step(LOGITS, -1, IDS), "`timestep` is step index -1; allowed are 0 to"),
    "a time between": (lambda s: s.step(LOGITS, 0.987, IDS), "`timestep` is 0.987, which is not in `timesteps`"),
    "a NaN time": (lambda s: s.step(LOGITS, NAN, IDS), "`timestep` is nan, which is not in `timesteps`"),
    "no time": (lambda s: s.step(LOGITS, None, IDS), "`timestep` is None; it must be one time"),
    "a text for a time": (lambda s: s.step(LOGITS, "1", IDS), "`timestep` is '1'; it must be one time"),
    "a bool for a time": (lambda s: s.step(LOGITS, True, IDS), "`timestep` is True; it must be one time"),
    "two times": (
        lambda s: s.step(LOGITS, torch.ones(2), IDS),
        r"`timestep` is tensor\(\[1., 1.\]\); it must be one time",
    ),
    "a seed for a generator": (lambda s: prior_step(s, 3), "`generator` is 3; it must be a torch.Generator"),
    "a tuple of generators": (
        lambda s: prior_step(s, (seeded(), seeded())),
        r"`generator` is \(.*it must be .*list of them",
    ),
    "a list of seeds": (lambda s: prior_step(s, [1, 2]), r"`generator` is \[1, 2\]; it must be"),
    "too few generators": (
        lambda s: prior_step(s, [seeded()]),
        "`generator` is a list of 1, .*2 rows: one per row|must be",
    ),
    "N of 0": (lambda s: s.set_timesteps(0), "`num_inference_steps` is 0; it must be an integer of at least 1"),
    "N below 0": (lambda s: s.set_timesteps(-4), "`num_inference_steps` is -4; it must be"),
    "N of 2.5": (lambda s: s.set_timesteps(2.5), "`num_inference_steps` is 2.5; it must be"),
    "N as text": (lambda s: s.set_timesteps("4"), "`num_inference_steps` is '4'; it must be"),
    "N of True": (lambda s: s.set_timesteps(True), "`num_inference_steps` is True; it must be"),
    "N missing": (lambda s: s.set_timesteps(None), "`num_inference_steps` is None; it must be"),
    "noise for no times": (lambda s: s.add_noise(IDS), "`timesteps` is required"),
    "noise at time 2": (lambda s: s.add_noise(IDS, None, torch.tensor([2.0])), r"`t` is \[2.0, 2.0\]; .*from 0 .*to 1"),
    "noise at three times": (
        lambda s: s.add_noise(IDS, None, torch.rand(3)),
        "`timesteps` has 3 entries; .*each of 2 rows",
    ),
    "noise on wrong ids": (lambda s: s.add_noise(IDS + 9, None, torch.ones(1)), "`x_0` has ids from 9 to 9; allowed"),
    "a prior of one axis": (lambda s: s.sample_prior(5), r"`shape` is 5; it must be \(B, L\)"),
    "a prior of -1 rows": (lambda s: s.sample_prior((-1, 4)), r"`shape` is \(-1, 4\); it must be \(B, L\)"),
}


def whole_run(scheduler: DiscreteScheduler, model_output: Any, shape: tuple[int, int] = (B, L)) -> Tensor:
    """A run from the prior in which the network always says the same."""
    generator = seeded()
    x = scheduler.sample_prior(shape, generator)
    for t in scheduler.timesteps:
        scheduler.model_inputs(t, x, None, generator)
        x = scheduler.step(model_output, t, x, generator=generator).prev_sample
    return x


def prior_step(scheduler: DiscreteScheduler, generator: Any) -> Tensor:
    """One step from the prior."""
    return scheduler.step(LOGITS, 0, scheduler.sample_prior((B, L), seeded()), generator=generator).prev_sample


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_refused(name: str, refuses: Callable) -> None:
    run, message = STEPS[name]
    for case in EACH:
        scheduler = case.build(V)
        scheduler.set_timesteps(4)
        refuses(lambda scheduler=scheduler: run(scheduler), message)


CHOICE = r"`(process|noise_schedule|grid)` is .*; allowed: '"
LEARNED = "`coefficients` for 2 steps"
CONSTRUCTORS: dict[str, tuple[dict[str, Any], str]] = {
    "V of 1": ({"vocab_size": 1}, "`(vocab_size|mask_token_id)` is .*(at least 2 states|one in)"),
    "V of 0": ({"vocab_size": 0}, "`vocab_size` is 0; at least 2 states are needed"),
    "V below 0": ({"vocab_size": -3}, "`vocab_size` is -3; at least 2 states"),
    "V of 6.5": ({"vocab_size": 6.5}, "`vocab_size` is 6.5; it must be an integer"),
    "V as text": ({"vocab_size": "6"}, "`vocab_size` is '6'; it must be an integer"),
    "no V": ({"vocab_size": None}, "`vocab_size` is None; it must be an integer"),
    "V of True": ({"vocab_size": True}, "`vocab_size` is True; it must be an integer"),
    "NaN V": ({"vocab_size": NAN}, "`vocab_size` is nan; it must be an integer"),
    "a mask that is no state": ({"mask_token_id": V}, r"`mask_token_id` (is 6; .*one in \[0, 6\)|must be None)"),
    "a mask below 0": ({"mask_token_id": -1}, "`mask_token_id` (is -1; .*one in|must be None)"),
    "a mask of 5.0": ({"mask_token_id": 5.0}, "`mask_token_id` is 5.0; it must be an integer or None"),
    "a mask as text": ({"mask_token_id": "[MASK]"}, r"`mask_token_id` is '\[MASK\]'; it must be an integer or None"),
    "a mask of True": ({"mask_token_id": True}, "`mask_token_id` is True; it must be an integer or None"),
    "another process": ({"process": "gaussian"}, "`process` is 'gaussian'; allowed: 'absorbing', 'uniform'"),
    "no process": ({"process": None}, "`process` is None; allowed"),
    "another noise": ({"noise_schedule": "poly"}, "`noise_schedule` is 'poly'; allowed: 'loglinear', "),
    "a number for noise": ({"noise_schedule": 5}, "`noise_schedule` is 5; allowed"),
    "temperature below 0": ({"temperature": -1}, "`temperature` is -1.0; it must be positive, or 0"),
    "NaN temperature": ({"temperature": NAN}, "`temperature` is nan; it must be a finite number"),
    "infinite temperature": ({"temperature": INF}, "`temperature` is inf; it must be a finite number"),
    "temperature as text": ({"temperature": "hot"}, "`temperature` is 'hot'; it must be a finite number"),
    "no temperature": ({"temperature": None}, "`temperature` is None; it must be a finite number"),
    "top-p of 0": ({"top_p": 0}, r"`top_p` is 0.0; allowed are numbers in \(0, 1\]"),
    "top-p above 1": ({"top_p": 1.5}, "`top_p` is 1.5; allowed"),
    "NaN top-p": ({"top_p": NAN}, "`top_p` is nan; it must be a finite number"),
    "top-p as text": ({"top_p": "x"}, "`top_p` is 'x'; it must be a finite number"),
    "a grid of a newer version": ({"grid": "spiral"}, "`grid` is 'spiral'; allowed: 'uniform', "),
    "a grid by hand": ({"grid": [1.0, 0.5, 0.0]}, r"`grid` is \[1.0, 0.5, 0.0\]; allowed"),
    "a curve that is missing": ({"grid": "optimal"}, "`grid='optimal'` (needs|is for the absorbing)"),
    "a curve as text": ({"information_curve": "abc"}, "`information_curve` is 'abc'; it must be a list of numbers"),
    "a curve as a table": ({"information_curve": {"a": 1}}, "`information_curve` is {'a': 1}; it must be a list"),
    "a curve with None": ({"information_curve": [1, None]}, r"`information_curve` is \[1, None\]; it must be a list"),
    "coefficients as a list": ({"coefficients": [1, 2]}, r"`coefficients` is \[1, 2\]; it must be a dict"),
    "coefficients as text": ({"coefficients": "x"}, "`coefficients` is 'x'; it must be a dict"),
    "a budget that is no number": (
        {"coefficients": {"a": {"times": [1, 0]}}},
        "`coefficients` has budget 'a'; keys must be",
    ),
    "a budget of 0": ({"coefficients": {"0": {"times": [1]}}}, "`coefficients` has budget '0'; keys must be"),
    "a budget below 0": ({"coefficients": {"-2": {"times": [1]}}}, "`coefficients` has budget '-2'; keys must be"),
    "a budget of 2.0": ({"coefficients": {2.0: {"times": [1, 0.5, 0]}}}, "`coefficients` has budget 2.0; keys must be"),
    "a budget in other digits": (
        {"coefficients": {"²": {"times": [1, 0]}}},
        "`coefficients` has budget '²'; keys must be",
    ),
    "blocks as a list": ({"coefficients": {"2": [1, 2, 3]}}, rf"{LEARNED} is \[1, 2, 3\]; it must be a dict"),
    "no blocks": ({"coefficients": {"2": None}}, f"{LEARNED} is None; it must be a dict"),
    "a block of one number": ({"coefficients": {"2": {"times": 1.0}}}, f"{LEARNED}: 'times' is 1.0; it must be a list"),
    "a block as text": ({"coefficients": {"2": {"times": "100"}}}, f"{LEARNED}: 'times' is '100'; it must be a list"),
    "a block of texts": (
        {"coefficients": {"2": {"times": ["1", "0"]}}},
        f"{LEARNED}: 'times' is .*must be a list of num",
    ),
    "a block with None": ({"coefficients": {"2": {"times": [1, None, 0]}}}, f"{LEARNED}: 'times' is .*must be a list"),
    "a block with NaN": (
        {"coefficients": {"2": {"times": [1, NAN, 0]}}},
        f"{LEARNED}: 'times' has a value .*not finite",
    ),
    "a block with inf": ({"coefficients": {"2": {"scale": [1, INF]}}}, f"{LEARNED}: 'scale' has a value .*not finite"),
    "a block too short": ({"coefficients": {"2": {"times": [1, 0]}}}, f"{LEARNED}: 'times' has 2 values, needs 3"),
    "a block too long": ({"coefficients": {"2": {"scale": [1, 1, 1]}}}, f"{LEARNED}: 'scale' has 3 values, needs 2"),
    "equal times": (
        {"coefficients": {"2": {"times": [1, 1, 0]}}},
        f"{LEARNED}: 'times' must fall strictly from 1 to 0",
    ),
    "rising times": ({"coefficients": {"3": {"times": [1, 0.2, 0.5, 0]}}}, "for 3 steps: 'times' must fall strictly"),
    "times that start late": (
        {"coefficients": {"2": {"times": [0.9, 0.5, 0]}}},
        f"{LEARNED}: 'times' must fall strictly",
    ),
    "times that end early": (
        {"coefficients": {"2": {"times": [1, 0.5, 0.1]}}},
        f"{LEARNED}: 'times' must fall strictly",
    ),
    "a block of a newer version": (
        {"coefficients": {"2": {"wobble": [1, 2]}}},
        f"{LEARNED}: no scheduler of this version knows a block 'wobble'; known are times, .*newer version",
    ),
    "learned for another V": (
        {"coefficients": {"2": {"times": [1, 0.5, 0]}}, "learned_for": {"vocab_size": 50258}},
        "`coefficients` were learned for `vocab_size` 50258, but this scheduler has 6",
    ),
    "learned for a text": ({"learned_for": "gpt2"}, "`learned_for` is 'gpt2'; it must be a dict or None"),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_a_constructor_refuses(name: str, refuses: Callable) -> None:
    arguments, message = CONSTRUCTORS[name]
    for case in EACH:
        own = {"vocab_size": V, "mask_token_id": V - 1 if case.is_absorbing else None} | case.kwargs
        refuses(lambda case=case, own=own: case.cls(**(own | arguments)), message)


def knobs_of(case: SchedulerCase) -> Iterator[tuple[str, str]]:
    """A scheduler's own numbers and what they are: "an integer" or "a finite number"."""
    shared = {"vocab_size", "mask_token_id", "temperature", "top_p"}
    for name, (kind, _) in kinds_of_arguments(case.cls).items():
        if name not in shared and kind in KINDS:
            yield name, KINDS[kind][1]


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.name)
def test_a_number_that_is_none_is_refused(case: SchedulerCase, refuses: Callable) -> None:
    """Every knob of every class that is annotated as a number, with what is not one."""
    for name, words in knobs_of(case):
        for value in ("x", NAN, [1, 2], torch.ones(2)):
            message = rf"`{name}` is {re.escape(repr(value))}; it must be {words}"
            refuses(lambda name=name, value=value: case.build(V, **{name: value}), message)
    if "grid_shape" in kinds_of_arguments(case.cls):
        for shape in ([4], "4x2", [4, -2], 8, [2.0, 4.0]):
            message = rf"`grid_shape` is {re.escape(repr(shape))}; it must be \[height, width\]"
            refuses(lambda shape=shape: case.build(V, grid_shape=shape), message)


OWN: dict[str, tuple[Callable[[], Any], str]] = {
    "another N": (
        lambda: LearnedScheduler(V, V - 1, coefficients={"4": {"rate": [1.0] * 4}}).set_timesteps(3),
        "no coefficients for `num_inference_steps` 3; learned budgets: 4",
    ),
    "another N, LSD": (
        lambda: LSDScheduler(V, V - 1, coefficients={"4": {"scale": [1.0] * 4}}).set_timesteps(8),
        "no coefficients for `num_inference_steps` 8; learned budgets: 4",
    ),
    "another L, order": (
        lambda: learned_step({"order": [1.0, 2.0, 3.0]}),
        "'order' has 3 priorities, but `sample` has 8 positions: they must be equal",
    ),
    "another L, mixture": (
        lambda: learned_step({"mixture_weight": [0.0], "mixture_shift": [0.0] * 5 * 3}),
        "'mixture_shift' is for 3 positions, but `sample` has 8: they must be equal",
    ),
    "another V, mixture": (
        lambda: learned_step({"mixture_weight": [0.0, 0.0], "mixture_shift": [0.0] * 9}),
        "'mixture_shift' has 9 values; 2 components of 5 tokens need a multiple of 10",
    ),
    "half a mixture": (
        lambda: learned_step({"mixture_weight": [0.0, 0.0]}),
        "a mixture is 'mixture_weight' and 'mixture_shift', not one of them: both are needed",
    ),
    "a negative rate": (lambda: learned_step({"rate": [1.0, -1.0]}), "'rate' .*cannot be negative"),
    "a rate that remasks": (lambda: learned_step({"remask": [0.5, 1.5]}), r"'remask' .*must .*in \[0, 1\]"),
    "an inverse temperature of 0": (lambda: learned_step({"inverse_temperature": [0.0, 1.0]}), "must be positive"),
    "two grids": (
        lambda: learned_step({"times": [1, 0.5, 0], "counts": [1, 1]}, grid="learned"),
        "'times' and 'counts': a grid must be one of them",
    ),
    "a grid that is not asked for": (
        lambda: learned_step({"counts": [1, 1]}),
        "'counts', which `grid='learned'` reads",
    ),
    "counts too unequal for float64": (
        lambda: learned_step({"counts": [1e300, 1e-300]}, grid="learned"),
        "'counts' that give times .*must fall strictly",
    ),
    "learned for masks": (
        lambda: LearnedScheduler(V, process="uniform", coefficients={"2": {"rate": [1.0, 1.0]}}),
        "'rate' is for masks; with uniform noise there are allowed|with uniform noise allowed are",
    ),
    "a grid of four for eight": (
        lambda: whole_run(stepped(SpreadScheduler(V, V - 1, grid_shape=[2, 2])), LOGITS),
        r"`grid_shape` \(2, 2\) has 4 cells, but the sample has 8 positions: they must be equal",
    ),
    "rows that were not asked for": (
        lambda: stepped(SpreadScheduler(V, V - 1)).step(RowLogits(LOGITS[0], IDS.bool()), 0, IDS),
        r"`model_output` has shape \(8, 6\), but \(0, 6\) is needed",
    ),
    "no such argument": (lambda: AncestralScheduler(V, V - 1, wobble=3), "unexpected keyword argument 'wobble'"),
    "no vocabulary": (lambda: AncestralScheduler(), "`vocab_size` is missing; it must be an integer"),
    "no such argument in a swap": (
        lambda: AncestralScheduler.from_config(AncestralScheduler(V, V - 1).config, temprature=0.5),
        "`temprature` is no argument of AncestralScheduler; allowed: .*'temperature'",
    ),
    "no config": (lambda: AncestralScheduler.from_config({}), "`vocab_size` is missing"),
    "a process without a mask": (
        lambda: AbsorbingProcess(V, None),
        r"`mask_token_id` is None; .*needs one in \[0, 6\)",
    ),
    "a process with a mask too far": (lambda: AbsorbingProcess(V, 6), r"`mask_token_id` is 6; .*needs one in \[0, 6\)"),
    "a process with a mask as text": (lambda: AbsorbingProcess(V, "5"), "`mask_token_id` is '5'; .*needs one"),
    "a process of one state": (lambda: UniformProcess(1), "`vocab_size` is 1; at least 2 states are needed"),
    "a process of half a state": (lambda: UniformProcess(2.5), "`vocab_size` is 2.5; it must be an integer"),
    "a process of other noise": (lambda: UniformProcess(V, "x"), "`noise_schedule` is 'x'; allowed: 'loglinear'"),
    "a curve of nothing": (lambda: InformationCurve.from_config([]), r"`values` has shape \(0,\).*allowed is"),
    "a curve with NaN, measured": (lambda: InformationCurve.from_config([1.0, NAN]), "1 finite entries, allowed is"),
    "an optimal grid of 0 steps": (lambda: optimal_times(curve(), 0), "`num_inference_steps` is 0, allowed is"),
    "an optimal grid of 2.5": (lambda: optimal_times(curve(), 2.5), "`num_inference_steps` is 2.5, allowed is"),
    "counts for more steps than tokens": (lambda: optimal_counts(curve(), 9), "`max_steps` is 9, allowed is 1 to 3"),
}


def curve() -> InformationCurve:
    return InformationCurve.from_config([3.0, 2.0, 1.0])


def stepped(scheduler: DiscreteScheduler, steps: int = 2) -> DiscreteScheduler:
    scheduler.set_timesteps(steps)
    return scheduler


def learned_step(blocks: dict[str, list[float]], **changes: Any) -> Tensor:
    """One of two learned steps."""
    scheduler = LearnedScheduler(V, V - 1, coefficients={"2": blocks}, **changes)
    return whole_run(stepped(scheduler), LOGITS)


@pytest.mark.parametrize("name", OWN)
def test_what_one_class_refuses(name: str, refuses: Callable) -> None:
    run, message = OWN[name]
    refuses(run, message)


# Processes and denoisers

LAW = torch.full((B, L, V), 1 / V, dtype=torch.float64)
PROCESSES: dict[str, tuple[Callable[[AbsorbingProcess | UniformProcess], Any], str]] = {
    "a time below 0": (lambda p: p.alpha(-0.1), "`t` is -0.1; a time is a number from 0"),
    "a time above 1": (lambda p: p.alpha(1.1), "`t` is 1.1; a time is a number from 0"),
    "a NaN time": (lambda p: p.alpha(NAN), "`t` is nan; a time is a number from 0"),
    "a text for a time": (lambda p: p.alpha("x"), "`t` is 'x'; a time is a number from 0"),
    "no time": (lambda p: p.total_noise(None), "`t` is None; a time is a number from 0"),
    "noise at time 2": (lambda p: p.add_noise(IDS, 2.0), "`t` is 2.0; a time is"),
    "noise at three times for two rows": (
        lambda p: p.add_noise(IDS, torch.rand(3)),
        r"`t` has shape \(3,\); it must be one",
    ),
    "noise on ids too high": (lambda p: p.add_noise(IDS + V, 0.5), "`x_0` has ids from 6 to 6; allowed are 0 to 5"),
    "noise on ids below 0": (lambda p: p.add_noise(IDS - 1, 0.5), "`x_0` has ids from -1 to -1; allowed"),
    "noise on floats": (lambda p: p.add_noise(IDS.float(), 0.5), "`x_0` is torch.float32 of shape .*must be int64"),
    "noise on a list": (lambda p: p.add_noise([[1, 2]], 0.5), "`x_0` is a list; it must be an int64 tensor"),
    "noise of another shape": (
        lambda p: p.add_noise(IDS, 0.5, None, IDS[:, 1:]),
        r"`noise` has shape \(2, 7\); it must be",
    ),
    "noise of wrong ids": (lambda p: p.add_noise(IDS, 0.5, None, IDS + 9), "`noise` has ids from 9 to 9; allowed"),
    "noise from a seed": (lambda p: p.add_noise(IDS, 0.5, 7), "`generator` is 7; it must be a torch.Generator"),
    "a marginal of wrong ids": (lambda p: p.marginal(IDS + 9, 0.5), "`x_0` has ids from 9 to 9; allowed"),
    "a posterior forwards": (
        lambda p: p.posterior(IDS, LAW, 0.3, 0.6),
        "`t` is 0.3 and `s` is 0.6; .*needs 0 <= s <= t",
    ),
    "a posterior from 0": (lambda p: p.posterior(IDS, LAW, 0.0, 0.0), "`t` is 0.0 and `s` is 0.0; .*needs .*t > 0"),
    "a posterior to -1": (lambda p: p.posterior(IDS, LAW, 0.5, -1.0), "`t` is -1.0; a time is a number"),
    "a posterior of another V": (
        lambda p: p.posterior(IDS, LAW[..., 1:], 0.6, 0.3),
        r"`p_0` has shape \(2, 8, 5\); it must",
    ),
    "a posterior of another L": (
        lambda p: p.posterior(IDS, LAW[:, 1:], 0.6, 0.3),
        r"`p_0` has shape \(2, 7, 6\); it must",
    ),
    "a posterior of wrong ids": (lambda p: p.posterior(IDS - 1, LAW, 0.6, 0.3), "`x_t` has ids from -1 to -1; allowed"),
    "a rate at 0": (lambda p: p.reverse_rate(IDS, LAW, 0.0), "`t` is 0.0 and `s` is 0.0; .*needs .*t > 0"),
    "a rate of another V": (lambda p: p.reverse_rate(IDS, LAW[..., 1:], 0.5), r"`p_0` has shape \(2, 8, 5\); it must"),
    "a rate of wrong ids": (lambda p: p.reverse_rate(IDS + 9, LAW, 0.5), "`x_t` has ids from 9 to 9; allowed"),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("process", [AbsorbingProcess(V, V - 1), UniformProcess(V)], ids=["absorbing", "uniform"])
def test_a_process_refuses(process: AbsorbingProcess | UniformProcess, name: str, refuses: Callable) -> None:
    run, message = PROCESSES[name]
    refuses(lambda: run(process), message)


TOKENS = torch.zeros(2, 3, dtype=torch.int64)
DENOISERS: dict[str, tuple[dict[str, Any], tuple, str]] = {
    "another process": ({"process": "x"}, (), "`process` is 'x'; allowed: 'absorbing', 'uniform'"),
    "another parametrization": ({"parametrization": "v"}, (), "`parametrization` is 'v'; allowed: 'x0'"),
    "a mask too far": ({"mask_token_id": 99}, (), r"`mask_token_id` is 99; it must lie in \[0, 22\)"),
    "a mask below 0": ({"mask_token_id": -1}, (), r"`mask_token_id` is -1; it must lie in \[0, 22\)"),
    "no mask": ({"mask_token_id": None}, (), "`mask_token_id` is missing"),
    "ids to suppress that are none": (
        {"suppress_token_ids": (99,)},
        (),
        r"`suppress_token_ids` and .*must lie in \[0, 22\)",
    ),
    "no such fact": ({"wobble": 1}, (), "unexpected keyword argument 'wobble'"),
    "ids too high": ({}, (TOKENS + 50, 0.5), "`x_t` has ids from 50 to 50; allowed are 0 to 21"),
    "float ids": ({}, (TOKENS.float(), 0.5), "`x_t` is torch.float32 of shape .*must be int64"),
    "too many positions": ({}, (torch.zeros(1, 40, dtype=torch.int64), 0.5), "`x_t` has length 40; .*at most 32"),
    "a time of 5": ({}, (TOKENS, 5.0), "`t` is 5.0; a time is a number from 0"),
    "three times for two rows": ({}, (TOKENS, torch.rand(3)), "`t` has 3 times; it must be one, or one for each of 2"),
    "positions of another shape": (
        {},
        (TOKENS, 0.5, TOKENS[:, 1:] > 0),
        r"`positions` is torch.bool of shape \(2, 2\); it must",
    ),
    "positions as ints": ({}, (TOKENS, 0.5, TOKENS), "`positions` is torch.int64 .*must be bool"),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_refuses(name: str, refuses: Callable) -> None:
    changes, arguments, message = DENOISERS[name]
    facts = {"time_input": "sigma", "split_head": True, "max_length": 32} | FACTS | changes
    model = tiny_model()
    refuses(lambda: NetworkDenoiser(model, **facts)(*arguments), message)


# What looks odd and is allowed: the table says what must come out


class Odd(NamedTuple):
    """A run that has to work."""

    vocab_size: int = V
    length: int = L
    steps: int = 4
    batch: int = B


ODD = {
    "V of 2": Odd(vocab_size=2),
    "L of 0": Odd(length=0),
    "L of 1": Odd(length=1),
    "B of 0": Odd(batch=0),
    "N of 1": Odd(steps=1),
    "N greater than L": Odd(steps=64),
    "V of 2, L of 1, N of 1": Odd(2, 1, 1, 1),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_odd_sizes_work(case: SchedulerCase) -> None:
    """Whole runs end in (B, L) tokens without a mask; with one token beside the mask it is that one everywhere."""
    for name, odd in ODD.items():
        changes = {"grid_shape": None} if case.kwargs.get("grid_shape") else {}
        scheduler = stepped(case.build(odd.vocab_size, **changes), odd.steps)
        logits = torch.randn(odd.batch, odd.length, odd.vocab_size, generator=seeded(2), dtype=torch.float64)
        x = whole_run(scheduler, logits, (odd.batch, odd.length))
        assert (x.shape, x.dtype) == ((odd.batch, odd.length), torch.int64), name
        if case.is_absorbing:
            assert (x != odd.vocab_size - 1).all(), name
        if odd.vocab_size == 2 and case.is_absorbing:
            assert (x == 0).all(), name
        assert x.numel() == 0 or 0 <= int(x.min()) <= int(x.max()) < odd.vocab_size, name


@pytest.mark.parametrize("case", [case for case in CASES if case.keeps_tokens], ids=lambda case: case.name)
def test_no_mask_anywhere(case: SchedulerCase) -> None:
    """Tokens that are known are not read, and stay, even where the network has no law for them."""
    scheduler = stepped(case.build(V))
    known = torch.randint(0, V - 1, (B, L), generator=seeded(3))
    x = known
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(LOGITS, NAN), t, x, generator=seeded()).prev_sample
    assert torch.equal(x, known)


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.name)
def test_ten_thousand_steps(case: SchedulerCase) -> None:
    """A grid of 10,000 steps is one: from 1 to exactly 0, strictly. The first call and the last ones work, and fill in all."""
    scheduler, steps = case.build(V, coefficients=None, **PLAIN.get(case.name, {})), 10_000
    scheduler.set_timesteps(steps)
    times = scheduler.times
    assert (len(times), times[0], times[-1]) == (steps + 1, 1, 0)
    assert (times.diff() < 0).all()
    x = scheduler.sample_prior((B, L), seeded())
    last = len(scheduler.timesteps) - 1  # the calls of a step belong together
    for index in (0, *range(last - 2 * case.cls.order * max(scheduler.order, 1), last + 1)):
        scheduler.model_inputs(index, x, None, seeded())
        x = scheduler.step(LOGITS, index, x, generator=seeded(index)).prev_sample
    assert 0 <= int(x.min()) <= int(x.max()) < V
    assert not case.is_absorbing or (x != V - 1).all()


PLAIN = {case.name: {"event_share": "grid"} for case in EACH if case.kwargs.get("event_share") == "learned"}
PLAIN |= {case.name: {"grid": "uniform"} for case in EACH if case.kwargs.get("grid") == "learned"}
PLAIN |= {case.name: {"strength": "cap"} for case in EACH if case.kwargs.get("strength") == "learned"}
