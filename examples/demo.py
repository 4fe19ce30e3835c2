"""The whole way in a few minutes on a CPU: learn schedulers for 4, 8 and 16 steps, compare them, and write texts.

    python examples/demo.py --output_dir demo_results

Runs `training/distill.py` on the bundled model by two methods, prints one table, draws one plot, and samples with each learned
scheduler. What to look for: LSD with its L2 objective, as published, comes out worse than the plain samplers; the optimal grid
is about as good or better; a spread order of positions, which needs no learning, is far better at few calls. README, "What we
found", says why. `METHODS` takes more: `--scale log_score` is LSD's released code.

Columns: nll is a bound on the sampler's own negative log-likelihood of held-out text, in nats per token; matched_perplexity
is that of a 4-gram judge at the entropy of held-out text (both: lower is better), matched_error its standard error.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from discrete_schedulers import AncestralScheduler, DiscreteDiffusionPipeline, LSDScheduler
from discrete_schedulers.training import distill
from discrete_schedulers.training.hub import markdown_table, write_text
from discrete_schedulers.training.pictures import write_plot

MODEL = "discrete-schedulers/tiny-text"
BUDGETS = [4, 8, 16]
METHODS = {
    "lsd": ["--method", "lsd", "--objective", "l2"],
    "optimal grid": ["--method", "optimal_grid"],
}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("demo_results"),
        help="For table, plot, texts and learned schedulers. Default: %(default)s.",
    )
    parser.add_argument("--num_samples", type=int, default=16, help="Samples that coefficients are fitted on.")
    parser.add_argument("--num_eval_samples", type=int, default=24, help="Samples and sequences that are measured.")
    parser.add_argument("--max_data_samples", type=int, default=256, help="Sequences that the curve is estimated on.")
    args = parser.parse_args(argv)
    began = time.time()

    table: list[dict] = []
    for name, arguments in METHODS.items():
        print(f"\n=== {name} ===", flush=True)
        folder = args.output_dir / name.replace(" ", "_")
        metrics = distill.main(
            [
                *("--pretrained_model_name_or_path", MODEL, "--output_dir", str(folder)),
                *("--num_inference_steps", *map(str, BUDGETS)),
                *("--num_samples", str(args.num_samples), "--num_eval_samples", str(args.num_eval_samples)),
                *("--max_data_samples", str(args.max_data_samples), "--eval_temperatures", "0.8", "1.0"),
                *arguments,
            ]
        )
        learned = arguments[1]
        rows = [row | {"sampler": name} if row["sampler"] == learned else row for row in metrics["table"]]
        table += [row for row in rows if row["sampler"] == name or not table_has(table, row)]

    pipe = DiscreteDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    texts = [sample_texts(pipe, "counts", AncestralScheduler.from_config(pipe.scheduler.config))]
    texts += [sample_texts(pipe, "lsd", LSDScheduler.from_pretrained(args.output_dir / "lsd"))]
    texts += [sample_texts(pipe, "optimal grid", AncestralScheduler.from_pretrained(args.output_dir / "optimal_grid"))]
    spread = AncestralScheduler.from_pretrained(args.output_dir / "optimal_grid", order="spread")
    texts += [sample_texts(pipe, "optimal grid, spread order", spread)]
    nucleus = AncestralScheduler.from_config(pipe.scheduler.config, grid="uniform", top_p=0.8)
    texts += [sample_texts(pipe, "even counts, spread order, top-p 0.8", nucleus)]

    table.sort(key=lambda row: row["steps"])
    write_plot(args.output_dir / "plot.png", table)
    write_text(args.output_dir / "table.md", markdown_table(table) + "\n")
    write_text(args.output_dir / "table.json", json.dumps(table, indent=2) + "\n")
    write_text(args.output_dir / "texts.txt", "\n".join(texts))
    print("\n" + markdown_table(table) + "\n\nHow to read it: " + " ".join(__doc__.split("Columns: ")[1].split()))
    print("\n".join(texts))
    print(f"\n{time.time() - began:.0f} s; table, plot, texts and scheduler configs are in {args.output_dir}/")
    return table


def table_has(table: list[dict], row: dict) -> bool:
    """Whether the baseline of this row was measured in an earlier run."""
    return any((other["sampler"], other["steps"]) == (row["sampler"], row["steps"]) for other in table)


def sample_texts(pipe: DiscreteDiffusionPipeline, name: str, scheduler: AncestralScheduler | LSDScheduler) -> str:
    """Two texts of the largest budget, with a heading."""
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    output = pipe(num_samples=2, num_inference_steps=BUDGETS[-1], generator=generator)
    lines = [f"  {text.strip()}" for text in output.texts]
    return "\n".join([f"\n{name}, {output.num_model_calls} calls:", *lines])


if __name__ == "__main__":
    main()
