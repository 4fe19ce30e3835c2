"""Weights and networks of the Hub's repositories: config.json, then tensors one by one to their dtype and device.

A network is built with its parameters on the meta device, and each tensor of the files takes the place of one: none is held
twice. Files are found through `huggingface_hub`, so that cache, offline mode, tokens, revisions and
errors are its own. Pickles are read with `weights_only=True`; a pickle that holds anything but tensors is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from discrete_schedulers.models.checkpoints import Family, network_arguments, network_type
from discrete_schedulers.models.ddit import DDiTModel

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
PREFIXES = ("_orig_mod.", "module.", "backbone.")  # of wrappers, taken off while the network does not know the key
BUFFERS = (
    r"(^|\.)(inv_freq|position_ids|token_type_ids|sampling_eps_min|sampling_eps_max)$"  # recomputed, or not weights
)


def first_file(source: str, names: tuple[str, ...], hub: Mapping[str, Any]) -> Path | None:
    """The first of these files that a folder or a repository has, downloaded; `None` where it has none.

    Args:
        source (`str`): Folder or repository id.
        names (`tuple[str, ...]`): File names.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        OSError: If none was found and the Hub could not be asked; else as `huggingface_hub` raises it: no such repository, no
            access.
    """
    unknown = None
    for name in names:
        if Path(source).is_dir():
            if (Path(source) / name).is_file():
                return Path(source) / name
            continue
        try:
            # After the Hub did not answer once, the cache alone is asked: each try takes long.
            return Path(
                hf_hub_download(source, name, **(hub if unknown is None else {**hub, "local_files_only": True}))
            )
        except RemoteEntryNotFoundError:
            continue
        except LocalEntryNotFoundError as error:  # offline: not in the cache, or not in the repository
            unknown = unknown or error
    if unknown is not None:
        raise OSError(
            f"the Hub cannot be reached, and {' or '.join(names)} of {source!r} is not in the local cache"
        ) from unknown
    return None


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary.

    Raises:
        ValueError: If it is not one.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; it must be a JSON object")
    return config


def weight_paths(source: str, hub: Mapping[str, Any]) -> list[Path]:
    """The weight files of a folder or a repository: one, or all shards.

    Raises:
        ValueError: If there are none.
    """
    first = first_file(source, WEIGHT_FILES, hub)
    if first is None:
        raise ValueError(f"{source!r} has no weights: looked for {', '.join(WEIGHT_FILES)}")
    if first.suffix != ".json":
        return [first]
    shards = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    found = [(shard, first_file(source, (shard,), hub)) for shard in shards]
    missing = [shard for shard, path in found if path is None]
    if missing:
        raise ValueError(f"{source!r} lacks {', '.join(missing)}, which {first.name} names")
    return [path for _, path in found if path is not None]


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, read when they are asked for.

    Raises:
        ValueError: If the file is damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and download it again") from error
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which is not read: a pickle can run code ({error})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a table of tensors: take the network's own state dict out of it and save that")
    yield from state.items()


def build_network(family: Family, config: Mapping[str, Any]) -> Any:
    """The network of a family with its parameters on the meta device; buffers are real.

    Args:
        family (`Family`): Row of the table.
        config (`dict`): The repository's config.json.

    Raises:
        ValueError: If config.json is not one of this family.
    """
    arguments = network_arguments(family, config)
    with init_empty_weights(include_buffers=False):
        if family.architecture == "DDiT":
            return DDiTModel(**arguments)
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

        model_type = network_type(family, config)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"config.json has model_type {model_type!r}, which transformers does not have")
        if family.architecture == "masked":
            return AutoModelForMaskedLM.from_config(CONFIG_MAPPING[model_type](**arguments))
        arguments |= {"is_causal": False, "use_cache": False}
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**arguments))


def network_key(key: str, family: Family, known: Mapping[str, Any]) -> str:
    """The network's name for a key of the file."""
    for pattern, replacement in family.keys:
        key = re.sub(pattern, replacement, key)
    shorter = True
    while shorter and key not in known:
        shorter = False
        for prefix in PREFIXES:
            if key.startswith(prefix):
                key, shorter = key.removeprefix(prefix), True
    return key


def load_weights(
    network: Any,
    paths: list[Path],
    family: Family,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Put the tensors of the files in the place of the network's meta parameters.

    Args:
        network (`torch.nn.Module`): From `build_network`.
        paths (`list[Path]`): Weight files.
        family (`Family`): Row of the table: key names, keys to pass over.
        dtype (`torch.dtype`, *optional*): Of the parameters; `None`: as in the files.
        device (`torch.device` or `str`): Where they go.

    Raises:
        ValueError: If keys are missing or left over, or shapes differ.
    """
    tied = dict(getattr(network, "all_tied_weights_keys", {}))  # these follow another parameter
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters(remove_duplicate=False) if name not in tied}
    state: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    for path in paths:
        for published, tensor in tensors_of(path):
            key = network_key(published, family, wanted)
            if key in wanted:
                if tuple(tensor.shape) != wanted[key]:
                    misshapen.append(f"{published} is {tuple(tensor.shape)}, the config says {wanted[key]}")
                state[key] = tensor.to(device, dtype if tensor.is_floating_point() else None)
            elif key not in tied and not any(re.search(pattern, key) for pattern in (BUFFERS, *family.ignored)):
                unexpected.append(published)
    faults = (
        [f"missing: {', '.join(some(sorted(wanted.keys() - state.keys())))}"] if wanted.keys() - state.keys() else []
    )
    faults += [f"unexpected: {', '.join(some(unexpected))}"] if unexpected else []
    faults += [f"wrong shapes: {'; '.join(some(misshapen))}"] if misshapen else []
    if faults:
        raise ValueError(f"the weights do not fit family {family.name!r} and config.json: {'. '.join(faults)}")
    network.load_state_dict(state, strict=False, assign=True)
    if tied:
        network.tie_weights()
    network.to(device)  # buffers
    network.eval()


def longest_sequence(network: Any) -> int | None:
    """How many tokens the network takes, as far as its config says."""
    config = network.config
    if isinstance(network, DDiTModel):
        return config.max_length
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and config.model_type == "roberta":
        return longest - config.pad_token_id - 1  # its positions count from behind the padding
    return longest


def load_tokenizer(family: Family, source: str, hub: Mapping[str, Any]) -> Any:
    """The tokenizer of a checkpoint, or `None` where its repository should have one and has not.

    Args:
        family (`Family`): Row of the table.
        source (`str`): Folder or repository id of the checkpoint.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.
    """
    import transformers

    hub = dict(hub)
    if family.tokenizer:
        source = family.tokenizer
        hub.pop("revision", None)  # of the checkpoint
    elif first_file(source, TOKENIZER_FILES, hub) is None:
        return None
    return getattr(transformers, family.tokenizer_class).from_pretrained(source, trust_remote_code=False, **hub)


def some(items: list[str], most: int = 5) -> list[str]:
    """The first few of a list, and how many more there are."""
    return items if len(items) <= most else [*items[:most], f"... ({len(items) - most} more)"]
