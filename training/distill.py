r"""Learn the coefficients of a scheduler for a frozen discrete diffusion model, and ship them as a scheduler config.

    accelerate launch training/distill.py --pretrained_model_name_or_path discrete-schedulers/tiny-text \
        --method lsd --num_inference_steps 4 8 16 --output_dir tiny-text-lsd

Methods: `lsd` (a factor on the score for each step), `lsd_plus` (step sizes as well; `--repaired` for the objective whose
optimum is a sampler), `optimal_grid` (dynamic programming on the model's own information curve, any number of steps),
`marginal` (an inverse temperature for each step, on the law of the last samples; positions in the spread order).

The folder then holds scheduler_config.json, metrics.json, plot.png and README.md; `--push_to_hub` uploads these in one
commit. Every random number is a function of (seed, sample index), so the coefficients do not depend on the number of
processes, and a run that was killed goes on with `--resume_from_checkpoint latest`.

On CPUs, two processes: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/distill.py ...`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    LearnedScheduler,
    LSDScheduler,
)
from discrete_schedulers.evaluation import NgramJudge, unigram_entropy
from discrete_schedulers.training.checkpoints import load_checkpoint, save_checkpoint
from discrete_schedulers.training.data import Texts, load_texts, pack
from discrete_schedulers.training.hub import (
    create_repository,
    markdown_table,
    upload,
    write_card,
    write_plot,
    write_text,
)
from discrete_schedulers.training.measuring import measure
from discrete_schedulers.training.methods import JUDGE_FEATURES, lsd, marginal, optimal_grid
from discrete_schedulers.training.objectives import SCALE_OF
from discrete_schedulers.training.run import DATA, Run, sample

METHODS = {"lsd": lsd, "lsd_plus": lsd, "optimal_grid": optimal_grid, "marginal": marginal}
FITS_ON_DATA = ("optimal_grid", "marginal")
DEFAULTS: dict[str, dict[str, Any]] = {  # of arguments that mean something else in each
    "marginal": {"num_samples": 128, "num_epochs": 100, "learning_rate": 0.05},
    "others": {"num_samples": 64, "num_epochs": 20, "learning_rate": 1e-3},
}
# What a run may change when it goes on
FREE = {"output_dir", "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint", "report_to"}
FREE |= {"checkpoints_total_limit"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Model and data
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id, folder, or a bundled id.")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--dataset_name", default=None, help="A dataset for `datasets.load_dataset`.")
    parser.add_argument("--dataset_config", default=None)
    parser.add_argument("--train_file", default=None, help="Text file to fit on, a document a line.")
    parser.add_argument(
        "--validation_file", default=None, help="Text file to measure on. Default: every tenth line of --train_file."
    )
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_data_samples", type=int, default=256, help="Sequences of each split that are used.")
    parser.add_argument("--sequence_length", type=int, default=None, help="Defaults to the model's longest.")
    # Method
    parser.add_argument("--method", choices=["lsd", "lsd_plus", "optimal_grid", "marginal"], default="lsd")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4, 8, 16], help="Step budgets.")
    parser.add_argument(
        "--objective", choices=SCALE_OF, default=None, help="d of eq. 6. Default: generalised_kl, or what --scale has."
    )
    parser.add_argument(
        "--scale", choices=["score", "log_score"], default=None, help="What Phi multiplies. Default: what d is for."
    )
    parser.add_argument("--solver", choices=["closed_form", "sgd"], default="closed_form", help="sgd: as in the paper.")
    parser.add_argument("--relaxed", action="store_true", help="Perturb the student's first state (eq. 9).")
    parser.add_argument("--hamming_share", type=float, default=0.05, help="Share of positions perturbed.")
    parser.add_argument(
        "--repaired", action="store_true", help="lsd_plus: accumulated teacher term, softmax step sizes."
    )
    parser.add_argument(
        "--learned_scheduler",
        action="store_true",
        help="Write a LearnedScheduler, which has more to learn, with this law.",
    )
    parser.add_argument("--teacher_steps", type=int, default=1024)
    parser.add_argument(
        "--num_samples",
        type=int,
        default=None,
        help="Samples that coefficients are fitted on: 64, or 128 in each gradient step of marginal.",
    )
    parser.add_argument(
        "--num_epochs",
        type=int,
        default=None,
        help="Gradient steps of `--solver sgd` and of lsd_plus (20), of marginal (100).",
    )
    parser.add_argument("--learning_rate", type=float, default=None, help="1e-3; 0.05 for marginal.")
    parser.add_argument(
        "--buckets", type=int, default=128, help="marginal: hashed tokens and pairs that its ratio sees."
    )
    parser.add_argument("--train_batch_size", type=int, default=16, help="Sequences in one call of the network.")
    # Evaluation
    parser.add_argument("--num_eval_samples", type=int, default=64, help="Samples and held-out sequences per budget.")
    # Run
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--report_to", default=None, help="A tracker of Accelerate, such as tensorboard.")
    parser.add_argument("--resume_from_checkpoint", default=None, help="A checkpoint folder, or `latest`.")
    parser.add_argument("--checkpoints_total_limit", type=int, default=1)
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", default=None, help="Defaults to the name of the output folder.")
    parser.add_argument("--hub_token", default=None)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS["marginal" if args.method == "marginal" else "others"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(parser, args)
    args.num_inference_steps = sorted(set(args.num_inference_steps))
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if arguments are not allowed or contradict each other; fills in `objective` and `scale`."""
    counts = ["teacher_steps", "num_samples", "num_epochs", "train_batch_size", "max_data_samples", "num_eval_samples"]
    for name in [*counts, "buckets", "checkpoints_total_limit", "sequence_length"]:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps is {args.num_inference_steps}; budgets must be at least 1")
    wrong = [n for n in args.num_inference_steps if args.teacher_steps % n]
    if wrong and args.method in ("lsd", "lsd_plus"):
        parser.error(
            f"--teacher_steps {args.teacher_steps} is not a multiple of {wrong}: the grids would not be nested"
        )
    if not args.learning_rate > 0:
        parser.error(f"--learning_rate is {args.learning_rate}; it must be positive")
    if not 0 <= args.hamming_share < 1:
        parser.error(f"--hamming_share is {args.hamming_share}; allowed are numbers in [0, 1)")

    # Each d is about one scale. With the other there is nothing to learn, or something else than what the sampler uses.
    if args.objective is None:
        args.objective = "softmax_kl" if args.scale == "log_score" else "generalised_kl"
    if args.scale is None:
        args.scale = SCALE_OF[args.objective]
    if args.scale != SCALE_OF[args.objective]:
        parser.error(f"--objective {args.objective} is for --scale {SCALE_OF[args.objective]}, not {args.scale}")
    if args.method == "lsd_plus" and args.objective != "generalised_kl":
        parser.error(f"--objective {args.objective} is for --method lsd; lsd_plus has generalised_kl")
    if args.repaired and args.method != "lsd_plus":
        parser.error("--repaired is for --method lsd_plus")
    if args.method == "marginal" and args.num_samples <= JUDGE_FEATURES:
        parser.error(f"--num_samples is {args.num_samples}; --method marginal needs more than {JUDGE_FEATURES}")
    if args.learned_scheduler and args.scale == "log_score":
        parser.error("--learned_scheduler has no such law as --scale log_score: a rate that depends on the logits")

    if args.dataset_name is not None and args.train_file is not None:
        parser.error("--dataset_name and --train_file cannot both be given")
    if args.dataset_config is not None and args.dataset_name is None:
        parser.error("--dataset_config needs --dataset_name")
    if args.validation_file is not None and args.train_file is None:
        parser.error("--validation_file needs --train_file")
    for name in ("train_file", "validation_file"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).is_file():
            parser.error(f"--{name} {getattr(args, name)} is not a file")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb would store --hub_token in its config; log in with `hf auth login` instead")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
        except ValueError as error:
            parser.error(f"--hub_model_id: {error}")
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'discrete_schedulers[train]'")


