"""Bad input, as tables: each case ends in one clear error, before any long work, and leaves no file behind.

A message names the argument (in backquotes, with two dashes, or as a file), says what came and what is allowed. What looks
odd but is allowed (two states, one position, more steps than positions, nothing to fill in) stands in tables of its own that
say what comes out.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scheduler_cases import CASES, SchedulerCase
from tiny import MASK, WORDS, seeded, tiny_model, tiny_pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import discrete_schedulers
from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DDiTModel,
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    DiscreteScheduler,
    InformationCurve,
    LearnedScheduler,
    LSDScheduler,
    NetworkDenoiser,
    PatchCodebook,
    RDLMScheduler,
    RowLogits,
    SpreadScheduler,
    UniformProcess,
    optimal_counts,
    optimal_times,
)
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.scheduling_utils import BLOCKS, KINDS, kinds_of_arguments
from discrete_schedulers.training import distill, pretrain, pretrain_images

spec = importlib.util.spec_from_file_location("generate", Path(__file__).parents[1] / "examples" / "generate.py")
assert spec is not None
assert spec.loader is not None
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

NAN, INF = math.nan, math.inf
V, B, L = 6, 2, 8
FACTS: dict[str, Any] = {"vocab_size": len(WORDS), "mask_token_id": MASK}
LOGITS = torch.randn(B, L, V, generator=seeded(1), dtype=torch.float64)
IDS = torch.zeros(B, L, dtype=torch.int64)


# What an error has to be


SUBJECT = re.compile(r"`[^`]+`|--\w+|\w+\.(json|safetensors|bin|txt|xz|parquet)|'[^']+'")
ALLOWED = re.compile(
    r"must|allowed|needs?\b|(is|are) (needed|required|for|missing)|is a number from|has not|at most|known|cannot|has no\b|"
    r"lacks|learned budgets|leaves|newer version|is not (read|JSON|in|for|bundled|a folder)|unexpected keyword|choose from|"
    r"is another|"
    r"of at least|is of|does not|download it|run the network|to fill in|one (per|for|each)|"
    r"valid JSON|invalid (int|choice)|expected at least|multiple of|at least|more than|fewer than|Choose between|unrecognized|"
    r"there is no such|for images|delete it|is not the path|valid JSON|no file named|do not fit|save that|pass `",
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


def whole_run(
    scheduler: DiscreteScheduler, model_output: Any, shape: tuple[int, int] = (B, L), generator: Generators = None
) -> Tensor:
    """A run from the prior in which the network always says the same."""
    generator = seeded() if generator is None else generator
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
    "coefficients as a list": ({"coefficients": [1, 2]}, r"`coefficients` is \[1, 2\]; .* such as {'2': {'times': "),
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
    "a time without noise": (
        {"coefficients": {"3": {"times": [1, 0.5, 1e-17, 0]}}},
        "for 3 steps: 'times' has 1e-17; before the 0 at its end allowed are numbers from 9e-16",
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
        assert case.build(V, grid_shape=[1, 1]).config.grid_shape == [1, 1]  # the smallest


def test_every_block_that_is_read_is_known() -> None:
    """`BLOCKS` has all names by which the schedulers' files read coefficients: one that lacks would be refused."""
    folder, names = Path(discrete_schedulers.__file__).parent / "schedulers", set()
    for path in folder.glob("*.py"):
        text = path.read_text()
        names |= set(re.findall(r"(?:per_step|learned|is_learned)\(\"(\w+)\"", text))
        names |= set(re.findall(r"blocks(?:\.get\(|\[)\"(\w+)\"", text))
        for listed in re.findall(r"(?:learned_knobs|learned_block|STEP_BLOCKS|MIXTURE_BLOCKS) = (.+)", text):
            names |= set(re.findall(r"\"(\w+)\"", listed))
    assert len(names) > 20
    assert names - {"learned"} <= set(BLOCKS)


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
    "counts that leave no noise": (
        lambda: learned_step({"counts": [1, 2.5e-16]}, grid="learned"),
        "'counts' that give times .*must fall strictly, to 0 from 9e-16 or more",
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
        "`temprature` is no argument of AncestralScheduler; allowed: 'vocab_size', 'mask_token_id', .*'temperature'",
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
    "a posterior from 0": (
        lambda p: p.posterior(IDS, LAW, 0.0, 0.0),
        "`t` is 0.0 and `s` is 0.0; .*needs .*t >= 9e-16",
    ),
    "a posterior from no noise": (lambda p: p.posterior(IDS, LAW, 1e-17, 0.0), "`t` is 1e-17 and .*needs .*t >= 9e-16"),
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
    "a rate at 0": (lambda p: p.reverse_rate(IDS, LAW, 0.0), "`t` is 0.0 and `s` is 0.0; .*needs .*t >= 9e-16"),
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
    """Whole runs end in (B, L) tokens without a mask; with one token beside the mask it is that one everywhere. With a
    generator for each row as with one."""
    for name, odd in ODD.items():
        changes = {"grid_shape": None} if case.kwargs.get("grid_shape") else {}
        scheduler = stepped(case.build(odd.vocab_size, **changes), odd.steps)
        logits = torch.randn(odd.batch, odd.length, odd.vocab_size, generator=seeded(2), dtype=torch.float64)
        shape = (odd.batch, odd.length)
        x = whole_run(scheduler, logits, shape)
        assert (x.shape, x.dtype) == (shape, torch.int64), name
        each = whole_run(scheduler, logits, shape, [seeded(row) for row in range(odd.batch)])
        assert (each.shape, each.dtype) == (shape, torch.int64), name
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


# The text pipeline: its arguments, before its network is called


def words_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )


