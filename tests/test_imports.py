"""Who may import whom: the table of CONTRIBUTING.md, held against every import statement of the repository.

Each file belongs to one part. For a part the table says which of our parts and which third-party packages it may
import; the standard library is open to all. Imports inside functions count too. A few files need a package more than
their part: `EXTRA`. What only an extra of pyproject.toml installs may be imported inside functions only.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = "discrete_schedulers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Part(NamedTuple):
    ours: set[str]
    third_party: set[str]


CORE = {"sampling", "processes", "denoisers", "information", "evaluation", "likelihood", "exact", "scud", "molecules"}
CORE |= {"blocks", "bundled", "guidance", "patience", "sphere"}
SOURCE = CORE | {"models", "models/*", "schedulers", "schedulers/*"}
SOURCE |= {"schedulers/scheduling_utils", "schedulers/order_utils", "schedulers/position_orders"}
SOURCE |= {"schedulers/theta_utils", "schedulers/learned_utils", "interop"}

# A name with a slash is one file of a folder, "folder/*" any other one in it, a bare folder its __init__.py, "" that of
# the package.
TABLE = {
    "": Part(SOURCE | {"registration", "pipelines", "pipelines/*"}, {"diffusers"}),  # never training
    "registration": Part(set(), set()),
    "patience": Part(set(), {"huggingface_hub"}),
    "bundled": Part(set(), set()),
    "sampling": Part(set(), {"torch"}),
    "processes": Part({"sampling"}, {"torch"}),
    "blocks": Part(set(), {"torch"}),
    "denoisers": Part({"blocks", "sampling", "processes"}, {"torch"}),
    "guidance": Part({"denoisers", "sampling"}, {"torch"}),
    "information": Part({"sampling", "processes"}, {"torch"}),
    "evaluation": Part({"sampling", "processes"}, {"torch"}),
    "likelihood": Part({"sampling", "processes"}, {"torch"}),
    "exact": Part({"sampling", "processes"}, {"torch"}),
    "scud": Part({"sampling", "processes"}, {"torch"}),
    "sphere": Part({"sampling"}, {"torch"}),
    "molecules": Part(set(), set()),
    "interop": Part({"sampling", "processes", "schedulers", "schedulers/scheduling_utils"}, {"torch", "diffusers"}),
    "models": Part({"models/*"}, set()),
    "models/*": Part(
        {"denoisers", "patience", "processes", "sampling", "models/*"}, {"torch", "diffusers", "transformers"}
    ),
    "schedulers": Part({"schedulers/*", "schedulers/scheduling_utils"}, set()),
    "schedulers/scheduling_utils": Part(
        {"sampling", "bundled", "patience", "processes", "information"}, {"torch", "diffusers"}
    ),
    "schedulers/order_utils": Part({"sampling", "schedulers/scheduling_utils"}, {"torch"}),
    "schedulers/theta_utils": Part({"sampling", "processes", "schedulers/scheduling_utils"}, {"torch"}),
    "schedulers/learned_utils": Part({"sampling", "processes", "schedulers/scheduling_utils"}, {"torch"}),
    "schedulers/position_orders": Part({"sampling"}, {"torch"}),
    "schedulers/*": Part(
        {"sampling", "processes", "information", "scud", "sphere"}
        | {"schedulers/scheduling_utils", "schedulers/order_utils", "schedulers/position_orders"}
        | {"schedulers/theta_utils", "schedulers/learned_utils"},
        {"torch", "diffusers"},
    ),
    "pipelines": Part({"pipelines/*"}, set()),
    "pipelines/*": Part(SOURCE | {"pipelines/*"}, {"torch", "diffusers", "transformers"}),
    "training": Part(set(), set()),
    "training/*": Part(
        SOURCE | {"", "pipelines", "pipelines/*", "training/*"},
        {"torch", "accelerate", "datasets", "huggingface_hub"},
    ),
}
EXTRA = {
    "evaluation": {"sacrebleu"},  # self-BLEU
    "models/image_checkpoints": {"accelerate"},  # networks without weights
    "models/latent": {"peft", "safetensors"},  # LoRA, and the adapter's file
    "molecules": {"rdkit"},  # their judge
    "models/loading": {"accelerate", "huggingface_hub", "safetensors"},  # weights of the Hub
    "pipelines/pipeline_discrete_diffusion": {"numpy"},  # output_type="np", as diffusers has it
    "pipelines/images": {"numpy"},
    "training/checkpoints": {"safetensors"},
    "training/files": {"safetensors"},  # whose errors a full disk makes
    "training/pictures": {"matplotlib"},
    "training/pretrain_images": {"diffusers", "numpy"},  # a grid of pictures, a table of pixels
    "training/search": {"cma"},  # CMA-ES
    "training/pretrain": {"safetensors", "tokenizers", "transformers"},  # makes a tokenizer, writes weights
}
INSTALLED = {
    Path(f"src/{OURS}"): "",
    Path("pipelines"): "pipelines",
    Path("training"): "training",
}


def source_files() -> dict[str, Path]:
    """Module path below the package ("", "sampling", "models/ddit") -> file; the symlinks under src are passed over."""
    found = {}
    for folder, prefix in INSTALLED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder)
            if prefix == "" and inner.parts[0] in ("pipelines", "training", "assets"):
                continue
            parts = [prefix, *inner.with_suffix("").parts] if prefix else list(inner.with_suffix("").parts)
            found["/".join(parts).removesuffix("__init__").rstrip("/")] = path
    return found


FILES = source_files()
FOLDERS = {module for module, path in FILES.items() if path.name == "__init__.py"}


class Import(NamedTuple):
    module: str  # dotted and absolute; for `from a import b` the module a.b where that is one of our files
    line: int
    in_function: bool
    is_relative: bool


def imports_of(tree: ast.AST, package: str) -> Iterator[Import]:
    """Every import statement of a file that lies in `package` (dotted), wherever it stands.

    Imports for type checking only count: they too say what a file knows of.
    """
    in_function = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in in_function, False)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                is_file = base.split(".")[0] == OURS and deeper.removeprefix(f"{OURS}.").replace(".", "/") in FILES
                yield Import(deeper if is_file else base, node.lineno, id(node) in in_function, node.level > 0)


def part_of(module: str) -> str:
    """The row of the table that a module path belongs to."""
    if module in TABLE:
        return module
    return f"{module.split('/')[0]}/*" if "/" in module else module


def package_of(module: str) -> str:
    folder = module if module in FOLDERS else module.rpartition("/")[0]
    return ".".join([OURS, *folder.split("/")]) if folder else OURS


def violations(module: str, source: str) -> list[str]:
    """What the table forbids in the source of one module, as readable lines."""
    row = TABLE[part_of(module)]
    third_party = row.third_party | EXTRA.get(module, set())
    found = []
    for item in imports_of(ast.parse(source), package_of(module)):
        top, _, rest = item.module.partition(".")
        if top == OURS:
            target = part_of(rest.replace(".", "/"))
            if target not in row.ours:
                found.append(f"line {item.line}: imports our {rest or 'package'}")
        elif top not in sys.stdlib_module_names and top not in third_party:
            found.append(f"line {item.line}: imports {top}")
        if item.is_relative and module.split("/")[0] in ("pipelines", "training"):
            found.append(f"line {item.line}: relative import")
    return found


@pytest.mark.parametrize("module", FILES)
def test_table(module: str) -> None:
    assert part_of(module) in TABLE, f"{module} has no row in the table of tests/test_imports.py"
    assert violations(module, FILES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("sampling", "import numpy", "imports numpy"),
        ("sampling", "from .processes import alpha", "imports our processes"),
        ("information", "from discrete_schedulers import denoisers", "imports our denoisers"),
        ("schedulers/scheduling_new", "def f():\n    from .scheduling_ancestral import A", "imports our schedulers"),
        ("schedulers/scheduling_new", "from discrete_schedulers.schedulers import A", "imports our schedulers"),
        ("schedulers/scheduling_new", "from ..models.ddit import DDiTModel", "imports our models.ddit"),
        ("pipelines/pipeline_new", "import discrete_schedulers.training.distill", "imports our training.distill"),
        ("pipelines/pipeline_new", "from .pipeline_text import A", "relative import"),
        ("training/new", "from . import objectives", "relative import"),
        ("", "from .training.distill import main", "imports our training.distill"),
    ],
)
def test_table_finds(module: str, source: str, fault: str) -> None:
    assert any(fault in line for line in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "schedulers/scheduling_new",
            "import math\nimport torch\nfrom .scheduling_utils import Base\nfrom ..sampling import d",
        ),
        (
            "training/new",
            "from discrete_schedulers import LSDScheduler\nfrom discrete_schedulers.training.hub import push",
        ),
        ("pipelines/pipeline_new", "from discrete_schedulers.schedulers.scheduling_ancestral import A"),
    ],
)
def test_table_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_use_the_public_api(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == OURS:
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], f"{path.name}, line {node.lineno}"


def distribution(requirement: str) -> str:
    """The import name of a requirement such as "huggingface-hub>=1.32"."""
    return re.match(r"[\w.-]+", requirement)[0].replace("-", "_")


def test_third_party_imports_are_declared() -> None:
    required = {distribution(line) for line in PROJECT["project"]["dependencies"]}
    extras = PROJECT["project"]["optional-dependencies"]
    optional = {distribution(line) for lines in extras.values() for line in lines}
    missing = []
    for module, path in FILES.items():
        for item in imports_of(ast.parse(path.read_text()), package_of(module)):
            top = item.module.split(".")[0]
            allowed = required | optional if item.in_function else required
            if top not in allowed | {OURS} and top not in sys.stdlib_module_names:
                missing.append(f"{module}, line {item.line}: {top}")
    assert missing == []


def test_extra_entries_are_used() -> None:
    used = {
        module: {item.module.split(".")[0] for item in imports_of(ast.parse(FILES[module].read_text()), "")}
        for module in EXTRA
    }
    assert {module: names - used[module] for module, names in EXTRA.items() if names - used[module]} == {}


def test_import_is_light() -> None:
    """No network, no optional package, no training code."""
    code = """
import socket, sys
def refuse(*arguments): raise AssertionError(f"a connection to {arguments}")
socket.socket.connect = refuse
import discrete_schedulers
heavy = {"datasets", "matplotlib", "sacrebleu", "tensorboard", "discrete_schedulers.training"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_packages_are_the_folders_with_an_init() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == {package_of(folder) for folder in FOLDERS}


def test_no_training_file_shadows_a_dependency() -> None:
    # `accelerate launch training/distill.py` puts training/ first on sys.path: a datasets.py there would be `datasets`.
    taken = set(sys.stdlib_module_names) | {distribution(line) for line in PROJECT["project"]["dependencies"]}
    for lines in PROJECT["project"]["optional-dependencies"].values():
        taken |= {distribution(line) for line in lines}
    assert {path.stem for path in (ROOT / "training").iterdir()} & taken == set()
