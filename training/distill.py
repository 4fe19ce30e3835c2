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
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    DiscreteScheduler,
    LearnedScheduler,
    LSDScheduler,
    information_curve,
)
from discrete_schedulers.evaluation import NgramJudge, generative_perplexity, sampler_nll_bound, unigram_entropy
from discrete_schedulers.information import schedule_gain
from discrete_schedulers.training.data import batches, generators, load_texts, pack
from discrete_schedulers.training.hub import (
    create_repository,
    markdown_table,
    upload,
    write_card,
    write_plot,
    write_text,
)
from discrete_schedulers.training.marginal import (
    Coefficients,
    Features,
    LogisticRatio,
    Verdict,
    divergence_weights,
    keep_best,
    two_sample_statistic,
)
from discrete_schedulers.training.objectives import (
    PHI_RANGE,
    SCALE_OF,
    CoupledRoll,
    Reduce,
    SharedNoise,
    draw_noise,
    fit_phi,
    literal_kappa_gradient,
    perturbed_start,
    phi_gradient,
    repaired_step_sizes,
    times_from_step_sizes,
)
from discrete_schedulers.training.temperatures import Rolled, descend_temperatures, roll, text_features

SMALLEST_STEP = 1e-6  # LSD+ as printed: gradient steps that would make a kappa or the time after it negative end here
DEFAULTS: dict[str, dict[str, Any]] = {  # of arguments that mean something else in each
    "marginal": {"num_samples": 128, "num_epochs": 100, "learning_rate": 0.05},
    "others": {"num_samples": 64, "num_epochs": 20, "learning_rate": 1e-3},
}
CANDIDATES = 10  # of marginal: how many of its iterates are judged, evenly, beside temperature 1
JUDGE_BUCKETS = 8  # tokens and pairs in the statistic that judges: it needs more samples than features
JUDGE_FEATURES = 2 * JUDGE_BUCKETS + 5  # of `text_features`


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
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning_rate is {args.learning_rate}; it must be positive and finite")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; allowed are 0 to {2**32 - 1}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file; it must be a folder, or not there")
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
            parser.error(f"--{name} {getattr(args, name)} is not a file; it must be one, a document a line")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb would store --hub_token in its config; log in with `hf auth login` instead")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
        except ValueError as error:
            parser.error(f"--hub_model_id: {error}")
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'discrete_schedulers[train]'")


# Samples


def sample(
    pipe: DiscreteDiffusionPipeline, purpose: int, count: int, length: int, steps: int, args: argparse.Namespace
) -> Tensor:
    """Samples of the pipeline with its scheduler, int64 (count, L); each depends on its index only."""
    parts = []
    for indices in batches(count, args.train_batch_size):
        drawn = generators(args.seed, purpose, indices)
        shape: dict[str, Any] = {"num_samples": len(indices), "length": length, "num_inference_steps": steps}
        parts.append(pipe(**shape, generator=drawn, output_type="pt", return_dict=False)[0])
    return torch.cat(parts)


# State on disk: whole checkpoints or none