OTHER_ORDER = ["[PAD]", "[UNK]", "[MASK]", *WORDS[2:-1]]
INT = torch.int64
COUNT = "it must be an integer of at least 1"
LAST = len(WORDS) - 1
TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "a number for a prompt": ({"prompt": 5}, "`prompt` is 5; it must be a text"),
    "a number among prompts": ({"prompt": ["the", 5]}, r"`prompt` is \['the', 5\]; it must be"),
    "no prompts": ({"prompt": []}, r"`prompt` is \[\]; it must be a text or a list of texts, at least one"),
    "bytes for a prompt": ({"prompt": b"the"}, "`prompt` is b'the'; it must be"),
    "ids for a prompt": ({"prompt": torch.zeros(1, 3, dtype=INT)}, r"`prompt` is tensor\(.*it must be"),
    "a prompt longer than the model": ({"prompt": "the " * 40}, "`prompt` has 40 tokens; `length` 32 leaves nothing"),
    "a prompt as long as the model": ({"prompt": "the " * 32}, "`prompt` has 32 tokens; `length` 32 leaves nothing"),
    "a prompt as long as asked": (
        {"prompt": "the cat", "length": 2},
        "`prompt` has 2 tokens; `length` 2 leaves nothing",
    ),
    "a prompt and more than the model": (
        {"prompt": "the cat", "max_new_tokens": 31},
        "`prompt`: the samples would have 33 tokens; this model takes at most 32",
    ),
    "prompt and template": ({"prompt": "a", "template": "a"}, "`prompt` and `template` cannot both be given"),
    "a number for a template": ({"template": 5}, "`template` is 5; it must be a text"),
    "a list of ids for a template": ({"template": [[1, -1]]}, r"`template` is \[\[1, -1\]\]; it must be a text"),
    "an array for a template": ({"template": np.zeros((1, 3))}, r"`template` is array\(.*it must be a text"),
    "a template without masks": ({"template": "the cat"}, r"`template` has a text without mask tokens .*fill in"),
    "a float template": ({"template": torch.zeros(1, 3)}, "`template` is torch.float32 .*must be int64"),
    "a template of one axis": (
        {"template": torch.zeros(3, dtype=INT)},
        r"`template` is .*shape \(3,\); .*must be int64",
    ),
    "a template of ids too high": ({"template": torch.full((1, 3), 99)}, "`template` has ids from 99 to 99; allowed"),
    "a template of ids below -1": ({"template": torch.full((1, 3), -2)}, "`template` has ids from -2 to -2; allowed"),
    "a template too long": (
        {"template": torch.full((1, 33), -1)},
        "`template`: the samples would have 33 tokens; this model takes at most 32",
    ),
    "messages without a template": (
        {"messages": [{"role": "user", "content": "x"}]},
        "`messages` need a tokenizer with",
    ),
    "a negative prompt alone": ({"prompt": "a", "negative_prompt": "a"}, "`negative_prompt` is for guidance"),
    "a number for a negative prompt": (
        {"prompt": "the", "negative_prompt": 5, "guidance_scale": 2.0},
        "`negative_prompt` is 5; it must be a text",
    ),
    "a negative prompt too long": (
        {"prompt": "the", "negative_prompt": "the cat", "guidance_scale": 2.0},
        "`negative_prompt` has 2 tokens, its prompt 1: .*cannot be longer",
    ),
    "NaN guidance": ({"prompt": "a", "guidance_scale": NAN}, "`guidance_scale` is nan; it must be a finite number"),
    "guidance as text": ({"prompt": "a", "guidance_scale": "x"}, "`guidance_scale` is 'x'; it must be a finite"),
    "no guidance scale": ({"prompt": "a", "guidance_scale": None}, "`guidance_scale` is None; it must be"),
    "NaN guidance by nothing": ({"guidance_scale": NAN}, "`guidance_scale` is nan; it must be a finite number"),
    "a schedule of none": (
        {"prompt": "a", "guidance_schedule": "square"},
        "`guidance_schedule` is 'square'; allowed: 'constant', 'linear', 'cosine'",
    ),
    "a function for a schedule": (
        {"prompt": "a", "guidance_scale": 2.0, "guidance_schedule": lambda t: t},
        "`guidance_schedule` is <function .*; a function of t is a `guidance_scale`",
    ),
    "two schedules": (
        {"prompt": "a", "guidance_scale": lambda t: 2.0, "guidance_schedule": "linear"},
        "`guidance_scale` is a function of t and `guidance_schedule` is 'linear': they cannot both say",
    ),
    "guidance by nothing": ({"guidance_scale": 2.0}, "`guidance_scale` needs something to be guided by"),
    "classes of none": ({"class_labels": 1}, "`class_labels` were passed, but this model has no classes"),
    "samples as text": ({"num_samples": "2"}, f"`num_samples` is '2'; {COUNT}"),
    "0 samples": ({"num_samples": 0}, f"`num_samples` is 0; {COUNT}"),
    "-1 samples": ({"num_samples": -1}, f"`num_samples` is -1; {COUNT}"),
    "1.5 samples": ({"num_samples": 1.5}, f"`num_samples` is 1.5; {COUNT}"),
    "True samples": ({"num_samples": True}, f"`num_samples` is True; {COUNT}"),
    "no samples": ({"num_samples": None}, f"`num_samples` is None; {COUNT}"),
    "no templates": ({"template": []}, r"`template` is \[\]; it must be a text or a list of texts, at least one"),
    "latents of no rows": (
        {"latents": torch.zeros(0, 4, dtype=INT)},
        r"`latents` has shape \(0, 4\); it must have one",
    ),
    "length of 0": ({"length": 0}, "`length` is 0; allowed are 1 to 32"),
    "length below 0": ({"length": -3}, "`length` is -3; allowed are 1 to 32"),
    "length of the model and one": ({"length": 33}, "`length` is 33; allowed are 1 to 32"),
    "length of 4.5": ({"length": 4.5}, "`length` is 4.5; allowed are 1 to 32"),
    "length as text": ({"length": "4"}, "`length` is '4'; allowed are 1 to 32"),
    "length of True": ({"length": True}, "`length` is True; allowed are 1 to 32"),
    "0 new tokens": ({"max_new_tokens": 0}, "`max_new_tokens` is 0; allowed are 1 to 32"),
    "2.5 new tokens": ({"max_new_tokens": 2.5}, "`max_new_tokens` is 2.5; allowed are 1 to 32"),
    "two lengths": ({"length": 4, "max_new_tokens": 3}, "`length` and `max_new_tokens` cannot both be given"),
    "0 steps": ({"num_inference_steps": 0}, f"`num_inference_steps` is 0; {COUNT}"),
    "2.5 steps": ({"num_inference_steps": 2.5}, f"`num_inference_steps` is 2.5; {COUNT}"),
    "steps as text": ({"num_inference_steps": "4"}, f"`num_inference_steps` is '4'; {COUNT}"),
    "a seed for a generator": ({"generator": 4}, "`generator` is 4; it must be a torch.Generator"),
    "a list of seeds": ({"generator": [4]}, r"`generator` is \[4\]; it must be a torch.Generator"),
    "no generators": ({"generator": []}, "`generator` is a list of 0, but 1 samples are wanted: one each"),
    "latents of ids too high": ({"latents": torch.full((1, 4), 99)}, f"`latents` has ids from 99 to 99; .*0 to {LAST}"),
    "latents of ids below 0": ({"latents": torch.full((1, 4), -1)}, "`latents` has ids from -1 to -1; allowed"),
    "latents as a list": ({"latents": [[1, 2]]}, "`latents` is a list; it must be an int64 tensor"),
    "float latents": ({"latents": torch.zeros(1, 4)}, "`latents` is torch.float32 of shape .*must be int64"),
    "latents of one axis": ({"latents": torch.zeros(4, dtype=INT)}, r"`latents` is torch.int64 of shape \(4,\)"),
    "latents of nothing": (
        {"latents": torch.zeros(1, 0, dtype=INT)},
        r"`latents` has shape \(1, 0\); it must have one",
    ),
    "latents too long": (
        {"latents": torch.zeros(1, 40, dtype=INT)},
        "`latents`: the samples would have 40 tokens; .*at most",
    ),
    "latents for two": ({"latents": torch.zeros(2, 4, dtype=INT)}, r"`latents` is .*\(2, 4\); it must be .*\(1, 4\)"),
    "an end as text": ({"eos_token_id": "x"}, "`eos_token_id` is 'x'; it must be an id"),
    "an end of 1.5": ({"eos_token_id": 1.5}, "`eos_token_id` is 1.5; it must be an id"),
    "a processor that is none": ({"logits_processor": 5}, "`logits_processor` is a int; it must be"),
    "a callback that is none": ({"callback_on_step_end": 5}, "`callback_on_step_end` is 5; it must be a function"),
    "a tensor that is not there": (
        {"callback_on_step_end_tensor_inputs": ["logits"]},
        r"`callback_on_step_end_tensor_inputs` has \['logits'\]; allowed: \['latents'\]",
    ),
    "pictures": ({"output_type": "pil"}, "`output_type` is 'pil'; allowed: 'text', 'pt', 'np', 'latent'"),
    "no such argument": ({"wobble": 3}, "unexpected keyword argument 'wobble'"),
}


@pytest.mark.parametrize("name", TEXT)
def test_the_text_pipeline_refuses(name: str, refuses: Callable) -> None:
    arguments, message = TEXT[name]
    pipe = tiny_pipeline()
    refuses(lambda: pipe(**arguments), message)


def nan_model() -> DDiTModel:
    model = tiny_model()
    model.output_layer.linear.bias.data.fill_(NAN)
    return model


