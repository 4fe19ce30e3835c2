"""Texts to token windows, and the random numbers of each sample: what the scripts share about data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline

MAX_DOCUMENTS = 50_000  # of each split of a dataset, evenly thinned: more than any metric here can use


class Texts(NamedTuple):
    """Documents: to fit the curve on, to measure on, and to fit the judge on."""

    fit: list[str]
    heldout: list[str]
    judge: list[str]


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
    chosen = torch.linspace(0, len(split) - 1, min(len(split), MAX_DOCUMENTS), dtype=torch.float64).long().tolist()
    return list(split.select(chosen)[column])


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
    chosen = torch.linspace(0, len(windows) - 1, min(limit, len(windows)), dtype=torch.float64).long()
    return windows[chosen]


def generators(seed: int, purpose: int, indices: range) -> list[torch.Generator]:
    """One for each sample, a function of (seed, purpose, index) alone. Purpose 0 is the shared noise of `draw_noise`.

    torch reads 32 bits of a seed: the multiples of the golden section keep purposes apart there, also of neighbouring seeds.
    """
    first = seed * 1_000_003 + purpose * 2_654_435_761
    return [torch.Generator().manual_seed(first + index) for index in indices]


def batches(count: int, size: int) -> list[range]:
    """The indices 0 .. count - 1 in pieces of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
