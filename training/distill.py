r"""Learn the coefficients of a scheduler for a frozen discrete diffusion model, and ship them as a scheduler config.

    accelerate launch training/distill.py --pretrained_model_name_or_path discrete-schedulers/tiny-text \
        --method lsd --num_inference_steps 4 8 16 --output_dir tiny-text-lsd

Methods, each learning floats for every step budget, on the texts or pictures that are given (or that the bundled model brings),
else on the model's own samples:

    lsd, lsd_plus   a factor on the score for each step; step sizes as well (`--repaired`: an objective whose optimum samples)
    optimal_grid    time grid by dynamic programming on the model's information curve: any number of steps; or that of the
                    spread order (`--order spread`)
    jys             time grid of Jump Your Steps; `--unbiased`: the exact optimum of the part that ancestral steps pay
    beta            a and b of a Beta schedule, by the bound on the information curve
    marginal        an inverse temperature for each step, by gradients on the law of the last samples
    search          an order, a plan of counts and a few floats (`--blocks`), without gradients, on the law of the last samples;
                    also for uniform noise, with `--plan even --blocks grid temperature_line`
    order           which positions open in which step, by the exact likelihood of the data
    learn2pd        a filter that says which predictions are final: fewer calls than steps

The folder then holds scheduler_config.json, metrics.json, plot.png, coefficients.png and README.md; `--push_to_hub` uploads
these in one commit. Every random number is a function of (seed, sample index), so neither coefficients nor the numbers of
the report depend on the number of processes, which share all work of the network. A run that was killed goes on with
`--resume_from_checkpoint latest`. SIGTERM ends it with a checkpoint; `accelerate launch` hands it on to several processes, but
not to a single one: send it to the process group then.

On CPUs, two processes: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 training/distill.py ...`
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    DiscreteScheduler,
    LearnedScheduler,
    LSDScheduler,
)
from discrete_schedulers.evaluation import NgramJudge, unigram_entropy
from discrete_schedulers.training.arguments import FREE, ONLY_FOR, parse_args
from discrete_schedulers.training.checkpoints import load_checkpoint, save_checkpoint
from discrete_schedulers.training.data import (
    Texts,
    check_text_file,
    load_pictures,
    load_texts,
    pack,
    sequence_length,
)
from discrete_schedulers.training.files import output_folder, write_text
from discrete_schedulers.training.frozen import Frozen, FrozenImages, FrozenTexts, is_image_model
from discrete_schedulers.training.hub import (
    Facts,
    create_repository,
    markdown_table,
    upload,
    without_token,
    without_tokens,
    write_card,
)
from discrete_schedulers.training.measuring import distance_to, draw_samples, heldout_bound, row_of
from discrete_schedulers.training.method_marginal import FLOATS
from discrete_schedulers.training.methods import FITS_ON_DATA, METHODS, check_data, check_length
from discrete_schedulers.training.pictures import write_coefficients_plot, write_plot
from discrete_schedulers.training.run import DATA, Run
from discrete_schedulers.training.signals import before_end, ends_at_sigterm, stop_if_asked

FOR_TEXTS = ("train_file", "validation_file", "sequence_length")
FOR_IMAGES = ("train_data_dir", "class_column", "prompt_file", "guidance_scale")
UNIFORM_STEPS = 4  # for each token, of the samples that stand for data where noise is uniform


@ends_at_sigterm
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Learn, measure, write down. Returns the metrics, on the main process."""
    args = parse_args(argv, __doc__)
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

    frozen = load_model(args, accelerator)
    check_length(args, frozen.length)
    run = begin(args, accelerator, frozen)
    texts, heldout = load_data(run)
    if accelerator.is_main_process:  # from here on there are files, and work to lose
        output_folder(args.output_dir)
        if args.report_to:
            told = {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, str | int | float)}
            accelerator.init_trackers("distill", told)
    accelerator.wait_for_everyone()
    listen_to_sigterm(run)

    if heldout is None:
        heldout = draw_data(run)
    stop_counting = run.count_calls()
    scheduler = METHODS[args.method](run)
    stop_counting()
    if args.learned_scheduler:
        scheduler = as_learned(scheduler)

    accelerator.wait_for_everyone()
    run.add_seconds("learning")
    measure(run, scheduler, texts, heldout)
    metrics = report(run, scheduler, texts, heldout, command(argv, run)) if accelerator.is_main_process else {}
    accelerator.end_training()
    return metrics


