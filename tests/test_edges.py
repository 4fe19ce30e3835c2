"""The package's edges: warnings of its imports, copies and pickles of what it makes, threads, and what it says it needs."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from laws import random_denoiser
from packaging.requirements import Requirement
from packaging.version import Version
from scheduler_cases import CASES, SchedulerCase
from test_latent import adapted
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_pipeline
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    BlockRefinementAdapter,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    ForeignScheduler,
    InformationCurve,
    LearnedScheduler,
    ScheduleConditionedProcess,
    UniformProcess,
)
from discrete_schedulers.scud import JumpKernel

V = 7
ROOT = Path(__file__).parent.parent
FACTS = {"vocab_size": len(WORDS), "mask_token_id": MASK}

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


# Imports


@pytest.mark.slow
def test_imports_warn_of_nothing() -> None:
    """`import discrete_schedulers` with warnings as errors; then every module and every public name, where what other
    packages warn of in their own files is theirs."""
    code = """
import discrete_schedulers, importlib, json, pkgutil, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    names = [module.name for module in pkgutil.walk_packages(discrete_schedulers.__path__, "discrete_schedulers.")]
    for name in names:
        importlib.import_module(name)
    for name in discrete_schedulers.__all__:
        getattr(discrete_schedulers, name)
print(json.dumps([names, [[str(w.message), w.filename] for w in seen]]))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names, seen = json.loads(done.stdout.splitlines()[-1])
    assert {"discrete_schedulers.sampling", "discrete_schedulers.training.distill"} <= set(names)
    ours = [str(Path(folder).resolve()) for folder in (ROOT / "src", ROOT / "pipelines", ROOT / "training")]
    told = [warning for warning in seen if str(Path(warning[1]).resolve()).startswith(tuple(ours))]
    assert told == []


