"""Runs of a `main` in forked processes, killed where a test says: imports are paid for once.

A child is killed at the n-th time that it opens, renames or removes a file below its output folder (an audit hook counts), in
the middle of a write (a limit on the size of files, whose signal kills), or after a while. Nothing in the code under test is
replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

Main = Callable[[list[str]], Any]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")  # of Python's audit hooks, before each such call


class Moment(NamedTuple):
    """What happens when: at the n-th event in the folder a signal; or in the write after it, beyond so many bytes, a kill; or
    from it on nothing can be opened, renamed or made, with an error of the system. With `bytes` and `EFBIG` writes beyond them
    fail, those of libraries too. Or, from outside, a signal after seconds."""

    event: int | None = None
    bytes: int | None = None
    error: int | None = None
    seconds: float | None = None
    signal: int = signal.SIGKILL


NEVER = Moment()


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the signal; what it printed; events in its folder and seconds until then."""

    code: int
    printed: str
    events: int
    seconds: float


class Child:
    """A forked process that runs `main(argv)`.

    Args:
        main (`Callable`): What it runs.
        argv (`list[str]`): Its arguments.
        folder (`Path`): Where it writes.
        moment (`Moment`): What happens to it.
        variables (`dict`): Environment.
    """

    def __init__(self, main: Main, argv: list[str], folder: Path, moment: Moment = NEVER, **variables: Any) -> None:
        self.began, self.main, self.argv, self.folder, self.moment, self.events = (
            time.monotonic(),
            main,
            argv,
            folder,
            moment,
            0,
        )
        self.printed, end = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20)  # all that it prints: nobody reads before it has ended
        self.number = os.fork()
        if not self.number:
            self.live(end, variables)
        os.close(end)

    def live(self, output: int, variables: dict[str, Any]) -> None:
        """The child's life; it never returns."""
        code = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            torch.set_num_threads(1)  # OpenMP's threads do not come along in a fork
            for state in (AcceleratorState, PartialState, GradientState):
                state._reset_state()
            os.environ.update({"ACCELERATE_USE_CPU": "true"} | {k: str(v) for k, v in variables.items()})
            sys.addaudithook(self.hear)
            self.main(self.argv)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            print(f"\n{type(error).__name__}: {error}")
        finally:
            self.moment = NEVER
            print(f"\nevents {self.events}", flush=True)
            sys.stderr.flush()
            os._exit(code)

    def hear(self, event: str, arguments: tuple) -> None:
        """The audit hook: counts, and does what the moment says."""
        if event not in EVENTS or not str(arguments[0]).startswith(str(self.folder)):
            return
        self.events += 1
        moment = self.moment
        if moment.event is None or self.events < moment.event:
            return
        if moment.error is not None and moment.bytes is None:
            if event != "os.remove" and event != "os.rmdir" and not (event == "open" and not arguments[2] & WRITES):
                raise OSError(moment.error, os.strerror(moment.error), arguments[0])
        elif self.events == moment.event:
            if moment.bytes is None:
                os.kill(os.getpid(), moment.signal)
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if moment.error is None else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (moment.bytes, resource.RLIM_INFINITY))

    def end(self, timeout: float = 300) -> Ended:
        """Wait for it, and send the signal of its moment. One that does not end is killed, and an error."""
        sent = self.moment.seconds is None
        while not (found := os.waitpid(self.number, os.WNOHANG))[0]:
            lived = time.monotonic() - self.began
            if not sent and lived > self.moment.seconds:
                os.kill(self.number, self.moment.signal)
                sent = True
            if lived > timeout:
                os.kill(self.number, signal.SIGKILL)
            time.sleep(0.002)
        seconds = time.monotonic() - self.began
        with os.fdopen(self.printed) as printed:
            text = printed.read()
        assert seconds < timeout, text
        counted = re.findall(r"^events (\d+)$", text, re.MULTILINE)
        return Ended(os.waitstatus_to_exitcode(found[1]), text, int(counted[-1]) if counted else 0, seconds)


def run(main: Main, argv: list[str], folder: Path, moment: Moment = NEVER) -> Ended:
    """One process."""
    return Child(main, argv, folder, moment).end()


def run_two(main: Main, argv: list[str], folder: Path, moment: Moment = NEVER) -> Ended:
    """Two processes that work together; how the first one ended. What comes after seconds comes to both, and when the first is
    killed, so is the other, as a launcher does it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = moment if rank == 0 or moment.seconds is not None else NEVER
        children.append(Child(main, argv, folder, own, **place))
    first = children[0].end()
    if first.code < 0:
        os.kill(children[1].number, signal.SIGKILL)
    second = children[1].end()
    assert first.code < 0 or second.code in (0, first.code), (
        second
    )  # the second one is ready before results are measured
    return first


def require_whole(folder: Path) -> int:
    """Every file under a name that is not hidden can be read; returns their number.

    Raises:
        AssertionError: With the file's name.
    """
    seen = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        seen += 1
        try:
            read(path)
        except Exception as error:
            raise AssertionError(f"{path} is half written: {type(error).__name__}: {error}") from error
    for checkpoint in folder.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"state.json", "tensors.safetensors", "sha256.json"} <= names or "state.safetensors" in names, checkpoint
    if (folder / "model_index.json").is_file():
        index = json.loads((folder / "model_index.json").read_text())
        for part, value in index.items():
            if type(value) is list and value[0]:  # a part that a pipeline does not have is null
                assert list((folder / part).iterdir()), part
    return seen


def read(path: Path) -> None:
    """Read all of a file in the way of its kind."""
    match path.suffix:
        case ".json":
            json.loads(path.read_text())
        case ".safetensors":
            load_file(path)
        case ".pt":
            torch.load(path, weights_only=True)
        case ".parquet":
            from pyarrow import parquet

            parquet.read_table(path)
        case ".png":
            from PIL import Image

            with Image.open(path) as image:
                image.load()
        case ".md":
            assert path.read_text().startswith("---")
            assert path.read_text().endswith("\n")
        case ".txt" | ".jinja":
            path.read_text()
        case _:
            raise ValueError("what is this?")