def load_model(args: argparse.Namespace, accelerator: Accelerator) -> Frozen:
    """The frozen model, on its device.

    Raises:
        ValueError: If arguments are for another kind of model, or its noise is not for the method.
    """
    name, of_images = (
        args.pretrained_model_name_or_path,
        is_image_model(args.pretrained_model_name_or_path, args.revision),
    )
    for argument in FOR_TEXTS if of_images else FOR_IMAGES:
        if getattr(args, argument) not in (None, 1.0):
            raise ValueError(
                f"`--{argument}` is for models of {'texts' if of_images else 'images'}; {name!r} is one of "
                f"{'images' if of_images else 'texts'}"
            )
    pipeline = DiscreteImagePipeline if of_images else DiscreteDiffusionPipeline
    pipe = pipeline.from_pretrained(name, revision=args.revision)
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    pipe.model.requires_grad_(False).eval()
    if args.mixed_precision != "no":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
        for part in filter(None, (pipe.model, getattr(pipe, "text_encoder", None))):
            part.to(dtype)
    config = pipe.scheduler.config
    if config.process != "absorbing":
        check_uniform(args)
    straight = config.noise_schedule in ("loglinear", "linear")
    if args.learned_scheduler and args.method in ("lsd", "lsd_plus") and not straight:
        raise ValueError(
            f"`--learned_scheduler` needs loglinear or linear noise here; the model has {config.noise_schedule!r}"
        )
    if isinstance(pipe, DiscreteDiffusionPipeline):
        return FrozenTexts(pipe, sequence_length(args, pipe))
    prompts = [] if args.prompt_file is None else read_prompts(Path(args.prompt_file))
    if prompts and pipe.text_encoder is None:
        raise ValueError(f"`--prompt_file` is for a model with a text encoder; {name!r} has none")
    height, width = pipe.config.denoiser["grid_shape"]
    return FrozenImages(
        pipe, height * width, prompts or [""] * (pipe.text_encoder is not None), args.guidance_scale or 1.0
    )


def check_uniform(args: argparse.Namespace) -> None:
    """Raises `ValueError` if what is to be learned does not exist for uniform noise."""
    allowed = [name for name, floats in FLOATS.items() if floats.uniform]
    wrong = [name for name in args.blocks or [] if name not in allowed]
    if args.method != "search" or args.plan != "even" or wrong:
        raise ValueError(
            f"`--pretrained_model_name_or_path` {args.pretrained_model_name_or_path!r} has uniform noise, which no mask and no "
            f"counts belong to; allowed: --method search --plan even --blocks {' '.join(allowed)}, any of these"
        )


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of prompts.

    Raises:
        ValueError: If it has none.
    """
    check_text_file("--prompt_file", path)
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def begin(args: argparse.Namespace, accelerator: Accelerator, frozen: Frozen) -> Run:
    """The state of the run: an empty one, or where a killed run stood."""
    state, tensors = load_checkpoint(args, identity(args))
    accelerator.wait_for_everyone()  # nobody reads any more when the main process replaces the checkpoint

    def save(scheduler: DiscreteScheduler | None) -> None:
        run.add_seconds("learning")
        if accelerator.is_main_process:
            save_checkpoint(args, state, tensors, scheduler)
        accelerator.wait_for_everyone()
        stop_if_asked(accelerator)

    config = frozen.pipe.scheduler.config
    base = {k: v for k, v in config.items() if k not in ("coefficients", "learned_for")}
    base |= {"grid": "uniform", "draw": "exact"}
    learned_for = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
    learned_for |= {"vocab_size": base["vocab_size"], "method": args.method}
    run = Run(args, accelerator, frozen, base, None, state, tensors, save, learned_for)
    return run


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the result depends on: none that the method does not read."""
    unread = {name for name, methods in ONLY_FOR.items() if args.method not in methods}
    return {name: value for name, value in vars(args).items() if name not in FREE | unread}


