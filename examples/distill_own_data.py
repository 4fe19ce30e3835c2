"""From texts of your own to a scheduler on the Hub: learn, look, load, sample, push.

    python examples/distill_own_data.py --train_file my_texts.txt --output_dir my-scheduler
    python examples/distill_own_data.py --dataset_name Salesforce/wikitext --dataset_config wikitext-2-raw-v1 \\
        --pretrained_model_name_or_path kuleshov-group/mdlm-owt --num_inference_steps 8 --output_dir mdlm-8 --push_to_hub

A text file has a document a line; every tenth is kept for measuring. Without one, the script writes texts of the bundled corpus
as a stand-in, learns on the bundled model, and needs no network: about a minute on one core, which is enough to choose an
order of positions and too little to better it. Arguments that are not named here go to `training/distill.py`, which does the
work: other methods, more samples.
"""

from __future__ import annotations

import argparse
import lzma
from importlib.resources import files
from pathlib import Path

import torch

import discrete_schedulers
from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler
from discrete_schedulers.training import distill

SMALL = ["--num_samples", "32", "--num_eval_samples", "16", "--eval_temperatures", "0.8", "1.0"]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        default="discrete-schedulers/tiny-text",
        help="Folder, Hub id or bundled id of the frozen model. Default: %(default)s.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("own_data_results"),
        help="For the scheduler, its card and plots. Default: %(default)s.",
    )
    parser.add_argument("--train_file", type=Path, default=None, help="Your texts, a document a line.")
    parser.add_argument("--dataset_name", default=None, help="Or a dataset, for `datasets.load_dataset`.")
    parser.add_argument("--method", default="order", help="As in training/distill.py. Default: %(default)s.")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        nargs="+",
        default=[4, 8],
        help="Step budgets to learn for. Default: %(default)s.",
    )
    args, further = parser.parse_known_args(argv)

    # 1. Texts: a file, a dataset, or a stand-in
    given = ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
    if args.dataset_name is not None:
        given += ["--dataset_name", args.dataset_name]
    elif args.train_file is not None:
        given += ["--train_file", str(args.train_file)]
    else:
        given += ["--train_file", str(write_stand_in(args.output_dir)), *SMALL]
        given += ["--num_epochs", "40"] if args.method == "order" else []

    # 2. Learn, measure, write the card; with --push_to_hub upload it. A killed run goes on where it was
    given += ["--method", args.method, "--num_inference_steps", *map(str, args.num_inference_steps)]
    given += ["--output_dir", str(args.output_dir), "--resume_from_checkpoint", "latest", *further]
    metrics = distill.main(given)

    # 3. Load it as anybody else would: by the folder's path, or by the Hub's id once it is there
    pipe = DiscreteDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = load_scheduler(args.output_dir)
    steps = args.num_inference_steps[-1]
    output = pipe(num_samples=2, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    for text in output.texts or []:
        print(f"{steps} steps: {text.strip()}")

    print(f"read {args.output_dir / 'README.md'}, look at plot.png and coefficients.png beside it")
    if "--push_to_hub" not in further:
        print("the same command with `--push_to_hub --hub_model_id me/my-scheduler` uploads it without learning again")
    return metrics


def write_stand_in(folder: Path) -> Path:
    """Texts that the bundled model has not seen, in the place of yours."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = files("discrete_schedulers") / "assets" / "tiny-text" / "corpus" / "test.txt.xz"
    path = folder / "texts.txt"
    path.write_text(lzma.decompress(packed.read_bytes()).decode())
    return path


def load_scheduler(name: str | Path) -> DiscreteScheduler:
    """A scheduler of any class, by the name in its config."""
    config = DiscreteScheduler.load_config(name)
    return getattr(discrete_schedulers, config["_class_name"]).from_config(config)


if __name__ == "__main__":
    main()