# The run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Learn, measure, write down. Returns the metrics, on the main process."""
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir
    )
    if args.report_to and not accelerator.log_with:
        raise ValueError(f"`--report_to` {args.report_to} is not installed, or Accelerate does not know it")
    if args.num_samples < accelerator.num_processes:
        raise ValueError(
            f"`--num_samples` {args.num_samples} leaves some of {accelerator.num_processes} processes idle"
        )
    set_seed(args.seed)

    pipe = load_model(args, accelerator)
    length = sequence_length(args, pipe)
    run = begin(args, accelerator, pipe, length)
    texts, heldout = load_data(run)
    stop_counting = run.count_calls()
    scheduler = METHODS[args.method](run)
    stop_counting()
    if args.learned_scheduler:
        scheduler = as_learned(scheduler)
    if heldout is None:  # LSD without texts: the teacher's samples
        heldout = run.tensors["states"][-1][: args.num_eval_samples].to(accelerator.device)

    accelerator.wait_for_everyone()
    metrics = report(run, scheduler, texts, heldout) if accelerator.is_main_process else {}
    accelerator.end_training()
    return metrics


def load_model(args: argparse.Namespace, accelerator: Accelerator) -> DiscreteDiffusionPipeline:
    """The frozen model, on its device.

    Raises:
        ValueError: If it is not a masked model, or its noise is not for these arguments.
    """
    pipe = DiscreteDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    pipe.model.requires_grad_(False).eval()
    if args.mixed_precision != "no":
        pipe.model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision])
    config = pipe.scheduler.config
    if config.process != "absorbing":
        raise ValueError(
            "`--pretrained_model_name_or_path` is a uniform-noise model; these methods are for masked models"
        )
    straight = config.noise_schedule in ("loglinear", "linear")
    if args.learned_scheduler and args.method in ("lsd", "lsd_plus") and not straight:
        raise ValueError(
            f"`--learned_scheduler` needs loglinear or linear noise here; the model has {config.noise_schedule!r}"
        )
    return pipe


