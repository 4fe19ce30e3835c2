"""The arguments of `distill.py`."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from discrete_schedulers.training.frozen import JUDGED_FEATURES
from discrete_schedulers.training.hub import Parser, access_token, check_counts
from discrete_schedulers.training.method_grids import RESOLUTION
from discrete_schedulers.training.method_marginal import FLOATS, number_of_floats
from discrete_schedulers.training.methods import METHODS
from discrete_schedulers.training.objectives import SCALE_OF

NUM_SAMPLES = {"marginal": 128, "search": 128, "order": 128}  # elsewhere 64
LSD = ("lsd", "lsd_plus")
ONLY_FOR: dict[str, dict[str, Any]] = {  # who reads an argument, and what it is there where it is not given
    "objective": dict.fromkeys(LSD),
    "scale": dict.fromkeys(LSD),
    "solver": dict.fromkeys(LSD, "closed_form"),
    "relaxed": dict.fromkeys(LSD, False),
    "hamming_share": dict.fromkeys(LSD, 0.05),
    "teacher_steps": dict.fromkeys(LSD, 1024),
    "repaired": {"lsd_plus": False},
    "unbiased": {"jys": False},
    "unmasking": dict.fromkeys(("jys", "beta"), "counts"),
    "order": {"marginal": "spread", "search": "best"} | dict.fromkeys(("jys", "beta", "optimal_grid"), "random"),
    "blocks": {"search": ["contrast", "temperature_line"]},
    "plan": {"search": "best"},
    "guidance_scale": {"search": 1.0},
    "buckets": {"marginal": 128},
    "block_length": {"learn2pd": None},
    "hidden_units": {"learn2pd": 32},
    "final_share": {"learn2pd": 0.95},
    "num_epochs": dict.fromkeys(LSD, 20) | {"marginal": 100, "search": 60, "order": 400, "learn2pd": 500},
    "learning_rate": dict.fromkeys(LSD, 1e-3) | {"marginal": 0.05, "learn2pd": 0.01},
}
# What a run may change when it goes on
FREE = {"output_dir", "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint", "report_to"}
FREE |= {"checkpoints_total_limit"}


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The arguments, checked, with what they mean where they are not given; `description` is for `--help`."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag: dict[str, Any] = {"action": "store_true", "default": None}
    # Model and data
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id, folder, or a bundled id.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit of the model.")
    parser.add_argument("--dataset_name", default=None, help="A dataset for `datasets.load_dataset`.")
    parser.add_argument("--dataset_config", default=None, help="Its name, where a dataset has several.")
    parser.add_argument("--train_file", default=None, help="Text file to fit on, a document a line.")
    parser.add_argument(
        "--validation_file", default=None, help="Text file to measure on. Default: every tenth line of --train_file."
    )
    parser.add_argument("--text_column", default="text", help="Of the dataset. Default: %(default)s.")
    parser.add_argument("--train_data_dir", default=None, help="Folder of pictures, for a model of images.")
    parser.add_argument("--image_column", default="image", help="Of the dataset. Default: %(default)s.")
    parser.add_argument("--class_column", default=None, help="Of the dataset: classes, for a model that has them.")
    parser.add_argument("--prompt_file", default=None, help="What samples show, a prompt a line: for text to image.")
    parser.add_argument("--max_data_samples", type=int, default=256, help="Sequences of each split that are used.")
    parser.add_argument("--sequence_length", type=int, default=None, help="Defaults to the model's longest.")
    # Method
    parser.add_argument("--method", choices=METHODS, default="lsd", help="See above. Default: %(default)s.")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[4, 8, 16], help="Step budgets.")
    parser.add_argument(
        "--objective", choices=SCALE_OF, default=None, help="d of eq. 6. Default: generalised_kl, or what --scale has."
    )
    parser.add_argument(
        "--scale", choices=["score", "log_score"], default=None, help="What Phi multiplies. Default: what d is for."
    )
    parser.add_argument(
        "--solver", choices=["closed_form", "sgd"], default=None, help="closed_form, or sgd: as in the paper."
    )
    parser.add_argument("--relaxed", **flag, help="Perturb the student's first state (eq. 9).")
    parser.add_argument("--hamming_share", type=float, default=None, help="Share of positions perturbed, 0.05.")
    parser.add_argument("--repaired", **flag, help="lsd_plus: accumulated teacher term, softmax step sizes.")
    parser.add_argument(
        "--unbiased", **flag, help="jys: the part that ancestral steps pay, solved exactly; any budget."
    )
    parser.add_argument(
        "--unmasking",
        choices=["counts", "bernoulli"],
        default=None,
        help="jys, beta: how their scheduler opens masks, counts.",
    )
    parser.add_argument(
        "--order",
        choices=["random", "spread", "best"],
        default=None,
        help="In which positions open; marginal: spread; jys, beta, optimal_grid: random; search: best, that of both whose "
        "samples are nearer, and with --plan even spread.",
    )
    parser.add_argument(
        "--blocks",
        choices=FLOATS,
        nargs="+",
        default=None,
        help="search: what it is over: a contrast (context against what is likely anyway), an inverse temperature a step, or "
        "those of the first and last, a top-p, a and b of a Beta grid, a and b of a gate, a strength of remasking. Fewer than "
        "20 floats; contrast and temperature_line where it is not given.",
    )
    parser.add_argument(
        "--plan",
        choices=["best", "even"],
        default=None,
        help="search: how many positions a step opens: even numbers, or (best) the best of even ones, doubling ones and the "
        "optimum of the bound, before the search. A grid among the blocks needs even.",
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=None, help="search: of the samples of an image model, 1."
    )
    parser.add_argument(
        "--block_length", type=int, default=None, help="learn2pd: positions its filter sees; all by default."
    )
    parser.add_argument("--hidden_units", type=int, default=None, help="learn2pd: of its filter, 32.")
    parser.add_argument(
        "--final_share",
        type=float,
        default=None,
        help="learn2pd: how many of the accepted tokens are final, 0.95; sets the threshold.",
    )
    parser.add_argument(
        "--learned_scheduler",
        action="store_true",
        help="Write a LearnedScheduler, which has more to learn, with this law.",
    )
    parser.add_argument("--teacher_steps", type=int, default=None, help="lsd, lsd_plus: of the teacher's roll, 1024.")
    parser.add_argument(
        "--num_samples",
        type=int,
        default=None,
        help="Samples that coefficients are fitted on: 64; 128 for each gradient of marginal, candidate of search, and order.",
    )
    parser.add_argument(
        "--num_epochs",
        type=int,
        default=None,
        help="Gradient steps of `--solver sgd` and of lsd_plus (20), marginal (100) and learn2pd (500); candidates of search "
        "(60) and order (400).",
    )
    parser.add_argument("--learning_rate", type=float, default=None, help="1e-3; marginal 0.05, learn2pd 0.01.")
    parser.add_argument(
        "--buckets", type=int, default=None, help="marginal: hashed tokens and pairs that its ratio sees, 128."
    )
    parser.add_argument("--train_batch_size", type=int, default=16, help="Sequences in one call of the network.")
    # Evaluation
    parser.add_argument("--num_eval_samples", type=int, default=64, help="Samples and held-out sequences per budget.")
    parser.add_argument(
        "--eval_temperatures",
        type=float,
        nargs="+",
        default=[0.8, 0.9, 1.0, 1.1],
        help="Where there are texts: temperatures of every sampler, between which it has the data's entropy.",
    )
    # Run
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Of the network. Default: %(default)s."
    )
    parser.add_argument("--report_to", default=None, help="A tracker of Accelerate, such as tensorboard.")
    parser.add_argument("--resume_from_checkpoint", default=None, help="A checkpoint folder, or `latest`.")
    parser.add_argument(
        "--checkpoints_total_limit", type=int, default=1, help="How many are kept. Default: %(default)s."
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the finished folder.")
    parser.add_argument("--hub_model_id", default=None, help="Defaults to the name of the output folder.")
    parser.add_argument("--hub_token", type=access_token, help="Better HF_TOKEN: launchers print what they were given.")
    args = parser.parse_args(argv)
    given = {name for name in ONLY_FOR if getattr(args, name) is not None}
    for name in ONLY_FOR.keys() - given:
        setattr(args, name, ONLY_FOR[name].get(args.method))
    if args.num_samples is None:
        args.num_samples = NUM_SAMPLES.get(args.method, 64)
    check_args(parser, args, given)
    args.num_inference_steps = sorted(set(args.num_inference_steps))
    args.eval_temperatures = sorted(set(args.eval_temperatures))
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Exits with a message if arguments are not allowed, contradict each other, or (`given`) are not for the method."""
    counts = ["teacher_steps", "num_samples", "num_epochs", "train_batch_size", "max_data_samples", "num_eval_samples"]
    counts += ["buckets", "checkpoints_total_limit", "sequence_length", "block_length", "hidden_units"]
    check_counts(parser, args, counts)
    if min(args.num_inference_steps) < 1:
        parser.error(f"--num_inference_steps is {args.num_inference_steps}; budgets must be at least 1")
    wrong = [n for n in args.num_inference_steps if args.method in LSD and args.teacher_steps % n]
    if wrong:
        parser.error(
            f"--teacher_steps {args.teacher_steps} is not a multiple of {wrong}: the grids would not be nested"
        )
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning_rate is {args.learning_rate}; it must be positive and finite")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; allowed are 0 to {2**32 - 1}")
    if not all(0 < one < math.inf for one in args.eval_temperatures):
        parser.error(f"--eval_temperatures is {args.eval_temperatures}; temperatures must be positive")
    if args.hamming_share is not None and not 0 <= args.hamming_share < 1:
        parser.error(f"--hamming_share is {args.hamming_share}; allowed are numbers in [0, 1)")

    check_given(parser, args, given)
    if args.method in LSD:
        check_lsd(parser, args)
    check_method(parser, args, given)

    check_texts(parser, args)
    check_pictures(parser, args)
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb would store --hub_token in its config; log in with `hf auth login` instead")
    check_push(parser, args)
    if args.method == "search" and find_spec("cma") is None:
        parser.error("--method search needs cma: pip install 'discrete_schedulers[search]'")
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'discrete_schedulers[train]'")