def load_data(run: Run) -> tuple[Texts | None, Tensor | None]:
    """The texts, where there are any, and the sequences (n, L) to measure on that are cut from them, or made of pictures; sets
    what the run fits on.

    Raises:
        ValueError: If there are too few sequences for the method, or texts and no tokenizer.
    """
    args, pipe, device = run.args, run.pipe, run.accelerator.device
    processes = run.accelerator.num_processes
    if isinstance(run.frozen, FrozenImages):
        pictures = load_pictures(args, run.frozen.pipe)
        if pictures is not None:
            run.fit, run.classes = pictures.fit, pictures.fit_classes
            run.heldout_classes = pictures.heldout_classes
        check_data(args, args.num_samples if pictures is None else len(pictures.fit), processes)
        return None, None if pictures is None else pictures.heldout
    texts = load_texts(args)  # on every process: all of them measure
    if texts is not None:
        if pipe.tokenizer is None:
            raise ValueError("texts need a tokenizer, which this model does not bring: leave out data arguments")
        run.fit = pack(texts.fit, pipe.tokenizer, run.length, args.max_data_samples).to(device)
        heldout = pack(texts.heldout, pipe.tokenizer, run.length, args.num_eval_samples).to(device)
        check_data(args, len(run.fit), processes)
        return texts, heldout
    check_data(args, args.num_samples, processes)
    return None, None


def draw_data(run: Run) -> Tensor:
    """In place of texts samples of the model, one token a call: sets what the run fits on, where the method does, and returns
    others to measure on. Only the former are part of what learning costs."""
    args = run.args
    sizes = [args.num_samples if args.method in FITS_ON_DATA else 0, args.num_eval_samples]
    numbers = range(sizes[0]), range(args.num_samples, args.num_samples + sizes[1])
    steps = run.length if run.base["process"] == "absorbing" else UNIFORM_STEPS * run.length
    if "samples" not in run.tensors:
        run.pipe.scheduler = AncestralScheduler.from_config(run.base, unmasking="counts", order="random")
        stop_counting = run.count_calls()
        fit, _ = run.samples(DATA, numbers[0], steps)
        stop_counting()
        run.add_evaluations()
        others, _ = run.samples(DATA, numbers[1], steps)
        run.tensors["samples"] = torch.cat([fit, others])
        run.save(None)
    run.classes, run.heldout_classes = map(run.frozen.classes_of, numbers)
    run.fit, heldout = run.tensors["samples"].to(run.accelerator.device).split(sizes)
    return heldout


def listen_to_sigterm(run: Run) -> None:
    """SIGTERM is looked at in calls of the network, or where processes meet: there `state` and `tensors` go together, and are
    saved before the end."""

    def save() -> None:
        if run.accelerator.is_main_process:
            save_checkpoint(run.args, run.state, run.tensors, None)

    before_end(save)
    if run.accelerator.num_processes == 1:
        run.pipe.model.register_forward_pre_hook(lambda *_: stop_if_asked())


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


def command(argv: list[str] | None, run: Run) -> str:
    """The command of this run, without tokens."""
    processes = run.accelerator.num_processes
    launch = ["accelerate", "launch", *(["--num_processes", str(processes)] if processes > 1 else [])]
    given = without_tokens(sys.argv[1:] if argv is None else argv, run.args.hub_token)
    return without_token(shlex.join([*launch, "training/distill.py", *given]), run.args.hub_token)