RUN: dict[str, Any] = {"length": 5, "num_inference_steps": 2}
PARTS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "a tokenizer with more words": (
        lambda: tiny_pipeline(
            tokenizer=words_tokenizer([*(f"w{i}" for i in range(LAST)), "[MASK]", "[PAD]", "[UNK]", "the"])
        )(prompt="the", **RUN),
        "`prompt` has the id 24, but this model has ids up to 21: its tokenizer is another model's",
        0,
    ),
    "a tokenizer with other words": (
        lambda: tiny_pipeline(tokenizer=words_tokenizer(OTHER_ORDER))(prompt="cat [MASK] dog", **RUN),
        r"`tokenizer` has the mask token '\[MASK\]' at id 2, but the model's mask is 21",
        0,
    ),
    "a mask that is a real token": (
        lambda: tiny_pipeline(AncestralScheduler(len(WORDS), 3), denoiser={"mask_token_id": 3})(
            prompt="the [MASK]", **RUN
        ),
        r"`tokenizer` has the mask token '\[MASK\]' at id 21, but the model's mask is 3",
        0,
    ),
    "a scheduler with another mask": (
        lambda: swapped(AncestralScheduler(len(WORDS), 3))(**RUN),
        "`scheduler` has mask_token_id 3, but the model has 21: they must be equal",
        0,
    ),
    "a scheduler for another V": (
        lambda: swapped(AncestralScheduler(30, MASK))(**RUN),
        "`scheduler` has vocab_size 30, but the model has 22: they must be equal",
        0,
    ),
    "a scheduler for another process": (
        lambda: swapped(AncestralScheduler(len(WORDS), process="uniform"))(**RUN),
        "`scheduler` has mask_token_id None, but the model has 21: they must be equal",
        0,
    ),
    "coefficients for another N": (
        lambda: swapped(LearnedScheduler(**FACTS, coefficients={"4": {"rate": [1.0] * 4}}))(**RUN),
        "no coefficients for `num_inference_steps` 2; learned budgets: 4",
        0,
    ),
    "coefficients for another L": (
        lambda: swapped(LearnedScheduler(**FACTS, coefficients={"2": {"order": [1.0, 2.0, 3.0]}}))(**RUN),
        "'order' has 3 priorities, but `sample` has 5 positions: they must be equal",
        0,
    ),
    "a facts table that is none": (lambda: tiny_pipeline(denoiser=[1]), r"`denoiser` has \[1\]; it must be a dict", 0),
    "a fact of a newer version": (
        lambda: tiny_pipeline(denoiser={"wobble": 1}),
        "`denoiser` has wobble; it must be",
        0,
    ),
    "a wrong fact": (lambda: tiny_pipeline(denoiser={"time_input": "u"})(**RUN), "`time_input` is 'u'; allowed:", 0),
    "a name for a model": (
        lambda: DiscreteDiffusionPipeline("gpt2", AncestralScheduler(**FACTS)),
        "`model` is 'gpt2'; it must be a torch.nn.Module",
        0,
    ),
    "no scheduler": (lambda: DiscreteDiffusionPipeline(tiny_model(), None), "`scheduler` is a NoneType; .*must be", 0),
    "a scheduler by its name": (
        lambda: setattr(tiny_pipeline(), "scheduler", "ddim"),
        "`scheduler` is the text 'ddim'; it must be one of .*AncestralScheduler.from_config",
        0,
    ),
    "the class of a scheduler": (
        lambda: setattr(tiny_pipeline(), "scheduler", AncestralScheduler),
        "`scheduler` is the class AncestralScheduler, not an object of it; it must be",
        0,
    ),
    "a scheduler of points": (
        lambda: setattr(tiny_pipeline(), "scheduler", RDLMScheduler(4, 3)),
        "`scheduler` is a RDLMScheduler, whose states are no tokens and which is for RDLMPipeline",
        0,
    ),
    "another model by its name": (
        lambda: setattr(tiny_pipeline(), "model", "gpt2"),
        "`model` is 'gpt2'; it must be a torch.nn.Module",
        0,
    ),
    "a tokenizer by its name": (
        lambda: setattr(tiny_pipeline(), "tokenizer", "gpt2"),
        "`tokenizer` is the text 'gpt2'; it must be the object, which its from_pretrained loads",
        0,
    ),
    "a tokenizer by its name, from the start": (
        lambda: DiscreteDiffusionPipeline(tiny_model(), AncestralScheduler(**FACTS), "gpt2"),
        "`tokenizer` is the text 'gpt2'; it must be the object",
        0,
    ),
    "no tokenizer for a prompt": (
        lambda: tiny_pipeline(tokenizer=None)(prompt="the", **RUN),
        "`prompt` or `template` is text, but this pipeline has no tokenizer",
        0,
    ),
    "no length anywhere": (lambda: tiny_pipeline(denoiser={"max_length": None})(), "`length` is required", 0),
    # what only the network or the caller's own function can say comes after its first call
    "a network of NaN": (lambda: tiny_pipeline(model=nan_model())(**RUN), NO_LAW, 1),
    "a processor that makes NaN": (lambda: tiny_pipeline()(**RUN, logits_processor=lambda _, s: s * NAN), NO_LAW, 1),
    "a callback without an answer": (
        lambda: tiny_pipeline()(**RUN, callback_on_step_end=lambda *_: None),
        "`callback_on_step_end` returned None; it must return a dict",
        1,
    ),
    "a callback with wrong ids": (
        lambda: tiny_pipeline()(**RUN, callback_on_step_end=lambda *a: {"latents": a[-1]["latents"] + 99}),
        r"`latents` has ids from \d+ to \d+; allowed are 0 to 21",
        1,
    ),
    "a callback that cuts": (
        lambda: tiny_pipeline()(**RUN, callback_on_step_end=lambda *a: {"latents": a[-1]["latents"][:, 1:]}),
        r"`callback_on_step_end` returned latents of shape \(1, 4\); they must keep \(1, 5\)",
        1,
    ),
}


def swapped(scheduler: DiscreteScheduler) -> DiscreteDiffusionPipeline:
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    return pipe


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_fit(name: str, refuses: Callable) -> None:
    run, message, calls = PARTS[name]
    refuses(run, message, calls)


