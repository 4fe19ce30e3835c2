"""Part `steps`: one `step` of a scheduler, without the network, beside a dense reference and beside diffusers' schedulers.

The state is in the middle of a run: half of the positions are masks (with uniform noise: random tokens), and a step is to open
L / N of them in each sequence. Logits are random and float32 and lie in memory; the state, and so the rows that are needed,
changes from one repeat to the next. All ratios are of medians from this one run.

    one read        summing the rows of logits that the method needs, once
    reference       the dense one-stage step of published code: one-hot, transition law and exponential noise for every state of
                    every position, in float64
    extra memory    the largest sum of tensors that were alive at once beside the arguments, by torch's own count

The reference and diffusers' schedulers run on slices of `slice` positions, one after the other, so that they fit into memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import diffusers
import torch
from store import Store
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteDDIMScheduler,
    DiscreteScheduler,
    EntropyBoundScheduler,
    EulerScheduler,
    LSDScheduler,
    RemaskingScheduler,
    RowLogits,
    TauLeapingScheduler,
    ThresholdScheduler,
    UniformEntropyBoundScheduler,
)

FULL = {
    "shapes": [[4, 1024, 50258], [1, 4096, 126464]],  # B, L, V: GPT-2's tokens and a mask, LLaDA's
    "steps": 64,
    "repeats": 9,
    "slow_repeats": 3,  # of what takes seconds
    "slice": 1024,
    "threads": 1,
}
QUICK = FULL | {"shapes": [[2, 64, 700]], "repeats": 3, "slow_repeats": 2, "slice": 32}


class Ours(NamedTuple):
    """A scheduler of this library.

    Args:
        name (`str`): What it is called in the results.
        cls (`type`): Its class.
        kwargs (`dict`): Arguments, beside the vocabulary.
        given (`str`): `"all"` logits, or the chosen `"rows"` as a network with a split head returns them.
        theirs (`str`, *optional*): The scheduler of diffusers that does the same.
        dtype (`torch.dtype`): Of the logits.
    """

    name: str
    cls: type[DiscreteScheduler]
    kwargs: dict[str, Any]
    given: str = "all"
    theirs: str | None = None
    dtype: torch.dtype = torch.float32


OURS = (
    Ours("ancestral, counts", AncestralScheduler, {}, "rows"),
    Ours("ancestral, counts", AncestralScheduler, {}, "all", "AmusedScheduler"),
    Ours("ancestral, counts, bfloat16", AncestralScheduler, {}, "all", None, torch.bfloat16),
    Ours("ancestral, bernoulli", AncestralScheduler, {"unmasking": "bernoulli"}),
    Ours("Euler", EulerScheduler, {}),
    Ours("tau-leaping", TauLeapingScheduler, {}),
    Ours("LSD", LSDScheduler, {}),
    Ours("remasking", RemaskingScheduler, {}),
    Ours("confidence", ConfidenceScheduler, {}, "all", "BlockRefinementScheduler"),
    Ours("confidence, bfloat16", ConfidenceScheduler, {}, "all", None, torch.bfloat16),
    Ours("entropy bound", EntropyBoundScheduler, {}),
    Ours("threshold", ThresholdScheduler, {}, "all", "BlockRefinementScheduler"),
    Ours("ancestral, uniform noise", AncestralScheduler, {"process": "uniform"}),
    Ours("discrete DDIM, uniform noise", DiscreteDDIMScheduler, {}, "all", "DiscreteDDIMScheduler"),
    Ours("entropy bound, uniform noise", UniformEntropyBoundScheduler, {}, "all", "EntropyBoundScheduler"),
)
UNIFORM = (DiscreteDDIMScheduler, UniformEntropyBoundScheduler)
THEIRS = ("AmusedScheduler", "BlockRefinementScheduler", "EntropyBoundScheduler", "DiscreteDDIMScheduler")


def seconds(run: Callable[[Any], Any], states: list[Any]) -> float:
    """Median time of `run` over these states; the first one is run once before, without a clock."""
    run(states[0])
    found = []
    for state in states:
        began = time.perf_counter()
        run(state)
        found.append(time.perf_counter() - began)
    return median(found)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The largest sum of tensors that `run` had allocated at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def read(logits: Tensor, positions: Tensor) -> None:
    """Sum each of these rows, once."""
    for row, column in positions.nonzero().tolist():
        logits[row, column].sum()


def dense_reference(logits: Tensor, sample: Tensor, opens: float, mask: int, generator: torch.Generator) -> Tensor:
    """The absorbing ancestral step as published: all states of all positions, "stay" among them, in one draw, float64."""
    p_0 = logits.double().softmax(-1)
    one_hot = torch.nn.functional.one_hot(sample, logits.shape[-1]).double()
    law = torch.where((sample == mask)[..., None], opens * p_0 + (1 - opens) * one_hot, one_hot)
    noise = -torch.rand(law.shape, generator=generator, dtype=torch.float64).log()
    return (law / noise).argmax(-1)


def slices(logits: Tensor, sample: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Arguments cut into pieces of at most so many positions, one sequence each."""
    pairs = zip(logits.split(1), sample.split(1), strict=True)
    return [part for a, b in pairs for part in zip(a.split(size, 1), b.split(size, 1), strict=True)]