def measure(run: Run, scheduler: DiscreteScheduler, texts: Texts | None, heldout: Tensor) -> None:
    """Measure the scheduler beside the same model's plain samplers: all processes draw, the main one fills the table."""
    args, state, accelerator = run.args, run.state, run.accelerator
    judge = NgramJudge(texts.judge) if texts is not None and accelerator.is_main_process else None
    temperatures = args.eval_temperatures if texts is not None else []
    samplers = {
        "bernoulli": AncestralScheduler.from_config(run.base, unmasking="bernoulli", order="random"),
        "counts": AncestralScheduler.from_config(run.base, unmasking="counts", order="random"),
        "counts, spread": AncestralScheduler.from_config(run.base, unmasking="counts", order="spread"),
        args.method: scheduler,
    }
    distance = distance_to(run, heldout)
    measured = {(row["sampler"], row["steps"]) for row in state["table"]}  # the same on all processes
    wanted = [(name, steps) for steps in args.num_inference_steps for name in samplers if (name, steps) not in measured]
    for name, steps in tqdm(wanted, desc="measuring"):
        bound = heldout_bound(run, samplers[name], steps, heldout)
        drawn = draw_samples(run, samplers[name], steps, temperatures)
        statistic = distance(drawn[0].samples)
        if accelerator.is_main_process:
            row = row_of(run.pipe, bound, drawn, heldout, judge, args.seed)
            row |= {} if statistic is None else {"statistic": statistic}
            state["table"].append({"sampler": name, "steps": steps} | row)
            run.add_seconds("measuring")
            save_checkpoint(args, state, run.tensors, scheduler)
            accelerator.log({f"{name}/{key}": value for key, value in row.items()}, step=steps)


def report(
    run: Run, scheduler: DiscreteScheduler, texts: Texts | None, heldout: Tensor, command: str
) -> dict[str, Any]:
    """Write everything down, and push it. On the main process alone."""
    args, state, accelerator = run.args, run.state, run.accelerator
    before_end(None)
    arguments = {k: v for k, v in identity(args).items() if k not in ("pretrained_model_name_or_path", "revision")}
    metrics = {
        "base_model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "method": args.method,
        "budgets": args.num_inference_steps,
        "data": "the model's own many-step samples" if "samples" in run.tensors else f"held-out {run.frozen.noun}",
        "sequence_evaluations": state["evaluations"],
        "schedule_gain": state.get("schedule_gain"),
        "data_entropy": unigram_entropy(heldout).mean().item(),
        "coefficients": scheduler.config.coefficients or {},
        "table": state["table"],
        "arguments": arguments,
    }
    scheduler.register_to_config(learned_for=run.learned_for | {"metrics": state["table"]})
    seconds = state["seconds"]
    facts = Facts(
        command,
        accelerator.num_processes,
        accelerator.device.type,
        seconds["learning"],
        seconds["measuring"],
        type(run.pipe).__name__,
        run.frozen.example(args.num_inference_steps[-1]),
    )
    write_files(args, scheduler, metrics, facts)
    accelerator.print(markdown_table(state["table"]))
    accelerator.print(f"results: {args.output_dir}")
    if args.push_to_hub:
        repo_id = create_repository(
            args.output_dir, args.hub_model_id or args.output_dir.resolve().name, args.hub_token
        )
        write_card(
            args.output_dir / "README.md", repo_id, type(scheduler).__name__, metrics, facts
        )  # now with the namespace
        accelerator.print(f"pushed: {upload(args.output_dir, repo_id, args.hub_token)}")
    return metrics


def write_files(args: argparse.Namespace, scheduler: DiscreteScheduler, metrics: dict[str, Any], facts: Facts) -> None:
    """Scheduler config, metrics, pictures and card, each under a temporary name first."""
    folder = args.output_dir
    write_text(folder / "scheduler_config.json", scheduler.to_json_string())
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_plot(folder / "plot.png", metrics["table"])
    write_coefficients_plot(folder / "coefficients.png", scheduler, args.num_inference_steps)
    repo_id = args.hub_model_id or folder.resolve().name
    write_card(folder / "README.md", repo_id, type(scheduler).__name__, metrics, facts)


if __name__ == "__main__":
    main()
