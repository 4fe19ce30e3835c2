r"""Learn the coefficients of a scheduler for a frozen discrete diffusion model, and ship them as a scheduler config.

    accelerate launch training/distill.py --pretrained_model_name_or_path discrete-schedulers/tiny-text \
        --method lsd --num_inference_steps 4 8 16 --output_dir tiny-text-lsd

Methods: `lsd` (a factor on the score for each step), `lsd_plus` (step sizes as well; `--repaired` for the objective whose
optimum is a sampler), `optimal_grid` (dynamic programming on the model's own information curve, any number of steps).

The folder then holds scheduler_config.json, metrics.json, plot.png and README.md; `--push_to_hub` uploads these in one
commit. Every random number is a function of (seed, sample index), so the coefficients do not depend on the number of
processes, and a run that was killed goes on with `--resume_from_checkpoint latest`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    InformationCurve,
    LSDScheduler,
    information_curve,
)
from discrete_schedulers.evaluation import NgramJudge, generative_perplexity, sampler_nll_bound, unigram_entropy
from discrete_schedulers.information import schedule_gain
from discrete_schedulers.training.hub import markdown_table, push, write_card, write_plot, write_text
from discrete_schedulers.training.objectives import (
    OBJECTIVES,
    CoupledRoll,
    SharedNoise,
    draw_noise,
    fit_phi,
    literal_kappa_gradient,
    perturbed_start,
    phi_gradient,
    repaired_step_sizes,
    times_from_step_sizes,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Model and data
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id, folder, or a bundled id.")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--dataset_name", default=None, help="A dataset for `datasets.load_dataset`.")
    parser.add_argument("--dataset_config", default=None)
    parser.add_argument("--train_file", default=None, help="Text file that curves are fitted on, a document a line.")
    parser.add_argument("--validation_file", default=None, help="Text file that metrics are measured on.")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_data_samples", type=int, default=256, help="Sequences of each split that are used.")
    parser.add_argument("--sequence_length", type=int, default=None, help="Defaults to the model's longest.")
    # Method
    parser.add_argument("--method", choices=["lsd", "lsd_plus", "optimal_grid"], default="lsd")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4, 8, 16], help="Step budgets.")
    parser.add_argument("--objective", choices=OBJECTIVES, default="generalised_kl", help="d of the paper's eq. 6.")
    parser.add_argument("--scale", choices=["score", "log_score"], default="score", help="What Phi multiplies.")
    parser.add_argument("--solver", choices=["closed_form", "sgd"], default="closed_form", help="sgd: as in the paper.")
    parser.add_argument("--relaxed", action="store_true", help="Perturb the student's first state (eq. 9).")
    parser.add_argument("--hamming_share", type=float, default=0.05, help="Share of positions perturbed.")
    parser.add_argument(
        "--repaired", action="store_true", help="lsd_plus: accumulated teacher term, softmax step sizes."
    )
    parser.add_argument("--teacher_steps", type=int, default=1024)
    parser.add_argument("--num_samples", type=int, default=64, help="Samples that coefficients are fitted on.")
    parser.add_argument("--num_epochs", type=int, default=20, help="Gradient steps of `--solver sgd` and of lsd_plus.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
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
    for name in (
        "teacher_steps",
        "num_samples",
        "num_epochs",
        "train_batch_size",
        "max_data_samples",
        "num_eval_samples",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps is {args.num_inference_steps}; budgets must be at least 1")
    if args.method != "optimal_grid":
        wrong = [n for n in args.num_inference_steps if args.teacher_steps % n]
        if wrong:
            parser.error(
                f"--teacher_steps {args.teacher_steps} is not a multiple of {wrong}: the grids would not be nested"
            )
    if args.method == "lsd_plus" and args.objective != "generalised_kl":
        parser.error(f"--objective {args.objective} is for --method lsd; lsd_plus has generalised_kl")
    if args.repaired and args.method != "lsd_plus":
        parser.error("--repaired is for --method lsd_plus")
    if not 0 <= args.hamming_share < 1:
        parser.error(f"--hamming_share is {args.hamming_share}; allowed are numbers in [0, 1)")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb would store --hub_token in its config; log in with `hf auth login` instead")
    args.num_inference_steps = sorted(set(args.num_inference_steps))
    return args


# Data


def load_texts(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]] | None:
    """Texts to fit on, to measure on, and for the judge; `None` where none are named and the model brings none."""
    from datasets import load_dataset

    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config)
        held_out = data["validation" if "validation" in data else "test"][args.text_column]
        return list(data["train"][args.text_column]), list(held_out), list(data["train"][args.text_column])
    if args.train_file is not None:
        named = {"train": args.train_file, "validation": args.validation_file or args.train_file}
        data = load_dataset("text", data_files=named)
        return list(data["train"]["text"]), list(data["validation"]["text"]), list(data["train"]["text"])
    if args.pretrained_model_name_or_path == "discrete-schedulers/tiny-text":
        with as_file(files("discrete_schedulers") / "assets" / "tiny-text" / "corpus") as folder:
            named = {split: str(folder / f"{split}.txt.xz") for split in ("train", "validation", "test")}
            data = load_dataset("text", data_files=named)
            return tuple(list(data[split]["text"]) for split in ("validation", "test", "train"))
    return None


def pack(texts: list[str], tokenizer: Any, length: int, limit: int) -> Tensor:
    """Texts as one stream of tokens cut into windows of L, evenly thinned to at most `limit`, int64 (n, L).

    Raises:
        ValueError: If they do not fill one window.
    """
    stream = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
    windows = stream[: len(stream) // length * length].view(-1, length)
    if len(windows) == 0:
        raise ValueError(f"the data has {len(stream)} tokens, fewer than one sequence of `--sequence_length` {length}")
    chosen = torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()
    return windows[chosen]


# State on disk: whole checkpoints or none


def save_checkpoint(
    args: argparse.Namespace, state: dict[str, Any], tensors: dict[str, Tensor], scheduler: Any
) -> None:
    """Write checkpoint-<n> under a temporary name, rename it, then drop the oldest ones."""
    number = max([checkpoint_number(p) for p in args.output_dir.glob("checkpoint-*")], default=0) + 1
    temporary = args.output_dir / f".checkpoint-{number}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors or {"empty": torch.zeros(1)}, temporary / "teacher.safetensors")
    (temporary / "state.json").write_text(json.dumps(state))
    if scheduler is not None:
        scheduler.save_pretrained(temporary / "scheduler")
    os.replace(temporary, args.output_dir / f"checkpoint-{number}")
    known = sorted(args.output_dir.glob("checkpoint-*"), key=checkpoint_number)
    for old in known[: -args.checkpoints_total_limit]:
        shutil.rmtree(old)


def checkpoint_number(path: Path) -> int:
    return int(path.name.split("-")[1])


def load_checkpoint(args: argparse.Namespace, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The saved state, or an empty one.

    Raises:
        ValueError: If the checkpoint is missing or belongs to a run with other arguments.
    """
    empty: dict[str, Any] = {"identity": identity, "coefficients": {}, "table": []}
    if args.resume_from_checkpoint is None:
        return empty, {}
    known = sorted(args.output_dir.glob("checkpoint-*"), key=checkpoint_number)
    path = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint != "latest" else (known or [None])[-1]
    if path is None:
        return empty, {}
    if not (path / "state.json").is_file():
        raise ValueError(f"`--resume_from_checkpoint` {path} is not a checkpoint; in the output folder: {known}")
    state = json.loads((path / "state.json").read_text())
    changed = {k: (state["identity"].get(k), v) for k, v in identity.items() if state["identity"].get(k) != v}
    if changed:
        raise ValueError(f"checkpoint {path} belongs to a run with other arguments (saved, now): {changed}")
    return state, load_file(path / "teacher.safetensors")