ALL_FROZEN = torch.arange(2 * 5).view(2, 5) % LAST
FINE: dict[str, tuple[dict[str, Any], Tensor | None, int]] = {
    "all frozen": ({"template": ALL_FROZEN}, ALL_FROZEN, 0),
    "a template of no positions": ({"template": ALL_FROZEN[:, :0]}, ALL_FROZEN[:, :0], 0),
    "a template of no rows": ({"template": ALL_FROZEN[:0]}, ALL_FROZEN[:0], 0),
    "a generator for each of no rows": ({"template": ALL_FROZEN[:0], "generator": []}, ALL_FROZEN[:0], 0),
    "one position": ({"length": 1}, None, 1),
    "more steps than positions": ({"length": 3, "num_inference_steps": 40}, None, 3),
    "an empty prompt": ({"prompt": "", "length": 4, "num_inference_steps": 1}, None, 1),
    "NumPy's integers": (
        {"length": np.int64(3), "num_samples": np.int32(1), "num_inference_steps": np.int64(1)},
        None,
        1,
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_the_text_pipeline_accepts(name: str, network_calls: NetworkCalls) -> None:
    """What comes out, and after how many calls of the network at most."""
    arguments, expected, calls = FINE[name]
    output = tiny_pipeline()(**({"num_inference_steps": 2, "generator": seeded()} | arguments))
    assert network_calls.number == output.num_model_calls <= calls
    assert expected is None or torch.equal(output.sequences, expected)
    assert (output.sequences != MASK).all()


# The image pipeline

PICTURE, PAINT = np.zeros((1, 8, 12, 1)), np.ones((8, 12))


def painted(**changes: Any) -> dict[str, Any]:
    return {"image": PICTURE, "mask_image": PAINT} | changes


IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt": ({"prompt": "cat"}, "`prompt` or `negative_prompt` is given, but this pipeline has no tokenizer"),
    "a class as text": ({"class_labels": "cat"}, "`class_labels` is 'cat'; allowed are an integer"),
    "a class below 0": ({"class_labels": -1}, "`class_labels` is -1; allowed are integers from 0 to 2"),
    "a class too high": ({"class_labels": [0, 9]}, r"`class_labels` is \[0, 9\]; allowed are integers from 0 to 2"),
    "a NaN class": ({"class_labels": [NAN]}, r"`class_labels` is \[nan\]; allowed are integers"),
    "no class in a list": ({"class_labels": [None]}, r"`class_labels` is \[None\]; allowed are an integer"),
    "classes in uneven lists": ({"class_labels": [[0], [1, 2]]}, r"`class_labels` is \[\[0\], \[1, 2\]\]; allowed are"),
    "no classes": ({"class_labels": torch.zeros(0, dtype=INT)}, "'classes' .*allowed: one, or all as many"),
    "0 images": ({"num_images_per_prompt": 0}, f"`num_images_per_prompt` is 0; {COUNT}"),
    "-1 images": ({"num_images_per_prompt": -1}, f"`num_images_per_prompt` is -1; {COUNT}"),
    "1.5 images": ({"num_images_per_prompt": 1.5}, f"`num_images_per_prompt` is 1.5; {COUNT}"),
    "height as text": ({"height": "8"}, "`height` is '8'; it must be a multiple of 2"),
    "height of 8.0": ({"height": 8.0}, "`height` is 8.0; it must be a multiple of 2"),
    "height of 9": ({"height": 9}, "`height` is 9; it must be a multiple of 2"),
    "height of 0": ({"height": 0}, "`height` is 0; it must be a multiple of 2"),
    "NaN width": ({"width": NAN}, "`width` is nan; it must be a multiple of 2"),
    "another size": (
        {"height": 10},
        "`height` and `width` are 10 and None; this model makes images of 8 x 12 pixels only",
    ),
    "0 steps": ({"num_inference_steps": 0}, f"`num_inference_steps` is 0; {COUNT}"),
    "steps as text": ({"num_inference_steps": "4"}, f"`num_inference_steps` is '4'; {COUNT}"),
    "NaN guidance": ({"guidance_scale": NAN, "class_labels": 1}, "`guidance_scale` is nan; it must be a finite"),
    "infinite guidance": (
        {"guidance_scale": INF, "class_labels": 1},
        "`guidance_scale` is inf; it must be a finite",
    ),
    "guidance as text": (
        {"guidance_scale": "2", "class_labels": 1},
        "`guidance_scale` is '2'; it must be a finite",
    ),
    "a schedule of none": ({"guidance_schedule": "square"}, "`guidance_schedule` is 'square'; allowed: 'constant'"),
    "two schedules": (
        {"class_labels": 1, "guidance_scale": lambda t: 2.0, "guidance_schedule": "linear"},
        "`guidance_scale` is a function of t and `guidance_schedule` is 'linear': they cannot both say",
    ),
    "a picture by its name": (painted(image="cat.png"), "`image` has 'cat.png'; allowed are PIL pictures"),
    "a number for a picture": (painted(image=5), "`image` has 5; allowed are PIL pictures"),
    "no pictures": (painted(image=[]), "`image` has no entries; allowed are PIL pictures"),
    "a picture of one axis": (painted(image=np.zeros(3)), "`image` could not be read .*allowed are PIL"),
    "a picture of NaN": (painted(image=PICTURE * NAN), "`image` has values from nan to nan; .*allowed are numbers in"),
    "a picture of bytes": (
        painted(image=PICTURE + 255),
        "`image` has values from 255 to 255; .*allowed are numbers in",
    ),
    "a picture in colours": (painted(image=np.zeros((1, 8, 12, 3))), r"`images` has shape \(1, 3, 8, 12\); allowed is"),
    "a picture alone": ({"image": PICTURE}, "`mask_image` is missing"),
    "a mask alone": ({"mask_image": PAINT}, "`image` is missing"),
    "a mask by its name": (painted(mask_image="m.png"), "`mask_image` has 'm.png'; allowed are PIL pictures"),
    "no masks": (painted(mask_image=[]), "`mask_image` has no entries; allowed are"),
    "a mask in colours": (painted(mask_image=np.ones((1, 8, 12, 3))), r"`mask_image` has shape .*; allowed: \(H, W\)"),
    "a mask of one axis": (painted(mask_image=np.ones(8)), r"`mask_image` has shape \(8,\); allowed: \(H, W\)"),
    "a mask of NaN": (painted(mask_image=PAINT * NAN), "`mask_image` has NaN at 96 of 96 pixels; allowed"),
    "two masks for three": (
        painted(image=np.zeros((3, 8, 12, 1)), mask_image=np.ones((2, 8, 12))),
        "`mask_image` has 2 masks for 3 pictures; allowed",
    ),
    "a score as text": (
        {"micro_conditioning_aesthetic_score": "x"},
        r"`micro_conditioning_aesthetic_score` is \['x'\]; allowed",
    ),
    "a corner of three": (
        {"micro_conditioning_crop_coord": (1, 2, 3)},
        "`micro_conditioning_crop_coord` is .*must be two",
    ),
    "a seed for a generator": ({"generator": 4}, "`generator` is 4; it must be a torch.Generator"),
    "too few generators": (
        {"generator": [seeded()], "num_images_per_prompt": 2},
        "`generator` is a list of 1, .*one each",
    ),
    "latents of ids too high": ({"latents": torch.full((1, 24), 99)}, "`latents` has ids from 99 to 99; allowed"),
    "latents of another length": (
        {"latents": torch.zeros(1, 3, dtype=INT)},
        r"`latents` is .*must be int64 of shape \(1, 24",
    ),
    "latents as a grid": (
        {"latents": torch.zeros(1, 4, 6, dtype=INT)},
        r"`latents` is .*\(1, 4, 6\); it must be int64",
    ),
    "text": ({"output_type": "text"}, "`output_type` is 'text'; allowed: 'pil', 'np', 'pt', 'latent'"),
    "a callback that is none": ({"callback_on_step_end": 3}, "`callback_on_step_end` is 3; it must be a function"),
}


@pytest.fixture(scope="module")
def picture_pipeline() -> DiscreteImagePipeline:
    facts = {"vocab_size": 13, "mask_token_id": 12}
    network = DDiTModel(13, 32, 1, 4, 16, 24, num_classes=3, grid_shape=(4, 6))
    pipe = DiscreteImagePipeline(network.eval(), AncestralScheduler(**facts), PatchCodebook(num_codes=12))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", IMAGES)
def test_the_image_pipeline_refuses(name: str, picture_pipeline: DiscreteImagePipeline, refuses: Callable) -> None:
    arguments, message = IMAGES[name]
    refuses(lambda: picture_pipeline(**arguments), message)


IMAGE_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "no scheduler": ({"scheduler": 5}, "`scheduler` is a int; .*must be"),
    "no decoder": ({"decoder": None}, "`decoder` is None; it must be a VQModel"),
    "a name for a decoder": ({"decoder": "vq"}, "`decoder` is 'vq'; it must be a VQModel"),
    "a name for a model": ({"model": "x"}, "`model` is 'x'; it must be a torch.nn.Module"),
    "a grid as text": ({"denoiser": {"grid_shape": "4x6"}}, r"`grid_shape` is '4x6'; it must be \[height, width\]"),
    "a grid of one side": ({"denoiser": {"grid_shape": [24]}}, r"`grid_shape` is \[24\]; it must be"),
    "a grid below 0": ({"denoiser": {"grid_shape": [-4, -6]}}, r"`grid_shape` is \[-4, -6\]; it must be"),
    "a number for a grid": ({"denoiser": {"grid_shape": 24}}, "`grid_shape` is 24; it must be"),
    "no grid": ({"denoiser": {"grid_shape": None}}, "`denoiser` has no `grid_shape`"),
    "a fact of a newer version": ({"denoiser": {"wobble": 1}}, "`denoiser` has wobble; it must be a dict"),
}


