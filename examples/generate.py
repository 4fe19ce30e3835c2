"""Many samples, in parallel over processes and machines, into parquet files; a killed run goes on where it was.

    accelerate launch examples/generate.py --num_samples 1024 --output_dir samples
    accelerate launch --multi_gpu examples/generate.py --pretrained_model_name_or_path kuleshov-group/mdlm-owt \\
        --num_samples 100000 --batch_size 64 --num_inference_steps 64 --output_dir samples
    python examples/generate.py --scheduler discrete-schedulers/tiny-text --scheduler_subfolder learned --num_inference_steps 8
    python -c "import datasets; print(datasets.load_dataset('parquet', data_files='samples/*.parquet'))"

Samples are numbered, and go into shards of `--shard_size`. Each has a generator of its own, seeded by `--seed` and its number,
and a shard is always cut into the same batches: so samples are the same for any number of processes, and after any
interruption. A shard is written under a temporary name and then renamed; what is there is not made again. All processes write
to one folder; on several machines it has to be a shared one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler

RESULT = ("pretrained_model_name_or_path", "revision", "scheduler", "num_samples", "num_inference_steps", "length")
RESULT += ("scheduler_subfolder", "prompt", "seed", "batch_size", "shard_size", "dtype")  # what samples depend on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        default="discrete-schedulers/tiny-text",
        help="Folder, Hub id or bundled id. Default: %(default)s.",
    )
    parser.add_argument("--revision", default=None, help="Of the model's repository.")
    parser.add_argument("--scheduler", default=None, help="Folder or Hub id of a scheduler; the pipeline's by default.")
    parser.add_argument(
        "--scheduler_subfolder", default=None, help='Where it is in there, such as "learned" of the bundled tiny-text.'
    )
    parser.add_argument("--num_samples", type=int, default=64, help="In all, over all processes. Default: %(default)s.")
    parser.add_argument(
        "--num_inference_steps", type=int, default=16, help="Steps of each sample. Default: %(default)s."
    )
    parser.add_argument("--length", type=int, default=None, help="Tokens of a sample; the model's longest by default.")
    parser.add_argument("--prompt", default=None, help="What all samples begin with.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Of the run; each sample has its own from it. Default: %(default)s."
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Samples that a process makes at once.")
    parser.add_argument("--shard_size", type=int, default=256, help="Samples in a file.")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="Of the weights. Default: %(default)s.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("samples"), help="For the parquet files. Default: %(default)s."
    )
    args = parser.parse_args(argv)
    for name in ("num_samples", "num_inference_steps", "length", "batch_size", "shard_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.scheduler_subfolder is not None and args.scheduler is None:
        parser.error("--scheduler_subfolder needs --scheduler: the folder or Hub id that it is in")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file; it must be a folder, or not there")
    return args


def generator_of(seed: int, number: int) -> torch.Generator:
    """A generator for one sample. torch's on the CPU reads 32 bits of a seed: consecutive numbers, from a place that the run's
    seed says, are different seeds for 4 billion samples; hashing both would repeat some from 65,536 samples on."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((start + number) % 2**32)


def load_pipeline(args: argparse.Namespace) -> DiscreteDiffusionPipeline:
    dtype = getattr(torch, args.dtype)
    pipe = DiscreteDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, dtype=dtype
    )
    if args.scheduler is not None:
        pipe.scheduler = DiscreteScheduler.from_pretrained(args.scheduler, subfolder=args.scheduler_subfolder)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_call(args.prompt, args.length, args.num_inference_steps)  # before a file is written
    return pipe


def shard_path(args: argparse.Namespace, shard: int) -> Path:
    count = -(-args.num_samples // args.shard_size)
    return args.output_dir / f"samples-{shard:05d}-of-{count:05d}.parquet"


def begin(args: argparse.Namespace) -> list[int]:
    """Make the folder, or go on with it: the shards that are missing.

    Raises:
        ValueError: If the folder has samples of other settings.
        OSError: If it cannot be written.
    """
    settings, path = {name: getattr(args, name) for name in RESULT}, args.output_dir / "settings.json"
    if path.is_file():
        found = json.loads(path.read_text())
        other = sorted(name for name in RESULT if found.get(name) != settings[name])
        if other:
            raise ValueError(f"`output_dir` {args.output_dir} has samples of other settings: {', '.join(other)}")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(temporary, path)
        for left in args.output_dir.glob(".*.tmp"):  # of a killed run
            left.unlink()
    except OSError as error:
        raise OSError(f"`--output_dir` {args.output_dir} cannot be written: {error.strerror}") from error
    shards = range(-(-args.num_samples // args.shard_size))
    return [shard for shard in shards if not shard_path(args, shard).is_file()]


def write_shard(pipe: DiscreteDiffusionPipeline, args: argparse.Namespace, shard: int) -> None:
    """Make the samples of one shard, and its file."""
    last = min(args.num_samples, (shard + 1) * args.shard_size)
    numbers = list(range(shard * args.shard_size, last))
    columns: dict[str, list] = {"number": numbers, "ids": [], "text": []}
    for start in range(0, len(numbers), args.batch_size):
        batch = numbers[start : start + args.batch_size]
        output = pipe(
            args.prompt,
            num_samples=len(batch),
            length=args.length,
            num_inference_steps=args.num_inference_steps,
            generator=[generator_of(args.seed, number) for number in batch],
        )
        columns["ids"] += output.sequences.tolist()
        columns["text"] += output.texts or [None] * len(batch)
    path = shard_path(args, shard)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Dataset.from_dict(columns).to_parquet(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}); other shards are whole, the same command goes on"
        ) from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator()
    with accelerator.main_process_first():  # which downloads
        pipe = load_pipeline(args).to(accelerator.device)
    # The main process says what is missing: by the time that another one looks, some of it may be there
    missing = [begin(args) if accelerator.is_main_process else None]
    missing = broadcast_object_list(missing)[0] if accelerator.num_processes > 1 else missing[0]
    with accelerator.split_between_processes(missing) as own:
        for shard in own:
            write_shard(pipe, args, shard)
            print(f"process {accelerator.process_index}: {shard_path(args, shard)}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # what is written is whole: nothing to save
    main()
