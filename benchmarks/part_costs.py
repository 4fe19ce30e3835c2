"""Part `costs`: what whole generation costs with logits at chosen rows, how the cost of a step grows, and what an import costs.

generation   DDiT-small (12 blocks of 768, random weights), one sequence, fixed counts: network and step at a few calls of a
             run, with the head at chosen rows; with all logits and the same draws; and with all logits and the dense
             one-stage draw of part `steps`. Every call of a run costs the same, so that ratios are those of whole runs.
growth       the exponents that a step's time (of N: a run's time) grows with, by least squares on logarithms
package      `import discrete_schedulers` beside importing torch and diffusers' ConfigMixin, in processes of their own, and
             the size of the installed files
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from part_steps import dense_reference, elapsed, states_of
from store import Store

import discrete_schedulers
from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DDiTModel,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
)

FULL = {
    "model": {"vocab_size": 50258, "hidden_size": 768, "num_blocks": 12, "num_heads": 12, "max_length": 1024},
    "steps": 64,
    "calls": [8, 24, 40, 56],  # of the 64, that are timed
    "sizes": {"B": [1, 2, 4, 8], "L": [256, 512, 1024, 2048], "V": [4000, 8000, 16000, 32000], "N": [8, 16, 32, 64]},
    "base": {"B": 2, "L": 512, "V": 8000, "N": 16},  # of the sizes that do not vary
    "repeats": 7,
    "imports": 5,
    "threads": 1,
}
QUICK = FULL | {
    "model": {"vocab_size": 700, "hidden_size": 32, "num_blocks": 1, "num_heads": 2, "max_length": 32},
    "calls": [8, 40],
    "sizes": {"B": [1, 2], "L": [32, 64], "V": [700, 1400], "N": [4, 8]},
    "base": {"B": 1, "L": 32, "V": 700, "N": 8},
    "repeats": 2,
    "imports": 1,
}
GROWING = {"ancestral": AncestralScheduler, "confidence": ConfidenceScheduler}


@torch.no_grad()
def generation(settings: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a call of a run, three ways, taken in turn."""
    facts, steps = settings["model"], settings["steps"]
    width, length = facts["vocab_size"], facts["max_length"]
    torch.manual_seed(0)
    scheduler = AncestralScheduler(vocab_size=width, mask_token_id=width - 1)
    pipe = DiscreteDiffusionPipeline(DDiTModel(**facts, cond_dim=None).eval(), scheduler)
    denoiser = pipe.denoiser
    scheduler.set_timesteps(steps)
    found: dict[str, list[float]] = {"rows": [], "dense": [], "one_stage": []}
    for index in [settings["calls"][0], *settings["calls"]]:  # the first one is run once before
        t, generator = float(scheduler.timesteps[index]), torch.Generator().manual_seed(index)
        x = torch.randint(0, width - 1, (1, length), generator=generator)
        x[torch.rand(1, length, generator=generator).argsort(1).argsort(1) < length * (steps - index) // steps] = (
            width - 1
        )
        seeded = [torch.Generator().manual_seed(index) for _ in range(3)]

        def rows(x: torch.Tensor = x, t: float = t, index: int = index, g: torch.Generator = seeded[0]) -> torch.Tensor:
            chosen = scheduler.positions(index, x, g)
            return scheduler.step(denoiser(x, t, chosen), index, x, generator=g).prev_sample

        def dense(
            x: torch.Tensor = x, t: float = t, index: int = index, g: torch.Generator = seeded[1]
        ) -> torch.Tensor:
            return scheduler.step(denoiser(x, t), index, x, generator=g).prev_sample

        def one_stage(
            x: torch.Tensor = x, t: float = t, index: int = index, g: torch.Generator = seeded[2]
        ) -> torch.Tensor:
            opens = scheduler.open_probability(index)
            return dense_reference(denoiser(x, t), x, opens, width - 1, g)

        for name, run in (("rows", rows), ("dense", dense), ("one_stage", one_stage)):
            found[name].append(elapsed(run))
    return {name: median(values[1:]) for name, values in found.items()}


def step_seconds(cls: type[DiscreteScheduler], sizes: dict[str, int], repeats: int, whole_run: bool) -> float:
    """Median time of a step in the middle of a run, with all logits given; or of all steps of a run on the same logits."""
    shape = [sizes["B"], sizes["L"], sizes["V"]]
    scheduler = cls(vocab_size=shape[2], mask_token_id=shape[2] - 1)
    logits = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(sizes["N"])

    def run(state: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        if not whole_run:
            scheduler.step(logits, sizes["N"] // 2, state, generator=generator)
            return
        x = torch.full_like(state, shape[2] - 1)
        for index in range(sizes["N"]):
            x = scheduler.step(logits, index, x, generator=generator).prev_sample

    states = states_of(shape, False, repeats + 1, 0)
    return median([elapsed(lambda s=state: run(s)) for state in states][1:])


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def import_seconds(statement: str) -> float:
    """Processor time of an import in a new process."""
    code = f"import time; began = time.process_time(); {statement}; print(time.process_time() - began)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def package(settings: dict[str, Any]) -> dict[str, float]:
    """Import times, taken in turn, and megabytes of the package's files."""
    statements = {"ours": "import discrete_schedulers", "base": "import torch; from diffusers import ConfigMixin"}
    found: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(settings["imports"] + 1):  # the first ones fill the disk's cache
        for name, statement in statements.items():
            found[name].append(import_seconds(statement))
    root = Path(discrete_schedulers.__file__).parent
    folders = {folder.resolve() for folder in (root, root / "pipelines", root / "training")}
    files = {
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    size = sum(path.stat().st_size for path in files) / 1e6
    return {name: median(values[1:]) for name, values in found.items()} | {"megabytes": round(size, 2)}


def run(folder: Path, seeds: list[int], quick: bool) -> Store:
    """Compute what is missing of results/costs.json. Times depend on no seed."""
    settings = QUICK if quick else FULL
    store = Store(folder, "costs", settings)
    if store.complete:
        return store
    threads = torch.get_num_threads()
    torch.set_num_threads(settings["threads"])
    if store.get("generation") is None:
        print("costs: generation", flush=True)
        store.put(generation(settings), "generation")
    for name, cls in GROWING.items():
        for axis, sizes in settings["sizes"].items():
            if store.get("growth", name, axis) is None:
                print(f"costs: growth of {name} in {axis}", flush=True)
                repeats = settings["repeats"]
                seconds = [step_seconds(cls, settings["base"] | {axis: n}, repeats, axis == "N") for n in sizes]
                store.put({"seconds": seconds, "exponent": exponent(sizes, seconds)}, "growth", name, axis)
    if store.get("package") is None:
        print("costs: package", flush=True)
        store.put(package(settings), "package")
    torch.set_num_threads(threads)
    store.finish()
    return store