@pytest.mark.parametrize("name", IMAGE_PARTS)
def test_parts_of_the_image_pipeline_that_do_not_fit(
    name: str, picture_pipeline: DiscreteImagePipeline, refuses: Callable
) -> None:
    changes, message = IMAGE_PARTS[name]
    parts = {"model": picture_pipeline.model, "scheduler": picture_pipeline.scheduler, "decoder": PatchCodebook(12)}
    refuses(lambda: DiscreteImagePipeline(**(parts | changes)), message)


# What is loaded: a pipeline's folder, a folder of a family's repository, and a scheduler's

WEIGHTS = "model/diffusion_pytorch_model.safetensors"
EVIL = "from pathlib import Path\nPath({ran!r}).mkdir()\nimport torch\nclass Evil(torch.nn.Module):\n    pass\n"
MDLM = {"model_type": "mdlm", "architectures": ["MDLM"], "cond_dim": 16, "hidden_dim": 32, "n_blocks": 2, "n_heads": 4}
MDLM |= {"model_length": 32, "dropout": 0.1, "time_conditioning": True, "vocab_size": len(WORDS)}
MDLM |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"}}


class Code:
    """A pickle of it makes a folder where it is read."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.ran),)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {key: value.clone().contiguous() for key, value in tiny_model().state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    """Folders `pipe` and `family` that load, with code beside them that would leave a folder `ran` if it were run."""
    root = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(root / "pipe")
    AncestralScheduler(**FACTS).save_pretrained(root / "scheduler")
    (root / "family").mkdir()
    (root / "family" / "config.json").write_text(json.dumps(MDLM))
    save_file(state, root / "family" / "model.safetensors")
    save_file(state, root / "outside.safetensors")
    for folder in (root / "pipe", root / "pipe" / "model", root / "family"):
        (folder / "evil.py").write_text(EVIL.format(ran=str(root / "ran")))
    return root


Change = Callable[[Path, dict[str, Tensor]], Any]


def nothing(folder: Path, state: dict[str, Tensor]) -> None:
    """The folder as it is."""


def written(name: str, content: str | bytes) -> Change:
    """A file with other content."""
    return lambda folder, _: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def updated(name: str, **values: Any) -> Change:
    """A JSON file with other values; `None` for one takes it out."""

    def change(folder: Path, _: Any) -> None:
        held = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return change


def without(name: str) -> Change:
    """A file or folder less."""
    return lambda folder, _: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def cut(name: str, end: int) -> Change:
    """A file that ends early."""
    return lambda folder, _: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def weights(name: str, made: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Other tensors."""
    return lambda folder, state: save_file(made(dict(state)), folder / name)


def pickled(name: str, instead_of: str) -> Change:
    """A pickle that runs code, in the place of weights."""

    def change(folder: Path, _: Any) -> None:
        (folder / instead_of).unlink()
        (folder / name).write_bytes(pickle.dumps({"weight": Code(folder.parent / "ran")}))

    return change


def sharded(table: Any, name: str = "model.safetensors") -> Change:
    """Weights in two shards and an index that says where they are."""

    def change(folder: Path, state: dict[str, Tensor]) -> None:
        (folder / name).unlink()
        keys, parent = list(state), (folder / name).parent
        save_file({key: state[key] for key in keys[:9]}, parent / "a.safetensors")
        save_file({key: state[key] for key in keys[9:]}, parent / "b.safetensors")
        held = table(keys, folder) if callable(table) else table
        (folder / f"{name}.index.json").write_text(json.dumps(held))

    return change


def all_to(shard: Any) -> Callable[[list[str], Path], dict]:
    return lambda keys, folder: {"weight_map": dict.fromkeys(keys, str(shard) if isinstance(shard, Path) else shard)}