@pytest.mark.filterwarnings("error")
def test_the_compiler_warns_of_nothing() -> None:
    """Which Python says only where there is no bytecode yet."""
    for folder in ("src", "pipelines", "training", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            compile(path.read_text(), str(path), "exec")


# What the package says it needs


def pins(name: str) -> dict[str, Version]:
    lines = [line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {name: Version(version) for name, version in lines}


def test_constraints_are_the_ends_of_what_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    allowed = {item.name: item.specifier for item in map(Requirement, lines) if item.name != project["name"]}
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    assert {name for name in allowed if newest.get(name) not in allowed[name]} == set()
    floors = {name: Version(bound.version) for name in allowed for bound in allowed[name] if bound.operator == ">="}
    assert floors.keys() == allowed.keys()
    del floors["torch"]  # not tested: see CONTRIBUTING.md
    assert oldest == floors


# Copies


def start(case: SchedulerCase) -> Tensor:
    """Five rows of eleven tokens, some of them known where there is a mask."""
    x = torch.randint(0, V - 1, (5, 11), generator=seeded(8))
    return torch.where(torch.rand(5, 11, generator=seeded(9)) < 0.7, V - 1, x) if case.is_absorbing else x


def calls(scheduler: DiscreteScheduler, x: Tensor, generator: torch.Generator, indices: range) -> Tensor:
    """The sample after these calls of a run, with the rows that the scheduler asks for."""
    denoiser = random_denoiser(V, seed=3)
    for index in indices:
        scheduler.model_inputs(index, x, None, generator)
        rows = denoiser(x, float(scheduler.timesteps[index]), scheduler.positions(index, x, generator))
        x = scheduler.step(rows, index, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_copy_goes_on_in_the_middle_of_a_run(case: SchedulerCase) -> None:
    """With whatever it remembers; and the copies, run first and at once, do not disturb the one they were taken of."""
    scheduler, generator = case.build(V), seeded(1)
    scheduler.set_timesteps(4)
    number = len(scheduler.timesteps)
    # after one call: in the middle of a step, where steps have several; and the last call is taken from a copy too
    for stop in (1, number - 1):
        x = calls(scheduler, start(case), generator.manual_seed(1), range(stop))
        state = generator.get_state()
        rest = range(stop, number)
        copies = {name: make(scheduler) for name, make in COPIES.items()}
        ends = {}
        for name, other in copies.items():
            assert other is not scheduler
            assert other.config == scheduler.config
            generator.set_state(state)
            ends[name] = calls(other, x, generator, rest)
        generator.set_state(state)
        expected = calls(scheduler, x, generator, rest)
        for end in ends.values():
            assert torch.equal(end, expected)
        scheduler.set_timesteps(4)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_of_what_is_no_scheduler_of_the_list(make: Callable[[Any], Any]) -> None:
    x_0, law = torch.randint(0, V - 1, (3, 5), generator=seeded()), torch.rand(3, 5, V, generator=seeded(1)).double()
    kernel = JumpKernel(torch.full((V,), 1 / V, dtype=torch.float64))
    for process in (AbsorbingProcess(V, V - 1, "cosine"), UniformProcess(V), ScheduleConditionedProcess(kernel)):
        other = make(process)
        assert type(other) is type(process)
        assert torch.equal(other.add_noise(x_0, 0.4, seeded(2)), process.add_noise(x_0, 0.4, seeded(2)))
        if not isinstance(process, ScheduleConditionedProcess):
            assert torch.equal(other.posterior(x_0, law, 0.6, 0.3), process.posterior(x_0, law, 0.6, 0.3))
    curve = InformationCurve.from_config([2.0, 1.5, 1.0])
    assert vars(make(curve)).keys() == vars(curve).keys()
    foreign = ForeignScheduler(diffusers.BlockRefinementScheduler(), V, V - 1)
    adapter = BlockRefinementAdapter(AncestralScheduler(V, V - 1))
    ours, masks = make(foreign), torch.full((2, 6), V - 1)
    for scheduler in (foreign, ours):
        scheduler.set_timesteps(3)
    assert torch.equal(*(calls(scheduler, masks, seeded(), range(3)) for scheduler in (foreign, ours)))
    copied = make(adapter)
    for one in (adapter, copied):
        one.set_timesteps(2)
    logits = torch.randn(2, 6, V, generator=seeded(4))
    first, second = (
        one.step(logits, 0, masks, mask_token_id=V - 1, generator=seeded()).prev_sample for one in (adapter, copied)
    )
    assert torch.equal(first, second)


# Threads


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(jobs: list[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of jobs that begin at one moment, each in a thread of its own."""
    gate = threading.Barrier(len(jobs))

    def wait(job: Callable[[], Tensor]) -> Tensor:
        gate.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(wait, job) for job in jobs]]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("part", range(4))
def test_schedulers_in_threads(part: int) -> None:
    """A copy for each thread, all classes at once: the samples are those of each alone."""

    def job(case: SchedulerCase, scheduler: DiscreteScheduler) -> Callable[[], Tensor]:
        def run() -> Tensor:
            mine = copy.deepcopy(scheduler)
            mine.set_timesteps(3)
            return calls(mine, start(case), seeded(5), range(len(mine.timesteps)))

        return run

    jobs = [job(case, scheduler) for case in CASES[part::4] for scheduler in [case.build(V)] for _ in range(2)]
    for alone, among in zip([one() for one in jobs], together(jobs), strict=True):
        assert torch.equal(alone, among)


def bert_with_head() -> DiscreteDiffusionPipeline:
    """Its head runs at chosen positions by a hook."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = randomised(BertForMaskedLM(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)))
    return tiny_pipeline(model=bert, denoiser={"max_length": 32, "head": "cls"})


def with_latent() -> DiscreteDiffusionPipeline:
    """A latent of each row is added by a hook."""
    facts = {"time_input": "sigma", "max_length": 32}
    return tiny_pipeline(LearnedScheduler(**FACTS, network_latent=True), model=adapted(None), denoiser=facts)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("build", [tiny_pipeline, bert_with_head, with_latent])
def test_one_network_in_threads(build: Callable[[], DiscreteDiffusionPipeline]) -> None:
    """A pipeline for each thread, with the one network and a copy of the one scheduler."""
    shared, number = build(), 4

    def job(seed: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            mine = DiscreteDiffusionPipeline(
                **shared.components | {"scheduler": copy.deepcopy(shared.scheduler)}, denoiser=shared.config.denoiser
            )
            mine.set_progress_bar_config(disable=True)
            samples = [
                mine(length=LENGTH + seed, num_inference_steps=6, output_type="pt", generator=seeded(seed + 10 * k))[0]
                for k in range(5)
            ]
            return torch.cat(samples)

        return run

    jobs = [job(seed) for seed in range(number)]
    alone = [one() for one in jobs]
    assert not torch.equal(alone[0][:, :5], alone[1][:, :5])
    for one, among in zip(alone, together(jobs), strict=True):
        assert torch.equal(one, among)
    assert not any(module._forward_pre_hooks for module in shared.model.modules())
