"""The models that come with the package: names `discrete-schedulers/<model>`, which need no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

BUNDLED = "discrete-schedulers/"


def is_bundled(name: str) -> bool:
    """Whether a name means a model of this package, not a folder or a repository."""
    return name.startswith(BUNDLED) and not Path(name).is_dir()


@contextmanager
def bundled_folder(name: str) -> Iterator[str]:
    """The folder of a bundled model.

    Raises:
        ValueError: If there is no such model.
    """
    assets = files("discrete_schedulers") / "assets"
    known = sorted(folder.name for folder in assets.iterdir() if (folder / "model_index.json").is_file())
    if name.removeprefix(BUNDLED) not in known:
        raise ValueError(f"{name!r} is not bundled; bundled: {', '.join(BUNDLED + folder for folder in known)}")
    with as_file(assets / name.removeprefix(BUNDLED)) as folder:
        yield str(folder)