def save_checkpoint(
    args: argparse.Namespace, state: dict[str, Any], tensors: dict[str, Tensor], scheduler: DiscreteScheduler | None
) -> None:
    """Write checkpoint-<n> under a temporary name, rename it, then drop the oldest ones."""
    number = max(map(checkpoint_number, known_checkpoints(args.output_dir)), default=0) + 1
    temporary = args.output_dir / f".checkpoint-{number}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents = {"state.json": json.dumps(state).encode(), "tensors.safetensors": safetensors.torch.save(tensors)}
    for name, content in contents.items():
        (temporary / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    (temporary / "sha256.json").write_text(json.dumps(digests))
    if scheduler is not None:
        scheduler.save_pretrained(temporary / "scheduler")
    os.replace(temporary, args.output_dir / f"checkpoint-{number}")
    for old in known_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
        shutil.rmtree(old)


def checkpoint_number(path: Path) -> int:
    return int(path.name.split("-")[1])


def known_checkpoints(output_dir: Path) -> list[Path]:
    """Folders checkpoint-<n>, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=checkpoint_number)


def load_checkpoint(args: argparse.Namespace, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The saved state, or an empty one.

    Raises:
        ValueError: If the checkpoint is missing, damaged, or belongs to a run with other arguments.
    """
    known = known_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None or (args.resume_from_checkpoint == "latest" and not known):
        return {"identity": identity, "coefficients": {}, "table": [], "evaluations": 0}, {}
    path = known[-1] if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
    if not path.is_dir():
        raise ValueError(f"`--resume_from_checkpoint` {path} is not a folder; there are: {[str(p) for p in known]}")
    try:
        digests = json.loads((path / "sha256.json").read_text())
        contents = {name: (path / name).read_bytes() for name in ("state.json", "tensors.safetensors")}
        damaged = [name for name in contents if hashlib.sha256(contents[name]).hexdigest() != digests[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged = [f"{type(error).__name__}: {error}"]
    if damaged:
        raise ValueError(
            f"checkpoint {path} is damaged ({', '.join(damaged)}): delete it and resume from another one, or start again "
            "without `--resume_from_checkpoint`"
        )
    state = json.loads(contents["state.json"])
    changed = {k: (state["identity"].get(k), v) for k, v in identity.items() if state["identity"].get(k) != v}
    if changed:
        raise ValueError(f"checkpoint {path} belongs to a run with other arguments (saved, now): {changed}")
    return state, safetensors.torch.load(contents["tensors.safetensors"])


# Learning


def roll_teacher(
    pipe: DiscreteDiffusionPipeline, base: dict, args: argparse.Namespace, noise: SharedNoise, state: Tensor, done: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Roll the teacher from one shared time to the next, from the `done`-th of them on, where it has the given state.

    Yields:
        Its state at the next shared time, int64 (B, L), and the rows masked before each step on the way there.
    """
    teacher = LSDScheduler.from_config(base, scale="score")
    teacher.set_timesteps(args.teacher_steps)
    stride = args.teacher_steps // math.lcm(*args.num_inference_steps)
    roll = CoupledRoll(pipe.denoiser, teacher, noise, state, args.train_batch_size)
    for index in range(done * stride):
        roll.survival = roll.survival * (1 - teacher.open_probability(index))
    for start in range(done * stride, args.teacher_steps, stride):
        masked = torch.zeros(stride, dtype=torch.float64)
        for index in range(start, start + stride):
            masked[index - start] = (roll.state == teacher.config.mask_token_id).sum()
            roll.step(index)
        yield roll.state.clone(), masked


def learn_phi(
    pipe: DiscreteDiffusionPipeline,
    scheduler: LSDScheduler,
    teacher_states: Tensor,
    noise: SharedNoise,
    start: Tensor,
    args: argparse.Namespace,
    reduce: Reduce,
) -> list[float]:
    """Phi for each step of the scheduler's grid (eq. 6): closed form in one roll, or the paper's gradient steps."""
    steps, process = len(scheduler.timesteps), absorbing(scheduler)
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
                phi[k] = max(phi[k] - args.learning_rate * gradient, PHI_RANGE[0])
            scheduler.register_to_config(coefficients={str(steps): {"scale": phi}})
            if k < steps - 1:
                roll.step(k)
    return phi


def learn_times(scheduler: LSDScheduler, masked: Tensor, args: argparse.Namespace) -> list[float]:
    """The grid of LSD+: eq. 8 by the paper's gradient steps, or the repaired objective.

    Both need the odds of the score only, which a normalised network has in closed form: no roll is needed.
    """
    steps, process = len(scheduler.timesteps), absorbing(scheduler)
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if args.repaired:
        fine = torch.linspace(1, 0, args.teacher_steps + 1, dtype=torch.float64)[:-1]
        opened = (
            masked * process.hazard(fine).reshape(-1) / args.teacher_steps
        )  # expected openings of each teacher step
        return times_from_step_sizes(
            repaired_step_sizes(process, opened.view(steps, -1).sum(1), masked.view(steps, -1)[:, 0])
        )
    kappa = torch.full((steps,), 1 / steps, dtype=torch.float64)
    for _ in range(args.num_epochs):
        for k in range(1, steps):  # tau_k, t_k for k = 1 .. M - 1: at k = M nothing is left to sample
            tau = (1 - kappa[:k].sum()).clamp(min=SMALLEST_STEP)
            gradient = literal_kappa_gradient(process, tau, uniform[k], float(kappa[k - 1]), args.teacher_steps)
            kappa[k - 1] = (kappa[k - 1] - args.learning_rate * gradient).clamp(min=SMALLEST_STEP)
    return times_from_step_sizes(kappa)


def learn_temperatures(
    pipe: DiscreteDiffusionPipeline,
    scheduler: LearnedScheduler,
    steps: int,
    data: Tensor,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> list[float]:
    """Inverse temperatures of a step budget: score-function descent on half of the data. Of its iterates, and temperature 1,
    the one is kept whose samples are nearest to the other half by `two_sample_statistic`."""
    processes, fit, heldout = accelerator.num_processes, data[::2], data[1::2]
    if len(heldout) <= JUDGE_FEATURES:
        raise ValueError(
            f"`--method marginal` judges on half of {len(data)} sequences; it needs more than {JUDGE_FEATURES} there "
            "(`--max_data_samples`, or `--num_samples` where there are no texts)"
        )

    def features(buckets: int) -> Features:
        """`text_features`, of which every process works out its share."""
        own = text_features(pipe.denoiser, buckets, args.train_batch_size)
        return lambda x: gather_samples(accelerator, own(x[accelerator.process_index :: processes]), len(x)).to(
            x.device
        )

    ratio, judges = LogisticRatio(fit, features(args.buckets)), features(JUDGE_BUCKETS)
    share = list(range(accelerator.process_index, args.num_samples, processes))

    def rolled(log_beta: Tensor, iteration: int) -> Rolled:
        """Every process draws its share; all get all."""
        parts = []
        for part in batches(len(share), args.train_batch_size):
            rows = [(iteration + 1) * args.num_samples + share[i] for i in part]
            drawn = [one for row in rows for one in generators(args.seed, 4, range(row, row + 1))]
            parts.append(
                roll(pipe.denoiser, scheduler, log_beta, (len(rows), data.shape[1]), drawn, accelerator.device)
            )
        x_0, slopes = (torch.cat(found) for found in zip(*parts, strict=True))
        return Rolled(
            gather_samples(accelerator, x_0, args.num_samples).to(accelerator.device),
            gather_samples(accelerator, slopes, args.num_samples).to(accelerator.device),
        )

    def weights(x: Tensor) -> Tensor:
        return divergence_weights(ratio({}, x), "reverse_kl")

    target, target_entropy = judges(heldout), unigram_entropy(heldout).mean().item()

    def verdict(candidate: Coefficients) -> Verdict:
        x = rolled(candidate["log_beta"], -1).x_0  # the same random numbers for all
        return Verdict(two_sample_statistic(judges(x), target), unigram_entropy(x).mean().item() / target_entropy)

    descent = descend_temperatures(rolled, weights, steps, args.num_epochs, args.learning_rate)
    every = -(-args.num_epochs // CANDIDATES)
    show = tqdm(descent, desc=f"{steps} steps", total=args.num_epochs, disable=not accelerator.is_main_process)
    candidates = [torch.zeros(steps, dtype=torch.float64)]
    candidates += [log_beta for n, log_beta in enumerate(show, start=1) if n % every == 0 or n == args.num_epochs]
    return keep_best(({"log_beta": one} for one in candidates), verdict).coefficients["log_beta"].exp().tolist()


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


def absorbing(scheduler: DiscreteScheduler) -> AbsorbingProcess:
    assert isinstance(scheduler.noise_process, AbsorbingProcess)
    return scheduler.noise_process


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
    bounds = [
        sampler_nll_bound(
            pipe.denoiser, scheduler, heldout[part.start : part.stop], steps, generators(args.seed, 1, part), len(part)
        )
        for part in batches(len(heldout), args.train_batch_size)
    ]
    samples = sample(pipe, 2, args.num_eval_samples, heldout.shape[1], steps, args)
    row: dict[str, Any] = {"sampler": name, "steps": steps, "nll": torch.cat(bounds).mean().item()}
    row["entropy"] = unigram_entropy(samples).mean().item()
    if judge is not None:
        row["perplexity"] = generative_perplexity(pipe.tokenizer.batch_decode(samples, skip_special_tokens=True), judge)
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
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
    show = accelerator.is_main_process

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
    base = {k: v for k, v in pipe.scheduler.config.items() if k not in ("coefficients", "learned_for")}
    base |= {"grid": "uniform", "draw": "exact"}
    straight = base["noise_schedule"] in ("loglinear", "linear")
    if args.learned_scheduler and args.method in ("lsd", "lsd_plus") and not straight:
        raise ValueError(
            f"`--learned_scheduler` needs loglinear or linear noise here; the model has {base['noise_schedule']!r}"
        )
    longest = pipe.config.denoiser.get("max_length")
    length = args.sequence_length or longest
    if length is None:
        raise ValueError("`--sequence_length` is required: this model does not say how long its sequences are")
    if longest is not None and length > longest:
        raise ValueError(f"`--sequence_length` is {length}; this model takes at most {longest}")
    if accelerator.is_main_process and args.report_to:
        accelerator.init_trackers(
            "distill", {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, str | int | float)}
        )

    # Where a killed run stood
    skipped = ("output_dir", "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint", "report_to")
    identity = {k: v for k, v in vars(args).items() if k not in (*skipped, "checkpoints_total_limit")}
    state, tensors = load_checkpoint(args, identity)
    accelerator.wait_for_everyone()  # nobody reads any more when the main process replaces the checkpoint

    def checkpoint(scheduler: DiscreteScheduler | None = None) -> None:
        if accelerator.is_main_process:
            save_checkpoint(args, state, tensors, scheduler)
        accelerator.wait_for_everyone()

    def reduce(tensor: Tensor) -> Tensor:
        # gloo and NCCL both take float64; the tensor has to be where the process group works
        return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()

    # Data to fit the curve and to measure on; without texts, samples of the model
    fits_on_data = args.method in ("optimal_grid", "marginal")
    texts = load_texts(args) if accelerator.is_main_process or fits_on_data else None
    if texts is not None:
        if pipe.tokenizer is None:
            raise ValueError("texts need a tokenizer, which this model does not bring: leave out data arguments")
        fit = pack(texts.fit, pipe.tokenizer, length, args.max_data_samples).to(accelerator.device)
        heldout = pack(texts.heldout, pipe.tokenizer, length, args.num_eval_samples).to(accelerator.device)
    elif fits_on_data:
        if args.method == "optimal_grid":
            require_two(args.num_samples)
        if "samples" not in tensors:
            pipe.scheduler = AncestralScheduler.from_config(base, unmasking="counts", order="random")
            tensors["samples"] = sample(pipe, 3, args.num_samples + args.num_eval_samples, length, length, args).cpu()
            checkpoint()
        fit, heldout = tensors["samples"].to(accelerator.device).split([args.num_samples, args.num_eval_samples])

    if accelerator.is_main_process:  # what came before refuses without a trace
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    passed: list[int] = []  # sequences in each call of the network since they were counted
    counting = pipe.model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))

    def evaluations() -> int:
        total = int(reduce(torch.tensor(sum(passed), dtype=torch.float64)))
        passed.clear()
        return total

    # Learn
    learned_for = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
    learned_for |= {"vocab_size": base["vocab_size"], "method": args.method}
    scheduler: DiscreteScheduler
    if args.method == "optimal_grid":
        require_two(len(fit))
        if "curve" not in state:
            asked = (pipe.denoiser, fit, base["mask_token_id"])
            orders = [torch.Generator().manual_seed(args.seed) for _ in range(2)]
            curve = information_curve(*asked, generator=orders[0], batch_size=args.train_batch_size)
            # R on few levels: the stairs of a fit on all of them would make it too small
            coarse = information_curve(
                *asked, min(length, 16) if length > 1 else None, orders[1], args.train_batch_size
            )
            state |= {"curve": curve.to_config(), "schedule_gain": schedule_gain(coarse)}
            state["evaluations"] += curve.num_evaluations + coarse.num_evaluations
            checkpoint()
        gain = state["schedule_gain"]
        accelerator.print(f"R = {gain:.3f}: the most a time grid can win is a factor of {1 / gain:.2f} in excess KL")
        settings = {"grid": "optimal", "information_curve": state["curve"], "learned_for": learned_for}
        scheduler = AncestralScheduler.from_config(base, **settings)
    elif args.method == "marginal":
        settings = {"order": "spread", "learned_for": learned_for}
        student = LearnedScheduler.from_config(base, **settings)
        for steps in args.num_inference_steps:
            if str(steps) in state["coefficients"]:
                continue
            beta = learn_temperatures(pipe, student, steps, fit, args, accelerator)
            state["coefficients"][str(steps)] = {"inverse_temperature": beta}
            state["evaluations"] += evaluations()
            accelerator.print(f"{steps} steps: inverse temperatures {json.dumps(beta)}")
            checkpoint(LearnedScheduler.from_config(base, coefficients=state["coefficients"], **settings))
        scheduler = LearnedScheduler.from_config(base, coefficients=state["coefficients"], **settings)
    else:
        # This process has its share of the samples; every process keeps the teacher's states of all of them
        share = list(range(accelerator.process_index, args.num_samples, accelerator.num_processes))
        noise = draw_noise(share, length, args.seed, accelerator.device)
        mask = base["mask_token_id"]
        segments = math.lcm(*args.num_inference_steps)  # of the teacher's grid, between times that students share
        if not tensors:
            tensors["states"] = torch.full((1, args.num_samples, length), mask)
            tensors["masked"] = torch.zeros(0, dtype=torch.float64)
        done = len(tensors["states"]) - 1
        rolled = roll_teacher(pipe, base, args, noise, tensors["states"][-1, share].to(accelerator.device), done)
        for number, (x, masked) in enumerate(
            tqdm(rolled, desc="teacher", initial=done, total=segments, disable=not show), start=done + 1
        ):
            tensors["states"] = torch.cat([tensors["states"], gather_samples(accelerator, x, args.num_samples)[None]])
            tensors["masked"] = torch.cat([tensors["masked"], reduce(masked)])
            state["evaluations"] += evaluations()
            if number == segments or number % -(-segments // 16) == 0:
                checkpoint()
        final = tensors["states"][-1]
        if texts is None:
            heldout = final[: args.num_eval_samples].to(accelerator.device)

        learned_for |= {"objective": args.objective, "repaired": args.repaired}
        settings = {"scale": args.scale, "learned_for": learned_for}
        if args.method == "lsd_plus":
            settings["grid"] = "learned"
        unigram = torch.bincount(final.flatten(), minlength=base["vocab_size"])  # no mask is left in them
        start = perturbed_start(noise, mask, args.hamming_share if args.relaxed else 0.0, unigram)
        for steps in args.num_inference_steps:
            if str(steps) in state["coefficients"]:
                continue
            student = LSDScheduler.from_config(
                base, coefficients={str(steps): {"scale": [1.0] * steps}}, scale=args.scale
            )
            student.set_timesteps(steps)
            at = torch.arange(steps) * (segments // steps)
            teacher_states = tensors["states"][at][:, share].to(accelerator.device)
            blocks = {"scale": learn_phi(pipe, student, teacher_states, noise, start, args, reduce)}
            if args.method == "lsd_plus":
                blocks["times"] = learn_times(student, tensors["masked"], args)
            state["coefficients"][str(steps)] = blocks
            state["evaluations"] += evaluations()
            accelerator.print(f"{steps} steps: {json.dumps(blocks)}")
            checkpoint(LSDScheduler.from_config(base, coefficients=state["coefficients"], **settings))
        scheduler = LSDScheduler.from_config(base, coefficients=state["coefficients"], **settings)
    counting.remove()
    if args.learned_scheduler:
        scheduler = as_learned(scheduler)

    # Measure, beside the same model's plain samplers
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        accelerator.end_training()
        return {}
    judge = NgramJudge(texts.judge) if texts is not None else None
    samplers = {
        "bernoulli": AncestralScheduler.from_config(base, unmasking="bernoulli", order="random"),
        "counts": AncestralScheduler.from_config(base, unmasking="counts", order="random"),
        "counts, spread": AncestralScheduler.from_config(base, unmasking="counts", order="spread"),
        args.method: scheduler,
    }
    measured = {(row["sampler"], row["steps"]) for row in state["table"]}
    wanted = [(name, steps) for steps in args.num_inference_steps for name in samplers]
    for name, steps in tqdm(wanted, desc="measuring", disable=not show):
        if (name, steps) in measured:
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
        "data": "held-out text" if texts is not None else "the model's own many-step samples",
        "sequence_evaluations": state["evaluations"],
        "schedule_gain": state.get("schedule_gain"),
        "data_entropy": unigram_entropy(heldout).mean().item(),
        "coefficients": scheduler.config.coefficients or {},
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
        repo_id = create_repository(args.output_dir, repo_id, args.hub_token)
        write_card(args.output_dir / "README.md", repo_id, type(scheduler).__name__, metrics)  # now with the namespace
        accelerator.print(f"pushed: {upload(args.output_dir, repo_id, args.hub_token)}")
    accelerator.end_training()
    return metrics


def require_two(sequences: int) -> None:
    """Raises `ValueError` if an information curve cannot be measured on so few sequences."""
    if sequences < 2:
        raise ValueError(
            f"a curve needs 2 sequences or more; there is {sequences} (`--max_data_samples`, `--num_samples`)"
        )


def gather_samples(accelerator: Accelerator, x: Tensor, num_samples: int) -> Tensor:
    """What all processes have, (B, F) each, as (num_samples, F) in order of the sample index, on the CPU.

    Process r of P has the samples r, r + P, ...; those with one sample fewer pad.
    """
    rows = -(-num_samples // accelerator.num_processes)
    x = torch.cat([x, x[:1].expand(rows - len(x), -1)])
    everyone = accelerator.gather(x).view(accelerator.num_processes, rows, -1)
    return everyone.transpose(0, 1).flatten(0, 1)[:num_samples].cpu()


if __name__ == "__main__":
    main()
