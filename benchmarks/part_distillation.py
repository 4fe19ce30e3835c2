"""Part `distillation`: what learning coefficients costs, and what the coefficients are worth, on the bundled text model.

Each method is a run of `training/distill.py` with its defaults (a teacher of 1,024 steps and 64 samples for LSD and LSD+), on
chapters of the validation split, in bfloat16. The cost is the sequences that went through the network and the seconds of
learning, as the run counts them. The worth is the NLL bound on held-out windows, from their information curves (part
`tiny-text`, which has to be there): the same expectation as `sampler_nll_bound` without its noise.

The floats of part `learned-text` have their costs from there. The optimal grid is also measured on fewer sequences, at 16
levels each, down to a hundredth of what a teacher of LSD may cost (samples times steps). A time-free teacher is only asked when
something has opened, so that its runs cost less than that.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from learned import counted
from part_tiny_text import MODEL, fingerprint, read_split
from samplers import plan_of, random_order_nll
from store import Store, summary
from torch import Tensor

import discrete_schedulers as ds
from discrete_schedulers.training import distill
from discrete_schedulers.training.data import pack

METHODS = {
    "lsd": ["--method", "lsd"],
    "lsd_plus": ["--method", "lsd_plus", "--repaired"],
    "jys": ["--method", "jys"],
    "jys-exact": ["--method", "jys", "--unbiased"],
    "optimal_grid": ["--method", "optimal_grid"],
}
LABELS = {
    "lsd": "LSD",
    "lsd_plus": "LSD+ (repaired)",
    "jys": "JYS (KLUB, golden section)",
    "jys-exact": "JYS, its token part solved exactly",
    "optimal_grid": "optimal grid",
    "floats": "learned floats (part `learned-text`)",
}
FULL = {
    "budgets": [4, 8, 16],
    "teacher": [64, 1024],  # samples and steps
    "levels": 16,
    "sequences": [40, 80, 204, 400],  # that the optimal grid is measured on
}
QUICK = FULL | {"budgets": [2, 4], "teacher": [2, 8], "sequences": [2]}


def bounds(store: dict[str, Any], scheduler: ds.DiscreteScheduler, steps: int) -> list[float]:
    """NLL bound of a sampler with random order, nats per token, on each held-out curve."""
    plan = plan_of(scheduler, steps)
    curves = store["heldout_curves"].values()
    return [random_order_nll(torch.tensor(curve, dtype=torch.float64), plan) for curve in curves]


def learn(method: str, settings: dict[str, Any]) -> tuple[ds.DiscreteScheduler, dict[str, Any]]:
    """A run of the script: the scheduler and its costs."""
    samples, steps = map(str, settings["teacher"])
    with tempfile.TemporaryDirectory() as folder:
        texts, output = Path(folder) / "texts.txt", Path(folder) / "out"
        texts.write_text("\n".join(read_split("validation")))
        arguments = ["--pretrained_model_name_or_path", MODEL, "--train_file", str(texts), "--output_dir", str(output)]
        arguments += ["--num_inference_steps", *map(str, settings["budgets"]), "--mixed_precision", "bf16"]
        arguments += ["--train_batch_size", "32", "--num_eval_samples", "2", *METHODS[method]]
        if method in ("lsd", "lsd_plus"):
            arguments += ["--num_samples", samples, "--teacher_steps", steps]
        metrics = distill.main(arguments)
        (state,) = output.glob("checkpoint-*/state.json")
        seconds = json.loads(state.read_text())["seconds"]["learning"]
        config = json.loads((output / "scheduler_config.json").read_text())
        scheduler = getattr(ds, config["_class_name"]).from_pretrained(output)
    return scheduler, {"evaluations": metrics["sequence_evaluations"], "seconds": seconds}


def grid_of_fewer(
    pipe: ds.DiscreteDiffusionPipeline, data: Tensor, levels: int, seed: int
) -> tuple[ds.DiscreteScheduler, dict[str, Any]]:
    """The optimal grid from the curve of these sequences."""
    started = time.perf_counter()
    mask = pipe.config.denoiser["mask_token_id"]
    with counted(pipe.model) as passed:
        curve = ds.information_curve(pipe.denoiser, data, mask, levels, torch.Generator().manual_seed(seed), 32)
    scheduler = ds.AncestralScheduler.from_config(
        pipe.scheduler.config, grid="optimal", information_curve=curve.to_config()
    )
    return scheduler, {"evaluations": sum(passed), "seconds": time.perf_counter() - started}


def run(folder: Path, seeds: list[int], quick: bool) -> Store | None:
    """Compute what is missing of results/distillation.json."""
    source = folder / "tiny-text.json"
    if not source.is_file():
        print("distillation: skipped, it takes the held-out curves of part tiny-text")
        return None
    settings = {"seeds": seeds, "model": MODEL, "weights": fingerprint(), "precision": "bfloat16"}
    store = Store(folder, "distillation", settings | (QUICK if quick else FULL))
    if store.complete:
        return store
    settings, curves = store.get("settings"), json.loads(source.read_text())
    budgets = settings["budgets"]
    for method in METHODS:
        if store.get("methods", method) is None:
            print(f"distillation: {method}", flush=True)
            scheduler, cost = learn(method, settings)
            store.put(
                cost | {"nll": {str(n): summary(bounds(curves, scheduler, n)) for n in budgets}}, "methods", method
            )
    floats = folder / "learned-text.json"
    if floats.is_file():  # no bound: a nucleus gives some tokens no probability
        learned = list(json.loads(floats.read_text())["learned"].values())
        sums = {
            name: sum(sum(one[name].values()) for one in learned) / len(learned) for name in ("evaluations", "seconds")
        }
        store.put(sums, "methods", "floats")
    pipe = ds.DiscreteDiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    data = pack(read_split("validation"), pipe.tokenizer, pipe.config.denoiser["max_length"], 10**6)
    for count in settings["sequences"]:
        if store.get("fewer", str(count)) is None:
            print(f"distillation: optimal grid of {count} sequences", flush=True)
            values: dict[str, list[float]] = {str(n): [] for n in budgets}
            costs = []
            for seed in seeds:
                chosen = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]]
                scheduler, cost = grid_of_fewer(pipe, chosen, settings["levels"], seed)
                costs.append(cost)
                for n in budgets:
                    found = bounds(curves, scheduler, n)
                    values[str(n)].append(sum(found) / len(found))
            row = {name: sum(cost[name] for cost in costs) / len(costs) for name in ("evaluations", "seconds")}
            store.put(row | {"nll": {n: summary(found) for n, found in values.items()}}, "fewer", str(count))
    uniform = ds.AncestralScheduler.from_config(pipe.scheduler.config, grid="uniform")
    store.put({str(n): summary(bounds(curves, uniform, n)) for n in budgets}, "uniform")
    store.finish()
    return store


def table(content: dict[str, Any]) -> str:
    """Costs and bounds."""
    budgets = [str(n) for n in content["settings"]["budgets"]]
    samples, steps = content["settings"]["teacher"]
    full = samples * steps

    def line(label: str, row: dict[str, Any]) -> list[str]:
        nll = [f"{row['nll'][n]['mean']:.4f}" if "nll" in row else "–" for n in budgets]
        share = full / row["evaluations"] if row["evaluations"] else 0
        return [label, f"{row['evaluations']:,.0f}", f"{share:.0f}", f"{row['seconds']:.0f}", *nll]

    rows = [line(LABELS[name], row) for name, row in content["methods"].items()]
    rows += [line(f"optimal grid, {count} sequences", row) for count, row in content["fewer"].items()]
    rows.append(["uniform grid, counts", "0", "–", "0", *[f"{content['uniform'][n]['mean']:.4f}" for n in budgets]])
    head = ["learned for 4, 8 and 16 steps", "sequences", f"{full:,} / sequences", "seconds"]
    head += [f"NLL bound, {n} steps" for n in budgets]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