# Learning


def roll_teacher(
    pipe: DiscreteDiffusionPipeline, base: dict, args: argparse.Namespace, noise: SharedNoise, every: int, show: bool
) -> dict[str, Tensor]:
    """Teacher states at every `every`-th of its steps, int64 (N / every, B, L), and rows masked before each step."""
    teacher = LSDScheduler.from_config(base)
    teacher.set_timesteps(args.teacher_steps)
    mask = teacher.config.mask_token_id
    start = torch.full(noise.thresholds.shape, mask, device=noise.thresholds.device)
    roll = CoupledRoll(pipe.denoiser, teacher, noise, start, args.train_batch_size)
    states, masked = [], torch.zeros(args.teacher_steps, dtype=torch.float64)
    for index in tqdm(range(args.teacher_steps), desc="teacher", disable=not show):
        if index % every == 0:
            states.append(roll.state.clone())
        masked[index] = (roll.state == mask).sum()
        roll.step(index)
    evaluations = torch.tensor([float(roll.num_evaluations)], dtype=torch.float64)
    final = roll.state.clone()
    return {"states": torch.stack(states).cpu(), "final": final.cpu(), "masked": masked, "evaluations": evaluations}


def learn_phi(
    pipe: DiscreteDiffusionPipeline,
    scheduler: LSDScheduler,
    teacher_states: Tensor,
    noise: SharedNoise,
    start: Tensor,
    args: argparse.Namespace,
    reduce: Any,
) -> list[float]:
    """Phi for each step of the scheduler's grid (eq. 6): closed form in one roll, or the paper's gradient steps."""
    steps, process = len(scheduler.timesteps), scheduler.noise_process
    phi = [1.0] * steps
    epochs = 1 if args.solver == "closed_form" else args.num_epochs
    for _ in range(epochs):
        roll = CoupledRoll(pipe.denoiser, scheduler, noise, start, args.train_batch_size)
        for k in range(steps):
            shared = (pipe.denoiser, process, roll.state, teacher_states[k], scheduler.times[k])
            if args.solver == "closed_form":
                phi[k] = fit_phi(*shared, args.objective, args.train_batch_size, reduce)
            else:
                gradient = phi_gradient(*shared, phi[k], args.objective, args.train_batch_size, reduce)
                phi[k] = max(phi[k] - args.learning_rate * gradient, 0.0)
            blocks = scheduler.config.coefficients[str(steps)] | {"scale": phi}
            scheduler.register_to_config(coefficients={str(steps): blocks})
            if k < steps - 1:
                roll.step(k)
    return phi