def their_step(name: str, steps: int, mask: int, logits: Tensor, sample: Tensor, generator: torch.Generator) -> None:
    """The step in the middle of a run by a scheduler of diffusers, with tokens drawn at temperature 1."""
    scheduler = getattr(diffusers, name)(**({"mask_token_id": mask} if name == "AmusedScheduler" else {}))
    extra: dict[str, Any] = {}
    if name == "BlockRefinementScheduler":
        scheduler.set_timesteps(steps, block_length=sample.shape[1])
        extra = {"mask_token_id": mask, "temperature": 1.0}
    else:
        scheduler.set_timesteps(steps)
    if name == "DiscreteDDIMScheduler":
        extra = {"temperature": 1.0}
    scheduler.step(logits, steps // 2, sample, generator=generator, **extra)


def states_of(shape: list[int], is_uniform: bool, count: int, seed: int) -> list[Tensor]:
    """Samples with a random half of masks, or random tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(0, shape[2] - 1, tuple(shape[:2]), generator=generator)
        rank = torch.rand(tuple(shape[:2]), generator=generator).argsort(1).argsort(1)
        found.append(tokens if is_uniform else tokens.masked_fill(rank < shape[1] // 2, shape[2] - 1))
    return found


def measure(ours: Ours, logits: Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """Time, the time of one read of the rows it needs, and extra memory of one of our schedulers."""
    shape = list(logits.shape)
    is_uniform = ours.cls in UNIFORM or ours.kwargs.get("process") == "uniform"
    scheduler = ours.cls(vocab_size=shape[2], mask_token_id=None if is_uniform else shape[2] - 1, **ours.kwargs)
    scheduler.set_timesteps(settings["steps"])
    index = settings["steps"] // 2
    states, given, rows = states_of(shape, is_uniform, settings["repeats"], 0), [], []
    for number, sample in enumerate(states):
        positions = scheduler.positions(index, sample, torch.Generator().manual_seed(number))
        rows.append(torch.ones_like(sample, dtype=torch.bool) if positions is None else positions)
        given.append(RowLogits(logits[rows[-1]], rows[-1]) if ours.given == "rows" else logits)

    def run(number: int) -> None:
        scheduler.set_timesteps(settings["steps"])
        generator = torch.Generator().manual_seed(number)
        if ours.given == "rows":
            scheduler.positions(index, states[number], generator)  # part of the job; `step` does it with all logits
        scheduler.step(given[number], index, states[number], generator=generator)

    numbers = list(range(len(states)))
    reads = [given[n].logits[:, None] if ours.given == "rows" else logits for n in numbers]
    where = [torch.ones(len(r), 1, dtype=torch.bool) for r in reads] if ours.given == "rows" else rows
    return {
        "rows": median(int(positions.sum()) for positions in rows),
        "seconds": seconds(run, numbers),
        "read_seconds": seconds(lambda n: read(reads[n], where[n]), numbers),
        "extra_memory": peak_bytes(lambda: run(0)) / (logits.numel() * logits.element_size()),
    }


def run(folder: Path, seeds: list[int], quick: bool) -> Store:
    """Compute what is missing of results/steps.json. Times depend on no seed."""
    settings = QUICK if quick else FULL
    store = Store(folder, "steps", settings)
    if store.complete:
        return store
    threads = torch.get_num_threads()
    torch.set_num_threads(settings["threads"])
    generator = torch.Generator()
    for shape in settings["shapes"]:
        key, mask = "x".join(map(str, shape)), shape[2] - 1
        logits = torch.empty(shape).normal_(generator=generator.manual_seed(0)).mul_(3)
        few = settings["slow_repeats"]
        opens = 2 / settings["steps"]  # of the masks that are left, half of all: L / N

        def reference(sample: Tensor, logits: Tensor = logits, opens: float = opens, mask: int = mask) -> None:
            for some, tokens in slices(logits, sample, settings["slice"]):
                dense_reference(some, tokens, opens, mask, generator)

        if store.get(key, "reference") is None:
            print(f"steps: {key}, reference", flush=True)
            states = states_of(shape, False, few, 1)
            store.put({"seconds": seconds(reference, states)}, key, "reference")
        for name in THEIRS:
            if store.get(key, "diffusers", name) is None:
                print(f"steps: {key}, diffusers {name}", flush=True)
                states = states_of(shape, name in ("DiscreteDDIMScheduler", "EntropyBoundScheduler"), few, 1)

                def theirs(sample: Tensor, logits: Tensor = logits, name: str = name, mask: int = mask) -> None:
                    for some, tokens in slices(logits, sample, settings["slice"]):
                        their_step(name, settings["steps"], mask, some, tokens, generator)

                some, tokens = slices(logits, states[0], settings["slice"])[0]
                peak = peak_bytes(
                    lambda n=name, a=some, b=tokens, m=mask: their_step(n, settings["steps"], m, a, b, generator)
                )
                row = {"seconds": seconds(theirs, states), "extra_memory": peak / (some.numel() * 4)}
                store.put(row, key, "diffusers", name)
        for ours in OURS:
            if store.get(key, "ours", f"{ours.name}; {ours.given}") is None:
                print(f"steps: {key}, {ours.name}, {ours.given} given", flush=True)
                row = measure(ours, logits.to(ours.dtype), settings)
                store.put(row, key, "ours", f"{ours.name}; {ours.given}")
        del logits
    torch.set_num_threads(threads)
    store.finish()
    return store
