"""Results on disk: one JSON file for a part, written row by row, and none of it about the machine.

Until a part is complete its rows stand in `<part>.partial.json`; a killed run goes on from there. `<part>.json` is always
complete. Both are written under a temporary name and renamed. Results of other settings or versions are not continued.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from discrete_schedulers.evaluation import mean_and_error

PACKAGES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Versions that numbers may depend on, without the build ("2.13.0", not "2.13.0+cpu")."""
    return {name: version(name).split("+")[0] for name in PACKAGES}


def summary(values: list[float]) -> dict[str, Any]:
    """The values, one for each seed, their mean and its standard error (`None` for a single or an exact value)."""
    if len(values) == 1:
        return {"values": values, "mean": values[0], "standard_error": None}
    mean, error = mean_and_error(values)
    return {"values": values, "mean": mean, "standard_error": error}


def dumps(value: Any, indent: str = "") -> str:
    """JSON with one line for each entry of a dictionary; lists stay on one line."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if not value:
        return "{}"
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {dumps(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}"


class Store:
    """A nested dictionary that is saved whenever something is put in.

    Args:
        folder (`Path`): Where the files are.
        part (`str`): Their name.
        settings (`dict`): What the numbers depend on. Saved with them, and compared.
    """

    def __init__(self, folder: Path, part: str, settings: dict[str, Any]) -> None:
        self.path, self.partial = folder / f"{part}.json", folder / f"{part}.partial.json"
        head = json.loads(dumps({"part": part, "settings": settings, "versions": versions()}))
        self.content: dict[str, Any] = head
        self.complete = False
        for path in (self.path, self.partial):
            if path.is_file():
                saved = json.loads(path.read_text())
                if {key: saved.get(key) for key in head} == head:
                    self.content, self.complete = saved, path == self.path
                    break

    def get(self, *keys: str) -> Any:
        """What was put under these keys, or `None`."""
        value: Any = self.content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def put(self, value: Any, *keys: str) -> None:
        """Put a value under these keys, and save."""
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        write(self.partial, dumps(self.content) + "\n")

    def finish(self) -> None:
        """Make the partial file the result."""
        write(self.path, dumps(self.content) + "\n")
        self.partial.unlink(missing_ok=True)
        self.complete = True


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
