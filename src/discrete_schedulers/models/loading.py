"""Weights and networks of the Hub's repositories: config.json, then tensors one by one to their dtype and device.

A network is built with its parameters on the meta device, and each tensor of the files takes the place of one: none is held
twice. Files are found through `huggingface_hub`, so that cache, offline mode, tokens, revisions and
errors are its own. Pickles are read with `weights_only=True`; a pickle that holds anything but tensors is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import check_device_map, get_balanced_memory, offload_weight, save_offload_index
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor

from discrete_schedulers.models.checkpoints import Family, network_arguments, network_type
from discrete_schedulers.models.ddit import DDiTModel
from discrete_schedulers.patience import check_download, out_of_reach, patiently

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
PREFIXES = ("_orig_mod.", "module.", "backbone.")  # of wrappers, taken off while the network does not know the key
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's, for several devices
PIECE = 2**24  # bytes of a file that are changed to another dtype at once
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
    if not source:
        raise ValueError("the name of a model is empty; it must be a folder or a Hub id")
    unknown = None
    for name in names:
        if Path(source).is_dir():
            if (Path(source) / name).is_file():
                return Path(source) / name
            continue
        try:
            # After the Hub did not answer once, the cache alone is asked: each try takes long.
            return download(source, name, hub if unknown is None else {**hub, "local_files_only": True})
        except RemoteEntryNotFoundError:
            continue
        except LocalEntryNotFoundError as error:  # offline: not in the cache, or not in the repository
            unknown = unknown or error
    if unknown is not None:
        raise OSError(
            f"the Hub {out_of_reach(unknown)}, and {' or '.join(names)} of {source!r} is not in the local cache"
        ) from unknown
    return None


def download(source: str, name: str, hub: Mapping[str, Any]) -> Path:
    """One file of a repository, in the cache.

    Args:
        source (`str`): Repository id.
        name (`str`): File name.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        OSError: As `huggingface_hub` raises it, after some tries where the Hub is busy; or if the file came damaged.
    """

    def once() -> Path:
        began = time.time()
        path = Path(hf_hub_download(source, name, **hub))
        check_download(path, began)
        return path

    return patiently(once)


def check_repo_id(name: str) -> None:
    """Raises `ValueError` if a name that is no folder cannot be a repository either."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` is {name!r}; there is no such folder, and a Hub id must be of the form "
            "'namespace/name'"
        ) from error


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
    shards = shard_names(first)
    found = [(shard, first_file(source, (shard,), hub)) for shard in shards]
    missing = [shard for shard, path in found if path is None]
    if missing:
        raise ValueError(f"{source!r} lacks {', '.join(missing)}, which {first.name} names")
    return [path for _, path in found if path is not None]


def shard_names(index: Path) -> list[str]:
    """The shards that an index names: files that stand beside it, and nowhere else.

    Raises:
        ValueError: If the index is damaged, or names anything but weight files beside it.
    """
    table = read_config(index).get("weight_map")
    if not isinstance(table, Mapping) or not table:
        raise ValueError(
            f"{index} has the weight_map {table!r}; it must be a table of tensors and shards: download it again"
        )
    names = set(table.values())
    wrong = sorted(
        repr(n) for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", n)
    )
    if wrong:
        raise ValueError(
            f"{index} names {', '.join(some(wrong))}; shards must be .safetensors or .bin files beside it, without a path"
        )
    return sorted(names)


