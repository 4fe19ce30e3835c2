"""Texts to token windows, pictures to tokens, and the random numbers of each sample: what the scripts share about data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteImagePipeline
from discrete_schedulers.pipelines.images import encode, pixels_of, pixels_per_token

MAX_DOCUMENTS = 50_000  # of each split of a dataset, evenly thinned: more than any metric here can use


class Texts(NamedTuple):
    """Documents: to fit the curve on, to measure on, and to fit the judge on."""

    fit: list[str]
    heldout: list[str]
    judge: list[str]


class Pictures(NamedTuple):
    """Tokens (n, L) of pictures, and their classes (n,), where these are known: to fit on, and to measure on."""

    fit: Tensor
    fit_classes: Tensor | None
    heldout: Tensor
    heldout_classes: Tensor | None


def load_texts(args: argparse.Namespace) -> Texts | None:
    """The texts that the arguments name, or those that the bundled model brings; `None` where there are none.

    Raises:
        ValueError: If the dataset does not have the named column, or no split `train`.
    """
    from datasets import load_dataset

    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config)
        if "train" not in data:
            raise ValueError(f"`--dataset_name` {args.dataset_name!r} has the splits {list(data)}; it needs 'train'")
        return split_texts(data, args.text_column)
    if args.train_file is not None:
        named = {"train": args.train_file, "validation": args.validation_file}
        for split, file in named.items():
            if file is not None:
                check_text_file(f"--{split}_file", Path(file))
        data = load_dataset("text", data_files={name: file for name, file in named.items() if file is not None})
        return split_texts(data, "text")
    if args.pretrained_model_name_or_path == "discrete-schedulers/tiny-text":
        with as_file(files("discrete_schedulers") / "assets" / "tiny-text" / "corpus") as folder:
            named = {split: str(folder / f"{split}.txt.xz") for split in ("train", "validation", "test")}
            data = load_dataset("text", data_files=named)
            return Texts(*(list(data[split]["text"]) for split in ("validation", "test", "train")))
    return None


def check_text_file(argument: str, path: Path) -> None:
    """Raises `ValueError` if a file has no text, or bytes that are none; those that are compressed are left to `datasets`."""
    if path.suffix in (".xz", ".gz", ".bz2", ".zst", ".zip", ".lz4"):
        return
    try:
        with path.open(encoding="utf-8") as lines:
            has_text = any(line.strip() for line in lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"`{argument}` {path} is not UTF-8 ({error}); it must be text, a document a line") from error
    if not has_text:
        raise ValueError(f"`{argument}` {path} has no text; it must have a document in each line")


def split_texts(data: Mapping[str, Any], column: str) -> Texts:
    """The documents of a dataset's `train` split, and of its `validation` or `test` split to measure on; without either, every
    tenth one is held out."""
    train = documents(data["train"], column)
    for name in ("validation", "test"):
        if name in data and len(data[name]):
            return Texts(train, documents(data[name], column), train)
    rest = [text for i, text in enumerate(train) if i % 10 != 9]
    return Texts(rest, train[9::10], rest)


def documents(split: Any, column: str) -> list[str]:
    """The texts of a split of a dataset, evenly thinned to `MAX_DOCUMENTS`.

    Raises:
        ValueError: If there is no such column.
    """
    if column not in split.column_names:
        raise ValueError(f"`--text_column` is {column!r}; the dataset has {split.column_names}")
    return list(split.select(evenly(len(split), MAX_DOCUMENTS))[column])


def load_pictures(args: argparse.Namespace, pipe: DiscreteImagePipeline) -> Pictures | None:
    """The pictures of `--dataset_name` or `--train_data_dir` through the pipeline's decoder; `None` where there are none. Those
    to measure on are of the split `validation` or `test`; without either, every tenth one.

    Raises:
        ValueError: If the dataset lacks a named column or a split `train`, or a class is none of the model's.
    """
    from datasets import load_dataset

    if args.train_data_dir is not None:
        data = load_dataset("imagefolder", data_dir=args.train_data_dir)
    elif args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config)
    else:
        return None
    if "train" not in data:
        raise ValueError(f"`--dataset_name` {args.dataset_name!r} has the splits {list(data)}; it needs 'train'")
    train, count = data["train"], len(data["train"])
    heldout = next((data[name] for name in ("validation", "test") if name in data and len(data[name])), None)
    if heldout is None:
        heldout = train.select(range(9, count, 10))
        train = train.select([i for i in range(count) if i % 10 != 9])
    fit = tokens_of(train, args, pipe, args.max_data_samples)
    return Pictures(*fit, *tokens_of(heldout, args, pipe, args.num_eval_samples))


def tokens_of(
    split: Any, args: argparse.Namespace, pipe: DiscreteImagePipeline, limit: int
) -> tuple[Tensor, Tensor | None]:
    """The pictures of a split of a dataset as tokens (n, L), evenly thinned to at most `limit`, and their classes (n,).

    Raises:
        ValueError: If there is no picture, no such column, or a class that the model does not have.
    """
    for argument, column in (("image_column", args.image_column), ("class_column", args.class_column)):
        if column is not None and column not in split.column_names:
            raise ValueError(f"`--{argument}` is {column!r}; the dataset has {split.column_names}")
    if len(split) == 0:
        raise ValueError("the dataset has no picture to fit on, or none to measure on: ten or more are needed")
    some = split.select(evenly(len(split), limit))
    height, width = (side * pixels_per_token(pipe.decoder) for side in pipe.config.denoiser["grid_shape"])
    config = pipe.decoder.config
    mode = "L" if config.get("num_channels", config.get("in_channels")) == 1 else "RGB"
    parts = []
    for rows in batches(len(some), args.train_batch_size):
        pictures = some[list(rows)][args.image_column]
        if not all(hasattr(picture, "crop") for picture in pictures):
            raise ValueError(
                f"`--image_column` {args.image_column!r} has {type(pictures[0]).__name__}; it must be pictures"
            )
        pictures = [middle_of(picture.convert(mode), width / height) for picture in pictures]
        with torch.no_grad():
            pixels = pixels_of(pictures, height, width).to(pipe.device)
            parts.append(encode(pipe.decoder, pixels, pipe.config.signed_pixels).flatten(1))
    if args.class_column is None:
        return torch.cat(parts), None
    classes = torch.as_tensor(some[args.class_column])
    if classes.is_floating_point() or not 0 <= int(classes.min()) <= int(classes.max()) < (pipe.num_classes or 0):
        raise ValueError(
            f"`--class_column` {args.class_column!r} has classes from {classes.min()} to {classes.max()}; this model has "
            f"{pipe.num_classes or 'none'}"
        )
    return torch.cat(parts), classes


def middle_of(picture: Any, aspect: float) -> Any:
    """The largest part of a PIL picture, around its middle, with width / height = aspect."""
    width, height = min(picture.width, picture.height * aspect), min(picture.height, picture.width / aspect)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return picture.crop(tuple(round(side) for side in (left, top, left + width, top + height)))


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 .. count - 1, evenly spread, first and last among them."""
    return torch.linspace(0, count - 1, min(count, limit), dtype=torch.float64).long().tolist()