def check_texts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if the arguments of `data.load_texts` contradict each other, or name what is no file."""
    if args.dataset_name is not None and args.train_file is not None:
        parser.error("--dataset_name and --train_file cannot both be given")
    if args.dataset_config is not None and args.dataset_name is None:
        parser.error("--dataset_config needs --dataset_name")
    if args.validation_file is not None and args.train_file is None:
        parser.error("--validation_file needs --train_file")
    for name in ("train_file", "validation_file"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).is_file():
            parser.error(f"--{name} {getattr(args, name)} is not a file; it must be one, a document a line")


def check_pictures(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if the arguments of `data.load_pictures` contradict each other, or name what is not there."""
    if args.train_data_dir is not None:
        if args.dataset_name is not None or args.train_file is not None:
            parser.error("--train_data_dir goes with neither --dataset_name nor --train_file")
        if not Path(args.train_data_dir).is_dir():
            parser.error(f"--train_data_dir {args.train_data_dir} is not a folder; it must be one, of pictures")
    if args.class_column is not None and args.dataset_name is None and args.train_data_dir is None:
        parser.error("--class_column needs --dataset_name or --train_data_dir")
    if args.prompt_file is not None and not Path(args.prompt_file).is_file():
        parser.error(f"--prompt_file {args.prompt_file} is not a file; it must be one, a prompt a line")


