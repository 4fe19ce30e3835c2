"""Settings of the test process, and the fixtures that many tests share."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports huggingface_hub or torch: both read their settings when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Under pytest-xdist every worker would take all cores; subprocesses inherit the share. Not in the process that starts the
# workers: they would inherit its number, which is all cores, and be several times as slow.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from hub import LoopbackHub

if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks of diffusers' own tests known, where these are run: see test_diffusers_mixins.py."""
    if tree := os.environ.get("DIFFUSERS_TESTS"):
        for name in set(re.findall(r"pytest\.mark\.(\w+)", (Path(tree) / "tests" / "testing_utils.py").read_text())):
            config.addinivalue_line("markers", f"{name}: of diffusers' tests")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub of this test's own on a free loopback port."""
    with LoopbackHub(home=tmp_path / "hf_home") as server:
        yield server


@pytest.fixture
def warnings_of_diffusers(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Call it for the warnings that diffusers has logged so far; by itself it does not hand them to pytest."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    diffusers_logging.disable_propagation()