def learn_times(scheduler: LSDScheduler, masked: Tensor, args: argparse.Namespace) -> list[float]:
    """The grid of LSD+: eq. 8 by the paper's gradient steps, or the repaired objective.

    Both need the odds of the score only, which a normalised network has in closed form: no roll is needed.
    """
    steps, process = len(scheduler.timesteps), scheduler.noise_process
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if args.repaired:
        fine = torch.linspace(1, 0, args.teacher_steps + 1, dtype=torch.float64)[:-1]
        opened = (
            masked * process.hazard(fine).reshape(-1) / args.teacher_steps
        )  # expected openings of each teacher step
        weights = masked.view(steps, -1)[:, 0]
        return times_from_step_sizes(repaired_step_sizes(process, opened.view(steps, -1).sum(1) / weights, weights))
    kappa = torch.full((steps,), 1 / steps, dtype=torch.float64)
    for _ in range(args.num_epochs):
        for k in range(1, steps):  # tau_k, t_k for k = 1 .. M - 1: at k = M nothing is left to sample
            tau = (1 - kappa[:k].sum()).clamp(min=1e-6)
            gradient = literal_kappa_gradient(process, tau, uniform[k], float(kappa[k - 1]), args.teacher_steps)
            kappa[k - 1] = (kappa[k - 1] - args.learning_rate * gradient).clamp(min=1e-6)
    return times_from_step_sizes(kappa)


# Measuring