def check_push(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if results could not go where they are to go: `--output_dir`, and with `--push_to_hub` the Hub."""
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file; it must be a folder, or not there")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
        except ValueError as error:
            parser.error(f"--hub_model_id: {error}")


def check_lsd(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if `objective` and `scale` do not go together; fills them in.

    Each d is about one scale. With the other there is nothing to learn, or something else than what the sampler uses.
    """
    if args.objective is None:
        args.objective = "softmax_kl" if args.scale == "log_score" else "generalised_kl"
    if args.scale is None:
        args.scale = SCALE_OF[args.objective]
    if args.scale != SCALE_OF[args.objective]:
        parser.error(f"--objective {args.objective} is for --scale {SCALE_OF[args.objective]}, not {args.scale}")
    if args.method == "lsd_plus" and args.objective != "generalised_kl":
        parser.error(f"--objective {args.objective} is for --method lsd; lsd_plus has generalised_kl")
    if args.learned_scheduler and args.scale == "log_score":
        parser.error("--learned_scheduler has no such law as --scale log_score: a rate that depends on the logits")


def check_given(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Exits with a message if an argument was given that this method does not read."""
    for name, methods in ONLY_FOR.items():
        if name in given and args.method not in methods:
            *most, last = methods
            parser.error(f"--{name} is for --method {' or '.join(filter(None, [', '.join(most), last]))}")
    if "hamming_share" in given and not args.relaxed:
        parser.error("--hamming_share is for --relaxed")
    is_exact = args.solver == "closed_form" and (args.method == "lsd" or args.repaired)
    for name in ("num_epochs", "learning_rate"):
        if name in given and is_exact:
            parser.error(f"--{name} is for --solver sgd, or lsd_plus without --repaired: here there is a closed form")


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Exits with a message if a value is not for this method."""
    if args.method in ("marginal", "search") and args.num_samples <= JUDGED_FEATURES:
        parser.error(f"--num_samples is {args.num_samples}; --method {args.method} needs more than {JUDGED_FEATURES}")
    if args.order == "best" and (args.method != "search" or (args.plan != "best" and "order" in given)):
        parser.error("--order best is for --method search with --plan best; allowed elsewhere: random, spread")
    if args.order == "best" and args.plan != "best":
        args.order = "spread"
    if args.order == "spread" and args.unmasking == "bernoulli":
        parser.error("--order spread needs --unmasking counts: with bernoulli every mask opens on its own")
    if args.method == "jys":
        wrong = [n for n in args.num_inference_steps if n > RESOLUTION or (n & (n - 1) and not args.unbiased)]
        if wrong:
            parser.error(
                f"--num_inference_steps has {wrong}; --method jys halves intervals and needs powers of two up to {RESOLUTION}, "
                f"with --unbiased numbers up to {RESOLUTION}"
            )
    if args.method == "search":
        if {"inverse_temperature", "temperature_line"} <= set(args.blocks):
            parser.error("--blocks inverse_temperature and temperature_line are two ways to say the same")
        if "grid" in args.blocks and args.plan != "even":
            parser.error("--blocks grid says when positions open, and --plan best too: add --plan even")
        args.blocks = [name for name in FLOATS if name in args.blocks]
        for steps in args.num_inference_steps:
            floats = number_of_floats(args.blocks, steps)
            if not 2 <= floats < 20:
                parser.error(
                    f"--method search has {floats} floats for {steps} steps with --blocks {' '.join(args.blocks)}; allowed "
                    "are 2 to 19: for more, use --method marginal"
                )
    if args.learned_scheduler and args.method == "learn2pd":
        parser.error("--learned_scheduler has no filter: --method learn2pd writes a Learn2PDScheduler")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale is {args.guidance_scale}; it must be finite")
    if args.final_share is not None and not 0 < args.final_share <= 1:
        parser.error(f"--final_share is {args.final_share}; allowed are numbers in (0, 1]")
