"""What the methods of `distill.py` have of the run that they are part of: its model, data, state and processes."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    DiscreteScheduler,
    LearnedScheduler,
)
from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.training.data import batches, generators
from discrete_schedulers.training.frozen import Frozen
from discrete_schedulers.training.signals import stop_if_asked

# Purposes of random numbers, see `data.generators`; 0 is the shared noise of `draw_noise`
OPENED, JUDGED, DATA, PATHS, SEARCHED, CHOSEN, KNOWN, PROPOSED = range(1, 9)
NUMBERS_BETWEEN_CHECKPOINTS = 16
BETA_RANGE = (
    math.log(0.1),
    math.log(4.0),
)  # of the logarithms of a and b of Beta schedules; both 1/2 is the uniform grid


@dataclass
class Run:
    """What a method has of the run that it is part of.

    Args:
        args (`argparse.Namespace`): The arguments of the command.
        accelerator (`Accelerator`): The processes.
        frozen (`Frozen`): The model, on its device.
        base (`dict`): Config of the model's own scheduler, uniform grid, without coefficients.
        fit (`torch.Tensor` of shape `(n, L)`, *optional*): Sequences to fit on, for the methods that `FITS_ON_DATA`.
        state (`dict`): What a checkpoint keeps as JSON: coefficients by budget, number of evaluations, and more.
        tensors (`dict`): What a checkpoint keeps as tensors.
        save (`Callable`): Writes a checkpoint, with the scheduler so far where there is one.
        learned_for (`dict`): What the coefficients are learned for.
        classes (`torch.Tensor` of shape `(n,)`, *optional*): Of the sequences to fit on, where they are known, and
        heldout_classes (`torch.Tensor` of shape `(m,)`, *optional*): of those to measure on.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    frozen: Frozen
    base: dict[str, Any]
    fit: Tensor | None
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    save: Callable[[DiscreteScheduler | None], None]
    learned_for: dict[str, Any]
    classes: Tensor | None = None
    heldout_classes: Tensor | None = None
    passed: list[int] = field(default_factory=list)  # sequences in each call of the network since they were counted
    since: float = field(default_factory=time.monotonic)  # up to when seconds have been counted

    @property
    def pipe(self) -> DiscreteDiffusionPipeline | DiscreteImagePipeline:
        return self.frozen.pipe

    @property
    def length(self) -> int:
        return self.frozen.length

    @property
    def denoiser(self) -> Denoiser:
        """The network, told no class and no prompt."""
        return self.frozen.denoiser

    @property
    def data(self) -> Tensor:
        assert self.fit is not None
        return self.fit

    @property
    def mask_token_id(self) -> int:
        return self.base["mask_token_id"]

    def share(self, count: int) -> range:
        """This process' share of `count` samples: every P-th of them."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        stop_if_asked(self.accelerator)
        # gloo and NCCL both take float64; the tensor has to be where the process group works
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").cpu()

    def gather(self, x: Tensor, count: int) -> Tensor:
        """What all processes have of `count` samples, each its `share`, in order of the sample index, on the CPU."""
        return gather_samples(self.accelerator, x, count)

    def by_batches(self, count: int, work: Callable[[range], Tensor], empty: Tensor) -> Tensor:
        """What `work` makes of the samples 0 .. count - 1, a batch at a time, all of it on every process.

        Whole batches go round the processes, which meet after each round: which samples share a batch, and so what comes out,
        does not depend on the number of processes (but for the rounding of matrix products, which may depend on where memory
        lies).

        Args:
            count (`int`): Number of samples.
            work (`Callable`): Some indices, at most `train_batch_size`, to a row (F,) for each, (b, F).
            empty (`torch.Tensor` of shape `(0, F)`): What a process without a batch has made.

        Returns:
            `torch.Tensor` of shape `(count, F)`: On the CPU.
        """
        size, processes = max(min(self.args.train_batch_size, count), 1), self.accelerator.num_processes
        parts, rounds = batches(count, size), []
        for start in range(0, len(parts), processes):
            now = parts[start : start + processes]
            made = [work(part) for part in now[self.accelerator.process_index :][:1]]
            made = [torch.cat([x, x[:1].expand(size - len(x), -1)]).flatten() for x in made]
            own = torch.stack(made) if made else empty.new_empty(0, size * empty.shape[1])
            rounds.append(self.gather(own.to(self.accelerator.device), len(now)).view(-1, empty.shape[1]))
        return torch.cat(rounds)[:count] if rounds else empty

    def samples(self, purpose: int, numbers: range, steps: int) -> tuple[Tensor, Tensor]:
        """Samples of the pipeline with its scheduler, those with these numbers, int64 (n, L), and the model calls of each one's
        batch, (n,): the same whatever the number of processes."""

        def work(indices: range) -> Tensor:
            own = numbers[indices.start : indices.stop]
            ((x, calls),) = draw(self.frozen, purpose, own, steps, self.args)
            return torch.cat([x, x.new_full((len(x), 1), calls)], dim=1)

        found = self.by_batches(len(numbers), work, torch.empty(0, self.length + 1, dtype=torch.int64))
        return found[:, :-1].contiguous(), found[:, -1]

    def count_calls(self) -> Callable[[], None]:
        """Count the sequences that go through the network from now on, until the function returned is called."""

        def count(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.passed.append(len(inputs[0] if inputs else next(iter(named.values()))))

        return self.pipe.model.register_forward_pre_hook(count, with_kwargs=True).remove

    def add_evaluations(self) -> None:
        """Add what went through the network since the last time to the evaluations of the run."""
        passed = int(self.reduce(torch.tensor(sum(self.passed), dtype=torch.float64)))
        self.state["evaluations"] += passed
        self.passed.clear()

    def add_seconds(self, what: str) -> None:
        """Add the seconds since the last time to those of the run, of all its sessions, for `"learning"` or `"measuring"`."""
        now = time.monotonic()
        seconds = self.state.setdefault("seconds", {"learning": 0.0, "measuring": 0.0})
        seconds[what] += now - self.since
        self.since = now

    def numbers(self, key: str) -> Callable[[Callable[[], list[float]]], list[float]]:
        """A memory of what a search measures, for a run that was killed: a function that runs the work it is given and keeps
        the numbers, or returns those that the same search has had in this place before. All processes have to give the same.

        Calls of the network between the last `add_evaluations` and this one are counted with the first numbers.
        """
        kept = self.state.setdefault("numbers", {}).setdefault(key, [])
        if kept:
            self.passed.clear()
        asked = itertools.count()

        def measured(work: Callable[[], list[float]]) -> list[float]:
            place = next(asked)
            if place == len(kept):
                found = work()
                self.add_evaluations()
                kept.append(found)  # no call and no meeting of processes in between: SIGTERM would part them
                if len(kept) % NUMBERS_BETWEEN_CHECKPOINTS == 0:
                    self.save(None)
            return kept[place]

        return measured

    def each_budget(
        self,
        learn: Callable[[int], dict[str, list[float]]],
        scheduler: Callable[[dict[str, dict[str, list[float]]]], DiscreteScheduler],
    ) -> DiscreteScheduler:
        """Learn the blocks of every budget that has none yet, with a checkpoint after each.

        Args:
            learn (`Callable`): Number of steps to the blocks of floats.
            scheduler (`Callable`): All coefficients to the scheduler that runs them.
        """
        coefficients = self.state["coefficients"]
        for steps in self.args.num_inference_steps:
            if str(steps) in coefficients:
                continue
            blocks = learn(steps)
            self.add_evaluations()
            coefficients[str(steps)] = blocks
            self.state.pop("numbers", None)
            self.accelerator.print(f"{steps} steps: {json.dumps(coefficients[str(steps)])}")
            self.save(scheduler(coefficients))
        return scheduler(coefficients)

    def learned(self, **settings: Any) -> Callable[[dict[str, dict[str, list[float]]]], LearnedScheduler]:
        """For `each_budget`: a [`LearnedScheduler`] with these settings."""
        return lambda coefficients: LearnedScheduler.from_config(
            self.base, coefficients=coefficients, learned_for=self.learned_for, **settings
        )


def gather_samples(accelerator: Accelerator, x: Tensor, num_samples: int) -> Tensor:
    """What all processes have, (B, F) each, as (num_samples, F) in order of the sample index, on the CPU.

    Process r of P has the samples r, r + P, ...; those with one sample fewer pad.
    """
    stop_if_asked(accelerator)
    rows = -(-num_samples // accelerator.num_processes)
    x = torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])
    everyone = accelerator.gather(x).view(accelerator.num_processes, rows, -1)
    return everyone.transpose(0, 1).flatten(0, 1)[:num_samples].cpu()


def sample(frozen: Frozen, purpose: int, indices: range, steps: int, args: argparse.Namespace) -> Tensor:
    """Samples of the pipeline with its scheduler, int64 (n, L); each depends on its index only."""
    return torch.cat([x for x, _ in draw(frozen, purpose, indices, steps, args)])


def draw(
    frozen: Frozen, purpose: int, indices: range, steps: int, args: argparse.Namespace
) -> Iterator[tuple[Tensor, int]]:
    """The same batch by batch, with the model calls of each."""
    for part in batches(len(indices), args.train_batch_size):
        own = indices[part.start : part.stop]
        yield frozen.draw(own, steps, generators(args.seed, purpose, own))


def absorbing(scheduler: DiscreteScheduler) -> AbsorbingProcess:
    assert isinstance(scheduler.noise_process, AbsorbingProcess)
    return scheduler.noise_process
