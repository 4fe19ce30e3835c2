"""The state of a run on disk: whole checkpoints or none."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from discrete_schedulers import DiscreteScheduler
from discrete_schedulers.training.files import remove, unwritten


def save_checkpoint(
    args: argparse.Namespace, state: dict[str, Any], tensors: dict[str, Tensor], scheduler: DiscreteScheduler | None
) -> None:
    """Write checkpoint-<n> under a temporary name, rename it, then drop the oldest ones."""
    number = max(map(checkpoint_number, known_checkpoints(args.output_dir)), default=0) + 1
    contents = {"state.json": json.dumps(state).encode(), "tensors.safetensors": safetensors.torch.save(tensors)}
    with unwritten(args.output_dir / f"checkpoint-{number}") as temporary:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        (temporary / "sha256.json").write_text(json.dumps(digests))
        if scheduler is not None:
            scheduler.save_pretrained(temporary / "scheduler")
    for old in known_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
        remove(old)


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
