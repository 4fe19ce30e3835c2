"""All schedulers for masked models on the bundled model, at equal numbers of model calls: quality against entropy.

    python examples/compare_schedulers.py --output_dir comparison_results

Writes a table, a picture and their numbers. Perplexity is under a word 4-gram judge of the model's own corpus, over 3 seeds; a
sampler that repeats itself lowers it together with the entropy, so read both. The grey line is one temperature on the plain
sampler (fixed counts, random order): a method is worth its name where it lies below that line.

A budget is a number of model calls. Methods with more calls in a step make as many steps as fit; methods that decide
themselves when to stop get the budget as their most; the shadow masks that WINO and the informed corrector need make their
calls longer, which does not count. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import discrete_schedulers as ds
from discrete_schedulers.evaluation import NgramJudge, generative_perplexity, mean_and_error, unigram_entropy

MODEL = "discrete-schedulers/tiny-text"
BASELINE = "fixed counts"
TEMPERATURES = [0.9, 0.8, 0.7, 0.6, 0.5]  # of the baseline's line
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("AncestralScheduler", {}),
    "Bernoulli = Euler": ("EulerScheduler", {}),
    "optimal grid": ("AncestralScheduler", {"grid": "optimal"}),
    "tau-leaping": ("TauLeapingScheduler", {}),
    "theta-trapezoidal": ("ThetaTrapezoidalScheduler", {}),
    "theta-RK-2": ("ThetaRK2Scheduler", {}),
    "predictor-corrector": ("PredictorCorrectorScheduler", {}),
    "flow matching": ("FlowMatchingScheduler", {"divergence_free": 1.0}),
    "first hitting": ("FirstHittingScheduler", {}),
    "DNDM": ("TransitionTimeScheduler", {}),
    "k-Gillespie": ("GillespieScheduler", {}),
    "ReMDM cap": ("RemaskingScheduler", {"strength": "cap"}),
    "ReMDM rescale": ("RemaskingScheduler", {"strength": "rescale"}),
    "farthest point": ("SpreadScheduler", {"pattern": "farthest"}),
    "dilated": ("SpreadScheduler", {"pattern": "dilated"}),
    "van der Corput": ("SpreadScheduler", {"pattern": "van_der_corput"}),
    "confidence": ("ConfidenceScheduler", {"score": "confidence"}),
    "margin": ("ConfidenceScheduler", {"score": "margin"}),
    "entropy": ("ConfidenceScheduler", {"score": "entropy"}),
    "confidence, blocks of 16": ("ConfidenceScheduler", {"score": "confidence", "block_length": 16}),
    "MaskGIT": ("MaskGITScheduler", {}),
    "threshold 0.9": ("ThresholdScheduler", {}),
    "KLASS": ("KLASSScheduler", {}),
    "PC-Sampler": ("PCSamplerScheduler", {}),
    "entropy bound": ("EntropyBoundScheduler", {}),
    "path planning": ("PathPlanningScheduler", {}),
    "WINO": ("WINOScheduler", {}),
    "informed corrector": ("InformedCorrectorScheduler", {}),
}


def steps_for(scheduler: ds.DiscreteScheduler, calls: int) -> int:
    """The most steps that make at most this many model calls."""
    for steps in range(calls, 0, -1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= calls:
            return steps
    raise ValueError(f"one step of {type(scheduler).__name__} makes more than {calls} calls")


def read_split(name: str) -> list[str]:
    """Chapters of the bundled corpus."""
    packed = files("discrete_schedulers") / "assets" / "tiny-text" / "corpus" / f"{name}.txt.xz"
    return lzma.decompress(packed.read_bytes()).decode().splitlines()


def fingerprint() -> str:
    """First 16 hex digits of the SHA-256 of the bundled weights: numbers belong to one model."""
    weights = files("discrete_schedulers") / "assets" / "tiny-text" / "model" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def measure(
    pipe: ds.DiscreteDiffusionPipeline,
    judge: NgramJudge,
    scheduler: ds.DiscreteScheduler,
    calls: int,
    seeds: int,
    samples: int,
) -> dict[str, Any]:
    """Perplexity, entropy and calls made, one value for each seed."""
    pipe.scheduler = scheduler
    row: dict[str, Any] = {"perplexity": [], "entropy": [], "calls": []}
    for seed in range(seeds):
        generator = [torch.Generator().manual_seed(1000 * seed + i) for i in range(samples)]
        steps = steps_for(scheduler, calls)
        output = pipe(num_samples=samples, num_inference_steps=steps, generator=generator)
        row["perplexity"].append(generative_perplexity(output.texts, judge))
        row["entropy"].append(float(unigram_entropy(output.sequences).mean()))
        row["calls"].append(output.num_model_calls)
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("comparison_results"),
        help="For table, picture and numbers. Default: %(default)s.",
    )
    parser.add_argument(
        "--calls",
        type=int,
        nargs="+",
        default=[4, 8, 16, 32],
        help="Numbers of model calls to compare at. Default: %(default)s.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="How many. Default: %(default)s.")
    parser.add_argument("--num_samples", type=int, default=24, help="Samples for each seed.")
    parser.add_argument(
        "--samplers",
        nargs="+",
        choices=list(SAMPLERS),
        default=list(SAMPLERS),
        metavar="NAME",
        help="Some of the table's lines; all by default.",
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = ds.DiscreteDiffusionPipeline.from_pretrained(MODEL)
    # WINO and informed correctors read the law of revealed tokens: here estimated by shadow masks in the same call
    shadow = ds.DiscreteDiffusionPipeline(pipe.model, pipe.scheduler, pipe.tokenizer, {"revealed_logits": "shadow"})
    for one in (pipe, shadow):
        one.set_progress_bar_config(disable=True)
    base = pipe.scheduler.config
    judge = NgramJudge(read_split("train"))
    path = args.output_dir / "results.json"
    settings = {"model": MODEL, "weights": fingerprint(), "seeds": args.seeds, "num_samples": args.num_samples}
    results: dict[str, Any] = {"settings": settings, "rows": {}}
    if path.is_file() and json.loads(path.read_text())["settings"] == settings:
        results = json.loads(path.read_text())

    def row(name: str, scheduler: ds.DiscreteScheduler, calls: int) -> None:
        known = results["rows"].setdefault(name, {})
        if str(calls) not in known:
            runner = shadow if scheduler.needs_revealed_logits else pipe
            known[str(calls)] = measure(runner, judge, scheduler, calls, args.seeds, args.num_samples)
            write_text(path, json.dumps(results, indent=1) + "\n")
            print(f"{name}, {calls} calls: {text(known[str(calls)])}", flush=True)

    if "data" not in results:
        windows = pipe.tokenizer("".join(read_split("test")), return_tensors="pt")["input_ids"][0]
        windows = windows[: len(windows) // 64 * 64].view(-1, 64)[: args.num_samples * args.seeds]
        texts = pipe.tokenizer.batch_decode(windows)
        parts = [slice(seed, None, args.seeds) for seed in range(args.seeds)]
        results["data"] = {
            "perplexity": [generative_perplexity(texts[part], judge) for part in parts],
            "entropy": [float(unigram_entropy(windows[part]).mean()) for part in parts],
        }
    for calls in args.calls:
        for temperature in TEMPERATURES:
            cooled = ds.AncestralScheduler.from_config(base, temperature=temperature)
            row(f"{BASELINE}, temperature {temperature}", cooled, calls)
        for name in args.samplers:
            cls, knobs = SAMPLERS[name]
            row(name, getattr(ds, cls).from_config(base, **knobs), calls)

    table = markdown(results, args.calls, args.samplers)
    write_text(args.output_dir / "table.md", table + "\n")
    plot(args.output_dir / "plot.png", results, args.calls, args.samplers)
    print("\n" + table + f"\n\nTable, picture and numbers are in {args.output_dir}/")
    return results


def text(row: dict[str, Any]) -> str:
    """`perplexity / entropy / calls`, the first two with their standard errors where there are several seeds."""
    cells = []
    for key, digits in (("perplexity", 0), ("entropy", 2)):
        mean, error = mean_and_error(row[key]) if len(row[key]) > 1 else (row[key][0], None)
        cells.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else ""))
    calls = sum(row["calls"]) / len(row["calls"]) if "calls" in row else math.nan
    return " / ".join(cells) + (f" / {calls:.3g}" if "calls" in row else "")


def markdown(results: dict[str, Any], budgets: list[int], names: list[str]) -> str:
    """One line for each sampler, one column for each budget."""
    lines = ["Perplexity / entropy in nats / calls made, mean ± standard error over seeds. "]
    lines[0] += f"Real text: {text(results['data'])}.\n"
    lines += ["| sampler | " + " | ".join(f"{n} calls" for n in budgets) + " |", "| --- |" + " --- |" * len(budgets)]
    cooled = [f"{BASELINE}, temperature {temperature}" for temperature in TEMPERATURES]
    for name in [*names, *cooled]:
        cells = [text(results["rows"][name][str(n)]) for n in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any], budgets: list[int], names: list[str]) -> None:
    """Perplexity against entropy, one panel for each budget; numbers name the samplers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(budgets))
    grid = (math.ceil(len(budgets) / columns), columns)
    figure, axes = plt.subplots(*grid, figsize=(8 * columns, 5.5 * grid[0]), constrained_layout=True, squeeze=False)
    colours = plt.get_cmap("turbo")
    for axis, budget in zip(axes.flat, budgets, strict=False):
        line = [results["rows"][BASELINE][str(budget)]] if BASELINE in names else []
        line += [results["rows"][f"{BASELINE}, temperature {t}"][str(budget)] for t in TEMPERATURES]
        axis.plot([mean(row["entropy"]) for row in line], [mean(row["perplexity"]) for row in line], color="0.7", lw=3)
        axis.scatter(mean(results["data"]["entropy"]), mean(results["data"]["perplexity"]), marker="*", s=160, c="k")
        for i, name in enumerate(names):
            row, colour = results["rows"][name][str(budget)], colours(i / max(1, len(names) - 1))
            x, y = mean(row["entropy"]), mean(row["perplexity"])
            errors = [mean_and_error(row[key])[1] if len(row[key]) > 1 else 0 for key in ("entropy", "perplexity")]
            axis.errorbar(x, y, errors[1], errors[0], fmt="o", color=colour, label=f"{i + 1} {name}", ms=5, lw=1)
            axis.annotate(str(i + 1), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(yscale="log", xlabel="unigram entropy within a sample (nats)", ylabel="4-gram perplexity")
        axis.set_title(f"{budget} model calls (star: real text; grey: temperature on fixed counts)", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def write_text(path: Path, content: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