def tensors_of(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, read when they are asked for.

    Args:
        path (`Path`): Safetensors or a pickle.
        dtype (`torch.dtype`, *optional*): Of floating tensors; `None`: as in the file.

    Raises:
        ValueError: If the file is damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
            for key in keys:
                yield key, safe_tensor(path, key, dtype)
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
    for key, value in state.items():
        yield key, value.to(dtype if value.is_floating_point() else None)


def safe_tensor(path: Path, key: str, dtype: torch.dtype | None) -> Tensor:
    """One tensor of a safetensors file, changed to a dtype in pieces: a mapping keeps all pages that were read from it, so the
    file is opened anew for each tensor and each piece."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(key)  # nothing is read yet
        if dtype in (None, tensor.dtype) or not tensor.is_floating_point():
            return tensor
        if tensor.dim() == 0 or tensor.nbytes <= PIECE:
            return tensor.to(dtype)
    changed, rows = torch.empty(tensor.shape, dtype=dtype), max(1, PIECE * len(tensor) // tensor.nbytes)
    del tensor
    for start in range(0, len(changed), rows):
        with safe_open(path, framework="pt") as file:
            changed[start : start + rows] = file.get_slice(key)[start : start + rows]
    return changed


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
        if family.architecture == "canvas":
            from transformers import DiffusionGemmaForBlockDiffusion

            return DiffusionGemmaForBlockDiffusion(CONFIG_MAPPING[model_type](**arguments))
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


def placement(
    network: Any,
    device_map: str | torch.device | int | Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    paths: list[Path],
    max_memory: Mapping[Any, Any] | None = None,
) -> dict[str, Any]:
    """Which device each part of a network goes to: name of a module -> device or `"disk"`; `""` is all of it.

    Args:
        network (`torch.nn.Module`): From `build_network`.
        device_map (`str`, `torch.device`, `int` or `dict`, *optional*): One device (`None`: the CPU), a strategy of accelerate
            (`"auto"`, `"balanced"`, `"balanced_low_0"`, `"sequential"`), or the answer itself.
        dtype (`torch.dtype`, *optional*): Of the parameters; `None`: as in the files.
        paths (`list[Path]`): Weight files.
        max_memory (`dict`, *optional*): Memory of each device, for a strategy; as in accelerate.

    Raises:
        ValueError: If there is no such device, parts are left over, or the network does not say what must stay together.
    """
    if isinstance(device_map, Mapping):
        check_device_map(network, dict(device_map))
        return dict(device_map)
    if device_map not in STRATEGIES:
        if max_memory is not None:
            raise ValueError(f"`max_memory` is for `device_map` {', '.join(map(repr, STRATEGIES))}, not {device_map!r}")
        try:
            return {"": torch.device("cpu" if device_map is None else device_map)}
        except RuntimeError as error:
            raise ValueError(
                f"`device_map` is {device_map!r}; allowed: a device such as 'cuda:0', {', '.join(map(repr, STRATEGIES))}, or a "
                "dictionary of modules and devices"
            ) from error
    together = getattr(network, "_no_split_modules", None)
    if together is None:
        raise ValueError(
            f"`device_map` is {device_map!r}, but {type(network).__name__} does not say which of its modules must stay on one "
            "device: name one device, or pass a dictionary of modules and devices"
        )
    if getattr(network, "all_tied_weights_keys", {}):
        network.tie_weights()
    size = dtype or next(tensor.dtype for _, tensor in tensors_of(paths[0]) if tensor.is_floating_point())
    memory = None if max_memory is None else dict(max_memory)
    if device_map != "sequential":
        low = device_map == "balanced_low_0"
        memory = get_balanced_memory(network, memory, list(together), size, low_zero=low)
    try:
        return dict(infer_auto_device_map(network, memory, list(together), size))
    except IndexError as error:  # DiffusionGemma: half of its modules share their parameters with the other half
        raise ValueError(
            f"`device_map` is {device_map!r}, but accelerate does not find a split of a {type(network).__name__}, whose "
            "modules share parameters, and it does not fit one device: name a device with more memory"
        ) from error


def device_of(name: str, places: Mapping[str, Any]) -> Any:
    """Where a parameter goes: the device of the smallest named module that it is in."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def load_weights(
    network: Any,
    paths: list[Path],
    family: Family,
    dtype: torch.dtype | None = None,
    places: Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> None:
    """Put the tensors of the files in the place of the network's meta parameters and of the buffers that are saved with them.

    Args:
        network (`torch.nn.Module`): From `build_network`.
        paths (`list[Path]`): Weight files.
        family (`Family`): Row of the table: key names, keys to pass over.
        dtype (`torch.dtype`, *optional*): Of the parameters; `None`: as in the files.
        places (`dict`, *optional*): Where they go, see `placement`; `None`: the CPU. With several devices inputs follow the
            weights.
        offload_folder (`str` or `Path`, *optional*): Folder for what goes to `"disk"`: read from there in each call.

    Raises:
        ValueError: If keys are missing or left over, shapes differ, or there is no folder for what goes to disk.
    """
    places = {"": "cpu"} if places is None else dict(places)
    if "disk" in places.values() and offload_folder is None:
        raise ValueError("`offload_folder` is required: `device_map` puts modules on disk")
    on_disk: dict[str, Any] = {}
    tied = dict(getattr(network, "all_tied_weights_keys", {}))  # these follow another parameter
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters(remove_duplicate=False)}
    trained = set(wanted)
    wanted |= {name: tuple(t.shape) for name, t in network.state_dict().items() if not re.search(BUFFERS, name)}
    wanted = {name: shape for name, shape in wanted.items() if name not in tied}
    if family.architecture == "canvas" and any(device_of(name, places) == "disk" for name in tied):
        raise ValueError(
            "`device_map` puts modules on disk whose parameters encoder and decoder share: only those of the vision tower can "
            "go there"
        )
    state: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    for path in paths:
        for published, tensor in tensors_of(path, dtype):
            key = network_key(published, family, wanted)
            if key in wanted:
                if tuple(tensor.shape) != wanted[key]:
                    misshapen.append(f"{published} is {tuple(tensor.shape)}, the config says {wanted[key]}")
                elif key in trained and not tensor.is_floating_point():
                    misshapen.append(f"{published} is {tensor.dtype}, parameters must be floating-point")
                device = device_of(key, places)
                if device == "disk":
                    on_disk = offload_weight(tensor, key, str(offload_folder), on_disk)
                    state[key] = torch.empty_like(tensor, device="meta")
                else:
                    state[key] = tensor.to(device)
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
    if on_disk:
        save_offload_index(on_disk, str(offload_folder))
    devices = {str(device) for device in places.values()}
    if len(devices) == 1 and "disk" not in devices:
        network.to(next(iter(places.values())))  # buffers
    else:
        main = "cpu" if devices <= {"cpu", "disk"} else None
        dispatch_model(network, places, main, offload_dir=str(offload_folder) if on_disk else None)
    network.eval()


def number_of_states(network: Any) -> int:
    """Width V of a network's logits."""
    config = network.config
    return config.vocab_size if isinstance(network, DDiTModel) else config.get_text_config().vocab_size


def longest_sequence(network: Any) -> int | None:
    """How many tokens the network takes, as far as its config says."""
    config = network.config
    if isinstance(network, DDiTModel):
        return config.max_length
    config = config.get_text_config()
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
    tokenizer_class = getattr(transformers, family.tokenizer_class)
    return patiently(lambda: tokenizer_class.from_pretrained(source, trust_remote_code=False, **hub))


def some(items: list[str], most: int = 5) -> list[str]:
    """The first few of a list, and how many more there are."""
    return items if len(items) <= most else [*items[:most], f"... ({len(items) - most} more)"]