def sequence_length(args: argparse.Namespace, pipe: DiscreteDiffusionPipeline) -> int:
    """L.

    Raises:
        ValueError: If it is not known, or not allowed.
    """
    longest = pipe.config.denoiser.get("max_length")
    length = args.sequence_length or longest
    if length is None:
        raise ValueError("`--sequence_length` is required: this model does not say how long its sequences are")
    if longest is not None and length > longest:
        raise ValueError(f"`--sequence_length` is {length}; this model takes at most {longest}")
    return length


def begin(args: argparse.Namespace, accelerator: Accelerator, pipe: DiscreteDiffusionPipeline, length: int) -> Run:
    """The state of the run: an empty one, or where a killed run stood."""
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and args.report_to:
        accelerator.init_trackers(
            "distill", {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, str | int | float)}
        )
    state, tensors = load_checkpoint(args, identity(args))
    accelerator.wait_for_everyone()  # nobody reads any more when the main process replaces the checkpoint

    def save(scheduler: DiscreteScheduler | None) -> None:
        if accelerator.is_main_process:
            save_checkpoint(args, state, tensors, scheduler)
        accelerator.wait_for_everyone()

    base = {k: v for k, v in pipe.scheduler.config.items() if k not in ("coefficients", "learned_for")}
    base |= {"grid": "uniform", "draw": "exact"}
    learned_for = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
    learned_for |= {"vocab_size": base["vocab_size"], "method": args.method}
    return Run(args, accelerator, pipe, base, length, None, state, tensors, save, learned_for)


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the result depends on."""
    return {name: value for name, value in vars(args).items() if name not in FREE}


def load_data(run: Run) -> tuple[Texts | None, Tensor | None]:
    """Set what the run fits on; the texts, where there are any, and the sequences (n, L) to measure on, where they are known
    already. Without texts both are samples of the model, one token a call.

    Raises:
        ValueError: If there are too few sequences for the method, or texts and no tokenizer.
    """
    args, pipe, device = run.args, run.pipe, run.accelerator.device
    fits_on_data = args.method in FITS_ON_DATA
    texts = load_texts(args) if run.accelerator.is_main_process or fits_on_data else None
    if texts is not None:
        if pipe.tokenizer is None:
            raise ValueError("texts need a tokenizer, which this model does not bring: leave out data arguments")
        run.fit = pack(texts.fit, pipe.tokenizer, run.length, args.max_data_samples).to(device)
        heldout = pack(texts.heldout, pipe.tokenizer, run.length, args.num_eval_samples).to(device)
        check_data(args, len(run.fit))
        return texts, heldout
    if not fits_on_data:
        return None, None
    check_data(args, args.num_samples)
    if "samples" not in run.tensors:
        pipe.scheduler = AncestralScheduler.from_config(run.base, unmasking="counts", order="random")
        both = range(args.num_samples + args.num_eval_samples)
        run.tensors["samples"] = sample(pipe, DATA, both, run.length, run.length, args).cpu()
        run.save(None)
    run.fit, heldout = run.tensors["samples"].to(device).split([args.num_samples, args.num_eval_samples])
    return None, heldout


def check_data(args: argparse.Namespace, count: int) -> None:
    """Raises `ValueError` if so many sequences are too few for the method."""
    if args.method == "optimal_grid" and count < 2:
        raise ValueError(f"a curve needs 2 sequences or more; there is {count} (`--max_data_samples`, `--num_samples`)")
    if args.method == "marginal" and count // 2 <= JUDGE_FEATURES:
        raise ValueError(
            f"`--method marginal` judges on half of {count} sequences; it needs more than {JUDGE_FEATURES} there "
            "(`--max_data_samples`, or `--num_samples` where there are no texts)"
        )


def as_learned(scheduler: DiscreteScheduler) -> LearnedScheduler:
    """The [`LearnedScheduler`] with the law of what a method learned: an optimal grid, or factors on the score of log-linear or
    linear noise, whose Euler steps are ancestral ones."""
    if isinstance(scheduler, LearnedScheduler):
        return scheduler
    if not isinstance(scheduler, LSDScheduler):
        return LearnedScheduler.from_config(scheduler.config)
    names = {"scale": "rate", "times": "times"}
    coefficients = {
        steps: {names[name]: values for name, values in blocks.items()}
        for steps, blocks in scheduler.config.coefficients.items()
    }
    return LearnedScheduler.from_config(scheduler.config, unmasking="bernoulli", coefficients=coefficients)


def report(run: Run, scheduler: DiscreteScheduler, texts: Texts | None, heldout: Tensor) -> dict[str, Any]:
    """Measure the scheduler beside the same model's plain samplers, write everything down, and push it. On one process."""
    args, state, accelerator = run.args, run.state, run.accelerator
    judge = NgramJudge(texts.judge) if texts is not None else None
    samplers = {
        "bernoulli": AncestralScheduler.from_config(run.base, unmasking="bernoulli", order="random"),
        "counts": AncestralScheduler.from_config(run.base, unmasking="counts", order="random"),
        "counts, spread": AncestralScheduler.from_config(run.base, unmasking="counts", order="spread"),
        args.method: scheduler,
    }
    measured = {(row["sampler"], row["steps"]) for row in state["table"]}
    wanted = [(name, steps) for steps in args.num_inference_steps for name in samplers]
    for name, steps in tqdm(wanted, desc="measuring"):
        if (name, steps) in measured:
            continue
        row = measure(run.pipe, name, samplers[name], steps, heldout, judge, args)
        state["table"].append(row)
        save_checkpoint(args, state, run.tensors, scheduler)
        accelerator.log({f"{name}/{key}": row[key] for key in row if key not in ("sampler", "steps")}, step=steps)

    arguments = {k: v for k, v in identity(args).items() if k not in ("pretrained_model_name_or_path", "revision")}
    metrics = {
        "base_model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "method": args.method,
        "budgets": args.num_inference_steps,
        "data": "held-out text" if texts is not None else "the model's own many-step samples",
        "sequence_evaluations": state["evaluations"],
        "schedule_gain": state.get("schedule_gain"),
        "data_entropy": unigram_entropy(heldout).mean().item(),
        "coefficients": scheduler.config.coefficients or {},
        "table": state["table"],
        "arguments": arguments,
    }
    scheduler.register_to_config(learned_for=run.learned_for | {"metrics": state["table"]})
    write_files(args, scheduler, metrics)
    accelerator.print(markdown_table(state["table"]))
    accelerator.print(f"results: {args.output_dir}")
    if args.push_to_hub:
        repo_id = create_repository(
            args.output_dir, args.hub_model_id or args.output_dir.resolve().name, args.hub_token
        )
        write_card(args.output_dir / "README.md", repo_id, type(scheduler).__name__, metrics)  # now with the namespace
        accelerator.print(f"pushed: {upload(args.output_dir, repo_id, args.hub_token)}")
    return metrics


def write_files(args: argparse.Namespace, scheduler: DiscreteScheduler, metrics: dict[str, Any]) -> None:
    """Scheduler config, metrics, plot and card, each under a temporary name first."""
    folder = args.output_dir
    scheduler.save_pretrained(folder / ".scheduler")
    os.replace(folder / ".scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    shutil.rmtree(folder / ".scheduler")
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_plot(folder / "plot.png", metrics["table"])
    repo_id = args.hub_model_id or folder.resolve().name
    write_card(folder / "README.md", repo_id, type(scheduler).__name__, metrics)


if __name__ == "__main__":
    main()