def first_row(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "vocab_embed.embedding"
    return state | {key: state[key][:1].clone()}


BESIDE = "index.json names .*shards must be .safetensors or .bin files beside it, without a path"
NEVER = "and code of a repository is never run; it must be"
DAMAGED = "(is|It is) damaged.*delete it and download it again"
LOADED: dict[str, tuple[str, Change, str]] = {
    # model_index.json
    "an index that is no JSON": ("pipe", written("model_index.json", "{not"), "model_index.json is not JSON"),
    "an index that is cut": ("pipe", cut("model_index.json", 50), "model_index.json is not JSON"),
    "an empty index": ("pipe", written("model_index.json", ""), "model_index.json is not JSON"),
    "an index of bytes": ("pipe", written("model_index.json", b"\xff\xfe\x00"), "model_index.json is not JSON"),
    "an index that is a list": (
        "pipe",
        written("model_index.json", "[1]"),
        "model_index.json holds a list; it must be",
    ),
    "a foreign pipeline": ("pipe", updated("model_index.json", _class_name="Evil"), f"is of 'Evil', {NEVER}"),
    "a pipeline of its own code": (
        "pipe",
        updated("model_index.json", _class_name=["evil", "Evil"]),
        rf"is of \['evil', 'Evil'\], {NEVER}",
    ),
    "no pipeline": ("pipe", updated("model_index.json", _class_name=None), f"is of None, {NEVER}"),
    "a model of its own code": (
        "pipe",
        updated("model_index.json", model=["evil", "Evil"]),
        rf"\['evil', 'Evil'\] for 'model', {NEVER}",
    ),
    "a function of the system": (
        "pipe",
        updated("model_index.json", model=["os", "system"]),
        rf"\['os', 'system'\] for 'model', {NEVER}",
    ),
    "a process": (
        "pipe",
        updated("model_index.json", tokenizer=["subprocess", "Popen"]),
        rf"\['subprocess', 'Popen'\] for 'tokenizer', {NEVER}",
    ),
    "a scheduler of its own code": (
        "pipe",
        updated("model_index.json", scheduler=["evil", "Evil"]),
        rf"\['evil', 'Evil'\] for 'scheduler', {NEVER}",
    ),
    "a model without a library": (
        "pipe",
        updated("model_index.json", model="DDiTModel"),
        f"'DDiTModel' for 'model', {NEVER}",
    ),
    "no model": ("pipe", updated("model_index.json", model=[None, None]), r"has no 'model': .* pass `model=...`"),
    "a model of a newer version": (
        "pipe",
        updated("model_index.json", model=["discrete_schedulers", "DDiT2Model"]),
        "the class 'DDiT2Model' for 'model', which this version of discrete_schedulers does not have",
    ),
    "a function for a model": (
        "pipe",
        updated("model_index.json", model=["discrete_schedulers", "nll"]),
        "the class 'nll' for 'model', which this version of discrete_schedulers does not have",
    ),
    "a scheduler of a newer version": (
        "pipe",
        updated("model_index.json", scheduler=["discrete_schedulers", "HyperScheduler"]),
        "the class 'HyperScheduler' for 'scheduler', which this version .* does not have",
    ),
    "a scheduler for pictures": (
        "pipe",
        updated("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "`scheduler` is a DDIMScheduler; it must be",
    ),
    "a part of a newer version": (
        "pipe",
        updated("model_index.json", refiner=["discrete_schedulers", "DDiTModel"]),
        "a part 'refiner', which this version does not know; known: model, scheduler, tokenizer",
    ),
    "a fact of a newer version": (
        "pipe",
        updated("model_index.json", denoiser={"wobble": 1}),
        "`denoiser` has wobble; it must be a dict with any of",
    ),
    "a lost scheduler": ("pipe", without("scheduler"), "a part 'scheduler', but .* lacks the folder"),
    "a lost model": ("pipe", without("model"), "a part 'model', but .* lacks the folder"),
    "a lost tokenizer": ("pipe", without("tokenizer"), "a part 'tokenizer', but .* lacks the folder"),
    "a tokenizer that is cut": ("pipe", cut("tokenizer/tokenizer.json", 50), "is not JSON .*download it again"),
    # the parts of a pipeline
    "a scheduler config that is cut": (
        "pipe",
        cut("scheduler/scheduler_config.json", 30),
        "scheduler_config.json.* valid JSON",
    ),
    "a scheduler config that is a list": (
        "pipe",
        written("scheduler/scheduler_config.json", "[]"),
        r"scheduler_config.json of .* holds \[\]; it must be a JSON object",
    ),
    "a grid of a newer version": (
        "pipe",
        updated("scheduler/scheduler_config.json", grid="spiral"),
        "`grid` is 'spiral'; allowed: 'uniform', ",
    ),
    "a V as text": (
        "pipe",
        updated("scheduler/scheduler_config.json", vocab_size="22"),
        "`vocab_size` is '22'; it must",
    ),
    "a config without V": (
        "pipe",
        updated("scheduler/scheduler_config.json", vocab_size=None),
        "`vocab_size` is missing",
    ),
    "a block of a newer version": (
        "pipe",
        updated("scheduler/scheduler_config.json", coefficients={"2": {"wobble": [1.0, 1.0]}}),
        "no scheduler of this version knows a block 'wobble'",
    ),
    "a model config that is cut": ("pipe", cut("model/config.json", 30), "config.json.* is not a valid JSON"),
    "a model config for another V": (
        "pipe",
        updated("model/config.json", vocab_size=30),
        r"expected shape .*\[30.*\[22",
    ),
    "a model config with text": (
        "pipe",
        updated("model/config.json", hidden_size="big"),
        "`hidden_size` is 'big'; it must",
    ),
    "a model config that cannot be": ("pipe", updated("model/config.json", num_heads=5), r"`num_heads` \(5\)"),
    "weights that are cut": ("pipe", cut(WEIGHTS, -100), DAMAGED),
    "weights without content": ("pipe", written(WEIGHTS, b""), DAMAGED),
    "weights with another header": ("pipe", written(WEIGHTS, b"\xff" * 64), DAMAGED),
    "a page in the place of weights": ("pipe", written(WEIGHTS, "<html>404</html>"), DAMAGED),
    "a pickle in the place of weights": ("pipe", pickled("model/diffusion_pytorch_model.bin", WEIGHTS), DAMAGED),
    "a pickle that calls itself safe": ("pipe", pickled(WEIGHTS, WEIGHTS), DAMAGED),
    "lost weights": ("pipe", without(WEIGHTS), "no file named .*in directory"),
    "other names": ("pipe", weights(WEIGHTS, lambda s: {f"x.{k}": v for k, v in s.items()}), "do not fit .*missing: "),
    "one weight less": (
        "pipe",
        weights(WEIGHTS, lambda s: {k: v for k, v in s.items() if k != "vocab_embed.embedding"}),
        "do not fit the config of this DDiTModel: missing: vocab_embed.embedding. They must be all",
    ),
    "one weight more": (
        "pipe",
        weights(WEIGHTS, lambda s: s | {"blocks.0.lora": torch.ones(2)}),
        "do not fit the config of this DDiTModel: unexpected: blocks.0.lora",
    ),
    "a weight of another shape": ("pipe", weights(WEIGHTS, first_row), r"expected shape .*\[22, 32\].*got .*\[1, 32\]"),
    "shards outside": (
        "pipe",
        sharded(all_to("../../outside.safetensors"), WEIGHTS),
        r"'\.\./\.\./outside.safetensors' .*parent-directory reference, which is not allowed",
    ),
    # a repository of a family
    "a family's config that is cut": ("family", cut("config.json", 40), "config.json is not JSON"),
    "a family's config that is a list": ("family", written("config.json", "[]"), "config.json holds a list; it must"),
    "an unknown family": (
        "family",
        updated("config.json", model_type="gpt17", architectures=["Gpt17"]),
        "model_type 'gpt17' .*code of a repository is never run",
    ),
    "no family": ("family", updated("config.json", model_type=None, architectures=None), "is of no known family"),
    "a family's config without a size": (
        "family",
        updated("config.json", hidden_dim=None),
        "config.json lacks hidden_dim",
    ),
    "a family's config with text": ("family", updated("config.json", hidden_dim="x"), "`hidden_size` is 'x'; it must"),
    "a family's config below 0": ("family", updated("config.json", hidden_dim=-32), "`hidden_size` is -32; it must"),
    "a family's config for another V": (
        "family",
        updated("config.json", vocab_size=30),
        r"\(22,\), the config says \(30,",
    ),
    "a family's weights that are cut": ("family", cut("model.safetensors", -100), DAMAGED),
    "a family's weights without content": ("family", written("model.safetensors", b""), DAMAGED),
    "a page for a family's weights": ("family", written("model.safetensors", "<html>404</html>"), DAMAGED),
    "a pointer of Git LFS": (
        "family",
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"),
        DAMAGED,
    ),
    "lost weights of a family": (
        "family",
        without("model.safetensors"),
        "has no weights: looked for model.safetensors",
    ),
    "weights of another model": (
        "family",
        weights("model.safetensors", lambda s: {"encoder.weight": torch.ones(2, 2)}),
        "do not fit family 'MDLM' and config.json: missing: .*unexpected: encoder.weight",
    ),
    "a family's weight of another shape": (
        "family",
        weights("model.safetensors", first_row),
        r"is \(1, 32\), the config",
    ),
    "weights that are whole numbers": (
        "family",
        weights("model.safetensors", lambda s: {k: v.long() for k, v in s.items()}),
        "is torch.int64, parameters must be floating-point",
    ),
    "a pickle of code": (
        "family",
        pickled("pytorch_model.bin", "model.safetensors"),
        "holds more than tensors, which is not",
    ),
    "a pickle of a list": (
        "family",
        lambda f, _: ((f / "model.safetensors").unlink(), torch.save([1, 2], f / "pytorch_model.bin")),
        "pytorch_model.bin is not a table of tensors",
    ),
    "shards in the folder above": ("family", sharded(all_to("../outside.safetensors")), BESIDE),
    "shards anywhere": ("family", sharded(all_to(Path("/etc/outside.safetensors"))), BESIDE),
    "shards by a detour": ("family", sharded(all_to("x/../../outside.safetensors")), BESIDE),
    "shards above, in Windows": ("family", sharded(all_to("..\\outside.safetensors")), BESIDE),
    "shards that are code": ("family", sharded(all_to("evil.py")), BESIDE),
    "shards without a name": ("family", sharded(all_to("")), BESIDE),
    "shards of numbers": ("family", sharded(all_to(5)), BESIDE),
    "a shard that is lost": (
        "family",
        sharded(all_to("c.safetensors")),
        "lacks c.safetensors, which model.safetensors.index",
    ),
    "one shard for all": (
        "family",
        sharded(all_to("a.safetensors")),
        "do not fit family 'MDLM' and config.json: missing",
    ),
    "a table of shards without a map": ("family", sharded({"metadata": {}}), "weight_map None; it must be a table"),
    "a table of shards that is a list": ("family", sharded([1]), "index.json holds a list; it must be"),
    "a map of shards that is a list": (
        "family",
        sharded({"weight_map": ["a"]}),
        r"weight_map \['a'\]; it must be a table",
    ),
    "an empty map of shards": ("family", sharded({"weight_map": {}}), "weight_map {}; it must be a table"),
    # a scheduler
    "a scheduler's config that is a list": (
        "scheduler",
        written("scheduler_config.json", "[1]"),
        r"holds \[1\]; it must be",
    ),
    "a scheduler's config that is cut": ("scheduler", cut("scheduler_config.json", 40), "is not a valid JSON"),
    "a scheduler that a newer version has": (
        "scheduler",
        updated("scheduler_config.json", _class_name="HyperScheduler"),
        "is of 'HyperScheduler', which this version of discrete_schedulers does not have; known: Ancestral",
    ),
    "a scheduler's config with text": (
        "scheduler",
        updated("scheduler_config.json", top_p="x"),
        "`top_p` is 'x'; it must",
    ),
    "no scheduler in the folder": (
        "scheduler",
        without("scheduler_config.json"),
        "no file named scheduler_config.json",
    ),
}


def load(kind: str, folder: Path, **arguments: Any) -> Any:
    if kind == "scheduler":
        return AncestralScheduler.from_pretrained(folder, **arguments)
    return DiscreteDiffusionPipeline.from_pretrained(
        folder, **({"tokenizer": None} if kind == "family" else {}), **arguments
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", LOADED)
def test_what_is_loaded(name: str, saved: Path, state: dict[str, Tensor], tmp_path: Path, refuses: Callable) -> None:
    kind, change, message = LOADED[name]
    folder = tmp_path / "copy"
    shutil.copytree(saved / kind, folder)
    shutil.copy(saved / "outside.safetensors", tmp_path)
    change(folder, state)
    refuses(lambda: load(kind, folder), message)
    assert not (saved / "ran").exists(), "code was run"


ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown family": ("family", {"family": "gpt17"}, "`family` is 'gpt17'; allowed: 'SEDD', "),
    "a family of a pipeline": (
        "pipe",
        {"family": "MDLM"},
        "`family` is not for .*, whose model_index.json says it|is not",
    ),
    "a mask too far": ("family", {"mask_token_id": 99}, "`mask_token_id` is 99; allowed are 0 to 21"),
    "a mask as text": ("family", {"mask_token_id": "x"}, "`mask_token_id` is 'x'; it must be an id"),
    "a shift of 2": ("family", {"shift": 2}, "`shift` is 2; it must be 0 or 1"),
    "no such argument": ("family", {"wobble": 1}, "`wobble` is not an argument for"),
    "foreign code": ("family", {"trust_remote_code": True}, "`trust_remote_code` is not an argument for"),
    "a dtype that is none": (
        "family",
        {"torch_dtype": "float33"},
        "`torch_dtype` is 'float33'; allowed: torch.float32",
    ),
    "a dtype that is none, of a pipeline": ("pipe", {"dtype": "float33"}, "`torch_dtype` is 'float33'; allowed: torch"),
    "whole numbers": ("family", {"torch_dtype": torch.int64}, "`torch_dtype` is torch.int64; allowed: torch.float32"),
    "a device that is none": ("family", {"device_map": "tpu9"}, "`device_map` is 'tpu9'; allowed: a device"),
    "a name for a scheduler": ("family", {"scheduler": "x"}, "`scheduler` is the text 'x'; it must be"),
    "a list of facts": ("family", {"denoiser": [1]}, r"`denoiser` has \[1\]; it must be a dict"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_loading(name: str, saved: Path, refuses: Callable) -> None:
    kind, arguments, message = ARGUMENTS[name]
    refuses(lambda: load(kind, saved / kind, **arguments), message)


NAMES: dict[str, tuple[Any, str]] = {
    "not bundled": ("discrete-schedulers/huge", "'discrete-schedulers/huge' is not bundled; bundled: .*tiny-text"),
    "no folder": ("/nowhere/at/all", "`pretrained_model_name_or_path` is '/nowhere/at/all'; there is no such folder"),
    "three names": ("a/b/c", "`pretrained_model_name_or_path` is 'a/b/c'; .* must be of the form 'namespace/name'"),
    "not in the cache": (
        "someone/model",
        "the Hub cannot be reached, and model_index.json .*'someone/model' is not in",
    ),
    "a number": (5, "`pretrained_model_name_or_path` is 5; it must be a folder"),
    "nothing": (None, "`pretrained_model_name_or_path` is None; it must be a folder"),
    "an empty name": ("", "`pretrained_model_name_or_path` is ''; it must be a folder"),
    "an empty folder": (".", "'.' has (neither model_index.json nor config.json|no model_index.json)"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", [DiscreteDiffusionPipeline, DiscreteImagePipeline])
def test_names_of_what_is_not_there(cls: type, name: str, refuses: Callable) -> None:
    asked, message = NAMES[name]
    refuses(lambda: cls.from_pretrained(asked), message)


def test_what_was_not_changed_loads(saved: Path) -> None:
    """The folders behind these tables are good: it is the change that is refused."""
    for kind in ("pipe", "family", "scheduler"):
        assert load(kind, saved / kind) is not None
    for kind in ("pipe", "family"):
        assert load(kind, saved / kind, torch_dtype="bfloat16").model.dtype == torch.bfloat16
    assert not (saved / "ran").exists()


def test_an_unknown_key_is_named_in_the_log(saved: Path, tmp_path: Path, warnings_of_diffusers: Callable) -> None:
    """A newer version may write one more knob; diffusers says that it is not read."""
    shutil.copytree(saved / "scheduler", tmp_path / "copy")
    updated("scheduler_config.json", wobble=3)(tmp_path / "copy", {})
    AncestralScheduler.from_pretrained(tmp_path / "copy")
    assert any("wobble" in line and "not expected" in line for line in warnings_of_diffusers())


# The command lines, in this process: nothing is begun, and no folder is made


CUT_OFF = b"\xfd7zXZ\x00 cut off"


@pytest.fixture
def command_folder(tmp_path: Path, saved: Path) -> Path:
    """Where the commands run: `m` a model, `u` one with uniform noise, texts and corpora, good and bad."""
    (tmp_path / "m").symlink_to(saved / "pipe")
    uniform = AncestralScheduler(len(WORDS), process="uniform")
    tiny_pipeline(uniform).save_pretrained(tmp_path / "u")
    LearnedScheduler(**FACTS, coefficients={"4": {"rate": [1.0] * 4}}).save_pretrained(tmp_path / "four")
    AncestralScheduler(30, 29).save_pretrained(tmp_path / "wide")
    (tmp_path / "file").write_text("x")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the cat\nsat\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x81" * 50)
    text = lzma.compress(b"the cat sat on the mat\n" * 60)
    for name, train in {"good": text, "cut": text[:-9], "none": CUT_OFF, "empty": lzma.compress(b"")}.items():
        (tmp_path / f"{name}-corpus").mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / f"{name}-corpus" / f"{split}.txt.xz").write_bytes(train if split == "train" else text)
    (tmp_path / "latin-corpus").mkdir()
    (tmp_path / "latin-corpus" / "train.txt.xz").write_bytes(lzma.compress(b"\xff\xe4" * 50))
    return tmp_path


AT_LEAST = "it must be at least 1"
COMMANDS = {
    "distill": (
        "--pretrained_model_name_or_path m --output_dir out --num_samples 4 --num_eval_samples 4 --num_inference_steps 2 "
        "--sequence_length 6"
    ),
    "generate": "--pretrained_model_name_or_path m --output_dir out --num_samples 4 --length 5 --num_inference_steps 2",
    "pretrain": (
        "--corpus_dir good-corpus --output_dir out --vocab_size 262 --sequence_length 8 --hidden_size 16 --num_blocks 1 "
        "--num_heads 2 --max_train_steps 2"
    ),
    "pretrain_images": "--output_dir out",
}
LINES: dict[str, dict[str, str]] = {
    "distill": {
        "--num_inference_steps 0": r"--num_inference_steps is \[0\]; budgets must be at least 1",
        "--num_inference_steps 2.5": "--num_inference_steps: invalid int value: '2.5'",
        "--num_inference_steps": "--num_inference_steps: expected at least one argument",
        "--num_inference_steps 3": r"--teacher_steps 1024 is not a multiple of \[3\]",
        "--num_samples 0": f"--num_samples is 0; {AT_LEAST}",
        "--num_samples x": "--num_samples: invalid int value: 'x'",
        "--teacher_steps -4": f"--teacher_steps is -4; {AT_LEAST}",
        "--num_epochs 0": f"--num_epochs is 0; {AT_LEAST}",
        "--buckets 0": f"--buckets is 0; {AT_LEAST}",
        "--train_batch_size 0": f"--train_batch_size is 0; {AT_LEAST}",
        "--sequence_length -1": f"--sequence_length is -1; {AT_LEAST}",
        "--sequence_length 99": "`--sequence_length` is 99; this model takes at most 32",
        "--learning_rate nan": "--learning_rate is nan; it must be positive and finite",
        "--learning_rate inf": "--learning_rate is inf; it must be positive and finite",
        "--hamming_share nan": r"--hamming_share is nan; allowed are numbers in \[0, 1\)",
        "--seed -1": "--seed is -1; allowed are 0 to 4294967295",
        "--seed 99999999999": "--seed is 99999999999; allowed are 0 to 4294967295",
        "--method x": r"--method: invalid choice: 'x' \(choose from '?lsd",
        "--objective x": "--objective: invalid choice: 'x' .choose from",
        "--mixed_precision fp8": "--mixed_precision: invalid choice: 'fp8' .choose from",
        "--repaired": "--repaired is for --method lsd_plus",
        "--method marginal": "--num_samples is 4; --method marginal needs more than 21",
        "--method optimal_grid --num_samples 1": "a curve needs 2 sequences or more; there is 1 .`--max_data_samples`",
        "--train_file nowhere.txt": "--train_file nowhere.txt is not a file",
        "--train_file empty.txt": "`--train_file` empty.txt has no text; it must",
        "--train_file bytes.txt": "`--train_file` bytes.txt is not UTF-8 .*; it must be text",
        "--train_file short.txt": "2 documents have 3 tokens, fewer than one sequence of `--sequence_length` 6",
        "--report_to nothing": "Unsupported logging capability: nothing. Choose between .'all'",
        "--resume_from_checkpoint nowhere": "`--resume_from_checkpoint` nowhere is not a folder",
        "--resume_from_checkpoint checkpoint": "checkpoint checkpoint is damaged .*delete it",
        "--output_dir file": "--output_dir file is a file; it must be a folder",
        "--pretrained_model_name_or_path no/where/at": "is 'no/where/at'; there is no such folder",
        "--pretrained_model_name_or_path u": "`--pretrained_model_name_or_path` 'u' has uniform noise, .*--method search",
        "--pretrained_model_name_or_path discrete-schedulers/tiny-x": "'discrete-schedulers/tiny-x' is not bundled; ",
        "--push_to_hub --hub_model_id a/b/c": "--hub_model_id: .*'a/b/c'",
        "--wobble": "unrecognized arguments: --wobble",
    },
    "generate": {
        "--num_samples 0": f"--num_samples is 0; {AT_LEAST}",
        "--batch_size 0": f"--batch_size is 0; {AT_LEAST}",
        "--shard_size -1": f"--shard_size is -1; {AT_LEAST}",
        "--num_inference_steps 0": f"--num_inference_steps is 0; {AT_LEAST}",
        "--length 0": f"--length is 0; {AT_LEAST}",
        "--length 99": "`length` is 99; allowed are 1 to 32",
        "--length 1 --prompt the": "`prompt` has 1 tokens; `length` 1 leaves nothing to write",
        "--seed x": "--seed: invalid int value: 'x'",
        "--dtype int8": "--dtype: invalid choice: 'int8' .choose from",
        "--scheduler no/where/at": "no/where/at",
        "--scheduler wide": "`scheduler` has vocab_size 30, but the model has 22: they must be equal",
        "--scheduler four": "no coefficients for `num_inference_steps` 2; learned budgets: 4",
        "--pretrained_model_name_or_path no/where/at": "is 'no/where/at'; there is no such folder",
        "--pretrained_model_name_or_path discrete-schedulers/tiny-image": "tiny-image' is of .*, for images: load it",
        "--output_dir file": "--output_dir file is a file; it must be a folder",
        "--wobble": "unrecognized arguments: --wobble",
    },
    "pretrain": {
        "--max_train_steps 0": f"--max_train_steps is 0; {AT_LEAST}",
        "--train_batch_size -2": f"--train_batch_size is -2; {AT_LEAST}",
        "--learning_rate nan": "--learning_rate is nan; it must be positive and finite",
        "--learning_rate -1": "--learning_rate is -1.0; it must be positive and finite",
        "--weight_decay nan": "--weight_decay is nan; allowed are numbers of at least 0",
        "--max_grad_norm 0": "--max_grad_norm is 0.0; it must be positive and finite",
        "--ema_decay 1": r"--ema_decay is 1.0; allowed are numbers in \[0, 1\)",
        "--lr_decay_share nan": r"--lr_decay_share is nan; allowed are numbers in \(0, 1\]",
        "--data proteins": "--data: invalid choice: 'proteins' .choose from",
        "--vocab_size 0": f"--vocab_size is 0; {AT_LEAST}",
        "--vocab_size 9999": "`--vocab_size` is 9999, but this corpus makes .* tokens",
        "--sequence_length 0": f"--sequence_length is 0; {AT_LEAST}",
        "--sequence_length 99999": "`--sequence_length` is 99999, but a split has .* tokens",
        "--hidden_size 15": "--hidden_size is 15; it must be a multiple of --num_heads 2",
        "--num_heads 0": f"--num_heads is 0; {AT_LEAST}",
        "--num_blocks 0": f"--num_blocks is 0; {AT_LEAST}",
        "--corpus_dir nowhere": "`--corpus_dir`: nowhere/train.txt.xz could not be read .*it must be UTF-8 text in xz",
        "--corpus_dir cut-corpus": "`--corpus_dir`: cut-corpus/train.txt.xz could not be read",
        "--corpus_dir none-corpus": "`--corpus_dir`: none-corpus/train.txt.xz could not be read",
        "--corpus_dir latin-corpus": "`--corpus_dir`: latin-corpus/train.txt.xz could not be read .UnicodeDecodeError",
        "--corpus_dir empty-corpus": "`--corpus_dir`: empty-corpus/train.txt.xz has no text; it must",
        "--resume_from_checkpoint nowhere": "--resume_from_checkpoint nowhere is not a checkpoint; it must be a folder",
        "--output_dir file": "--output_dir file is a file; it must be a folder",
    },
    "pretrain_images": {
        "--num_codes 1": "--num_codes is 1; it must be at least 2",
        "--num_codes -1": f"--num_codes is -1; {AT_LEAST}",
        "--patch_size 0": f"--patch_size is 0; {AT_LEAST}",
        "--patch_size 5": "--patch_size is 5; it must divide 28",
        "--class_dropout nan": r"--class_dropout is nan; allowed are numbers in \[0, 1\]",
        "--cond_dim 0": f"--cond_dim is 0; {AT_LEAST}",
        "--num_heads 3": "--hidden_size is 128; it must be a multiple of --num_heads 3",
    },
}


@pytest.mark.parametrize(("command", "line"), [(command, line) for command in LINES for line in LINES[command]])
def test_a_command_refuses(
    command: str, line: str, command_folder: Path, refuses: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {"distill": distill, "generate": generate, "pretrain": pretrain, "pretrain_images": pretrain_images}

    def run() -> None:
        try:
            modules[command].main([*COMMANDS[command].split(), *line.split()])
        except SystemExit as ended:  # of the parser, which prints
            raise ValueError(capsys.readouterr().err.splitlines()[-1]) from ended

    refuses(run, LINES[command][line])