def measure(
    pipe: DiscreteDiffusionPipeline,
    name: str,
    scheduler: DiscreteScheduler,
    steps: int,
    heldout: Tensor,
    judge: NgramJudge | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the table: NLL bound on held-out data, entropy of samples, perplexity under the judge."""
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(args.seed + 1)
    nll = sampler_nll_bound(pipe.denoiser, scheduler, heldout, steps, generator, args.train_batch_size)
    generators = [torch.Generator().manual_seed((args.seed + 2) * 1_000_003 + i) for i in range(args.num_eval_samples)]
    sequences = []
    for start in range(0, args.num_eval_samples, args.train_batch_size):
        part = generators[start : start + args.train_batch_size]
        output = pipe(num_samples=len(part), length=heldout.shape[1], num_inference_steps=steps, generator=part)
        sequences.append(output.sequences)
    samples = torch.cat(sequences)
    row = {"sampler": name, "steps": steps, "nll": nll.mean().item(), "entropy": unigram_entropy(samples).mean().item()}
    if judge is not None:
        row["perplexity"] = generative_perplexity(pipe.tokenizer.batch_decode(samples, skip_special_tokens=True), judge)
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir
    )
    set_seed(args.seed)
    show = accelerator.is_local_main_process
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    # The frozen model and its scheduler
    pipe = DiscreteDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    pipe.model.requires_grad_(False).eval()
    if args.mixed_precision != "no":
        pipe.model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision])
    if pipe.scheduler.config.process != "absorbing":
        raise ValueError(
            "`--pretrained_model_name_or_path` is a uniform-noise model; these methods are for masked models"
        )
    base = {k: v for k, v in pipe.scheduler.config.items() if k not in ("coefficients", "learned_for")} | {
        "grid": "uniform"
    }
    length = args.sequence_length or pipe.config.denoiser.get("max_length")
    if length is None:
        raise ValueError("`--sequence_length` is required: this model does not say how long its sequences are")
    if accelerator.is_main_process and args.report_to:
        accelerator.init_trackers(
            "distill", {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, str | int | float)}
        )

    # Where a killed run stood
    skipped = ("output_dir", "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint", "report_to")
    identity = {k: v for k, v in vars(args).items() if k not in (*skipped, "checkpoints_total_limit")}
    state, tensors = load_checkpoint(args, identity)

    def checkpoint(scheduler: Any = None) -> None:
        if accelerator.is_main_process:
            save_checkpoint(args, state, tensors, scheduler)
        accelerator.wait_for_everyone()

    def reduce(tensor: Tensor) -> Tensor:
        # gloo and NCCL both take float64; the tensor has to be where the process group works
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()

    # The teacher: this process rolls its share of the samples, every process keeps what it rolled
    if args.method != "optimal_grid":
        share = range(accelerator.process_index, args.num_samples, accelerator.num_processes)
        noise = draw_noise(share, length, args.seed, accelerator.device)
        every = args.teacher_steps // max_common_grid(args.num_inference_steps, args.teacher_steps)
        if "states" not in tensors:
            rolled = roll_teacher(pipe, base, args, noise, every, show)
            tensors = {k: gather_samples(accelerator, v, k, args.num_samples) for k, v in rolled.items()}
            checkpoint()
        teacher_states = tensors["states"][:, list(share)].to(accelerator.device)

    # Data to fit and to measure on; without any, the teacher's own samples
    texts = load_texts(args) if accelerator.is_main_process or args.method == "optimal_grid" else None
    judge = None
    if texts is not None:
        fit = pack(texts[0], pipe.tokenizer, length, args.max_data_samples).to(accelerator.device)
        heldout = pack(texts[1], pipe.tokenizer, length, args.num_eval_samples).to(accelerator.device)
    else:
        fit = heldout = sample_data(pipe, base, args, length, tensors, accelerator)

    # Learn
    learned_for = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
    learned_for |= {"vocab_size": base["vocab_size"], "method": args.method}
    scheduler: DiscreteScheduler
    if args.method == "optimal_grid":
        if "curve" not in state:
            generator = torch.Generator().manual_seed(args.seed)
            curve = information_curve(
                pipe.denoiser, fit, base["mask_token_id"], generator=generator, batch_size=args.train_batch_size
            )
            state["curve"], state["evaluations"] = curve.to_config(), curve.num_evaluations
            checkpoint()
        gain = schedule_gain(InformationCurve.from_config(state["curve"]))
        accelerator.print(f"R = {gain:.3f}: the most a time grid can win is a factor of {1 / gain:.2f} in excess KL")
        state["schedule_gain"] = gain
        scheduler = AncestralScheduler.from_config(
            base, grid="optimal", information_curve=state["curve"], learned_for=learned_for
        )
    else:
        settings: dict[str, Any] = {"scale": args.scale, "learned_for": learned_for}
        if args.method == "lsd_plus":
            settings["grid"] = "learned"
        for steps in args.num_inference_steps:
            if str(steps) in state["coefficients"]:
                continue
            blocks = {"scale": [1.0] * steps}
            student = LSDScheduler.from_config(base, coefficients={str(steps): blocks}, scale=args.scale)
            student.set_timesteps(steps)
            at = torch.arange(steps) * (len(teacher_states) // steps)
            start = perturbed_start(
                noise,
                base["mask_token_id"],
                args.hamming_share if args.relaxed else 0.0,
                unigram(tensors["final"], base),
            )
            blocks["scale"] = learn_phi(pipe, student, teacher_states[at], noise, start, args, reduce)
            if args.method == "lsd_plus":
                blocks["times"] = learn_times(student, tensors["masked"], args)
            state["coefficients"][str(steps)] = blocks
            accelerator.print(f"{steps} steps: {json.dumps(blocks)}")
            checkpoint(LSDScheduler.from_config(base, coefficients=state["coefficients"], **settings))
        state["evaluations"] = int(tensors["evaluations"].sum())
        scheduler = LSDScheduler.from_config(base, coefficients=state["coefficients"], **settings)

    # Measure, beside the same model's plain samplers
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        accelerator.end_training()
        return {}
    if texts is not None:
        judge = NgramJudge(texts[2])
    samplers = {
        "bernoulli": AncestralScheduler.from_config(base, unmasking="bernoulli", order="random"),
        "counts": AncestralScheduler.from_config(base, unmasking="counts", order="random"),
        "counts, spread": AncestralScheduler.from_config(base, unmasking="counts", order="spread"),
        args.method: scheduler,
    }
    done = {(row["sampler"], row["steps"]) for row in state["table"]}
    wanted = [(name, steps) for steps in args.num_inference_steps for name in samplers]
    for name, steps in tqdm(wanted, desc="measuring", disable=not show):
        if (name, steps) in done:
            continue
        row = measure(pipe, name, samplers[name], steps, heldout, judge, args)
        state["table"].append(row)
        save_checkpoint(args, state, tensors, scheduler)
        accelerator.log({f"{name}/{key}": row[key] for key in row if key not in ("sampler", "steps")}, step=steps)

    # Write down
    arguments = {k: v for k, v in identity.items() if k not in ("pretrained_model_name_or_path", "revision")}
    metrics = {
        "base_model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "method": args.method,
        "budgets": args.num_inference_steps,
        "sequence_evaluations": state["evaluations"],
        "schedule_gain": state.get("schedule_gain"),
        "data_entropy": unigram_entropy(heldout).mean().item(),
        "coefficients": state["coefficients"],
        "table": state["table"],
        "arguments": arguments,
    }
    scheduler.register_to_config(learned_for=learned_for | {"metrics": state["table"]})
    scheduler.save_pretrained(args.output_dir / ".scheduler")
    os.replace(args.output_dir / ".scheduler" / "scheduler_config.json", args.output_dir / "scheduler_config.json")
    shutil.rmtree(args.output_dir / ".scheduler")
    write_text(args.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_plot(args.output_dir / "plot.png", state["table"])
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    write_card(args.output_dir / "README.md", repo_id, type(scheduler).__name__, metrics)
    accelerator.print(markdown_table(state["table"]))
    accelerator.print(f"results: {args.output_dir}")
    if args.push_to_hub:
        accelerator.print(f"pushed: {push(args.output_dir, repo_id, args.hub_token)}")
    accelerator.end_training()
    return metrics


def max_common_grid(budgets: list[int], teacher_steps: int) -> int:
    """The coarsest subdivision of the teacher's grid that holds every budget's grid."""
    return next(n for n in range(1, teacher_steps + 1) if teacher_steps % n == 0 and all(n % b == 0 for b in budgets))


def gather_samples(accelerator: Accelerator, tensor: Tensor, name: str, num_samples: int) -> Tensor:
    """What all processes rolled: samples in order of their index, counts summed."""
    if name in ("masked", "evaluations"):
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()
    axis = tensor.dim() - 2  # samples stand before positions
    first = tensor.movedim(axis, 0).contiguous().to(accelerator.device)
    rows = accelerator.num_processes * (-(-num_samples // accelerator.num_processes))
    padding = rows // accelerator.num_processes - len(first)  # processes with one sample fewer
    first = torch.cat([first, first[:1].expand(padding, *first.shape[1:])]) if padding else first
    everyone = accelerator.gather(first).view(accelerator.num_processes, -1, *first.shape[1:])
    return everyone.transpose(0, 1).flatten(0, 1)[:num_samples].movedim(0, axis).contiguous().cpu()


def unigram(samples: Tensor, base: dict[str, Any]) -> Tensor:
    """Token law of the teacher's samples, (V,), 0 at the mask."""
    return torch.bincount(samples.flatten(), minlength=base["vocab_size"]).double()


def sample_data(
    pipe: DiscreteDiffusionPipeline,
    base: dict[str, Any],
    args: argparse.Namespace,
    length: int,
    tensors: dict[str, Tensor],
    accelerator: Accelerator,
) -> Tensor:
    """The model's own many-step samples as data: the teacher's, or one token at a time."""
    if "final" in tensors:
        return tensors["final"][: args.num_eval_samples].to(accelerator.device)
    pipe.scheduler = AncestralScheduler.from_config(base, unmasking="counts", order="random")
    generator = torch.Generator().manual_seed(args.seed + 3)
    samples = [
        pipe(
            num_samples=args.train_batch_size, length=length, num_inference_steps=length, generator=generator
        ).sequences
        for _ in range(-(-args.num_eval_samples // args.train_batch_size))
    ]
    return torch.cat(samples)


if __name__ == "__main__":
    main()