def sequence_length(args: argparse.Namespace, pipe: DiscreteDiffusionPipeline) -> int:
    """L, the tokens of a sequence.

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


def pack(texts: list[str], tokenizer: Any, length: int, limit: int) -> Tensor:
    """Texts as one stream of tokens cut into windows of L, evenly thinned to at most `limit`, int64 (n, L).

    Raises:
        ValueError: If they do not fill one window.
    """
    stream = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"], dtype=torch.int64)
    windows = stream[: len(stream) // length * length].view(-1, length)
    if len(windows) == 0:
        raise ValueError(
            f"{len(texts)} documents have {len(stream)} tokens, fewer than one sequence of `--sequence_length` {length}"
        )
    return windows[evenly(len(windows), limit)]


def generators(seed: int, purpose: int, indices: range) -> list[torch.Generator]:
    """One for each sample, a function of (seed, purpose, index) alone. Purpose 0 is the shared noise of `draw_noise`.

    torch reads 32 bits of a seed: the multiples of the golden section keep purposes apart there, also of neighbouring seeds.
    """
    first = seed * 1_000_003 + purpose * 2_654_435_761
    return [torch.Generator().manual_seed(first + index) for index in indices]


def batches(count: int, size: int) -> list[range]:
    """The indices 0 .. count - 1 in pieces of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
