"""The built wheel, installed elsewhere: what is in it, and that it samples and trains without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "src", "pipelines", "training"]
SUBPACKAGES = ["pipelines", "training"]  # stand at the root of the repository, and as symlinks under src


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the clone on its path; returns stdout, fails with stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the sdist from a copy of the sources (a build leaves its `build/` behind)."""
    copy = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel in it; the dependencies are those of the test's own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    interpreter = Path(sysconfig.get_path("scripts", "venv", vars={"base": str(folder)})) / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    # A folder named in a .pth file comes last on the path and its own .pth files are ignored: no editable install.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_files(wheel: Path) -> None:
    folders = {ROOT / "src/discrete_schedulers": "discrete_schedulers"}
    folders |= {ROOT / name: f"discrete_schedulers/{name}" for name in SUBPACKAGES}
    expected = Counter(
        f"{target}/{path.relative_to(folder).as_posix()}"
        for folder, target in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if folder.name in SUBPACKAGES or path.relative_to(folder).parts[0] not in SUBPACKAGES
    )
    with zipfile.ZipFile(wheel) as archive:
        names = Counter(name for name in archive.namelist() if ".dist-info/" not in name)
    assert names == expected
    assert {name.split("/")[0] for name in names} == {"discrete_schedulers"}
    assert names["discrete_schedulers/py.typed"] == 1
    for name in ["model_index.json", "README.md", "scheduler/scheduler_config.json", "corpus/test.txt.xz"]:
        assert names[f"discrete_schedulers/assets/tiny-text/{name}"] == 1
    assert any(name.endswith(".safetensors") for name in names)


def test_imports_from_the_wheel(python: Path, tmp_path: Path) -> None:
    code = """
import discrete_schedulers, json
import discrete_schedulers.pipelines, discrete_schedulers.schedulers, discrete_schedulers.models
import discrete_schedulers.training
from importlib.metadata import version
from importlib.util import find_spec
top_level = [name for name in ("pipelines", "training") if find_spec(name)]
versions = [version("discrete_schedulers"), discrete_schedulers.__version__]
print(json.dumps([discrete_schedulers.__file__, discrete_schedulers.training.__file__, versions, top_level]))
"""
    package, training, versions, top_level = json.loads(run(python, "-c", code, cwd=tmp_path))
    environment = python.parents[1]
    assert Path(package).is_relative_to(environment)
    assert Path(training).is_relative_to(environment)
    assert versions[0] == versions[1]
    assert top_level == []


def test_samples_from_the_bundled_model(python: Path, tmp_path: Path) -> None:
    code = """
import json, torch
from discrete_schedulers import DiscreteDiffusionPipeline
pipe = DiscreteDiffusionPipeline.from_pretrained("discrete-schedulers/tiny-text")
pipe.set_progress_bar_config(disable=True)
output = pipe(num_samples=2, length=64, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
print(json.dumps([output.texts, list(output.sequences.shape), output.num_model_calls]))
"""
    texts, shape, num_model_calls = json.loads(run(python, "-c", code, cwd=tmp_path).splitlines()[-1])
    assert shape == [2, 64]
    assert num_model_calls == 4
    assert len(set(texts)) == 2
    assert all(len(text.split()) > 8 for text in texts)
    assert not any("[MASK]" in text for text in texts)


def test_launches_the_trainer(python: Path, tmp_path: Path) -> None:
    """A real run, small: the installed module learns, measures and writes its results."""
    launch = [
        python,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "-m",
        "discrete_schedulers.training.distill",
    ]
    model = ["--pretrained_model_name_or_path", "discrete-schedulers/tiny-text", "--output_dir", "learned"]
    small = ["--teacher_steps", "8", "--num_samples", "2", "--num_eval_samples", "2", "--num_inference_steps", "4"]
    run(*launch, *model, *small, cwd=tmp_path)
    written = {path.name for path in (tmp_path / "learned").iterdir() if path.is_file()}
    assert written == {"scheduler_config.json", "metrics.json", "plot.png", "coefficients.png", "README.md"}
    assert set(json.loads((tmp_path / "learned/scheduler_config.json").read_text())["coefficients"]) == {"4"}
