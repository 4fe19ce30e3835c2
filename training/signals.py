"""SIGTERM, which batch systems and launchers send before they kill: the script writes a checkpoint and ends with code 143.

    @ends_at_sigterm
    def main(): ...
        before_end(save)              # from here on there is something to save
        while ...:
            stop_if_asked(accelerator)   # here all processes can stop together

`accelerate launch` hands the signal on to several processes, and itself ends with 1; where it starts only one it does not hand
it on: send it to the script, or to the process group.

Until `before_end` names what is to be saved, and after `before_end(None)`, SIGTERM ends the process at once. A signal is a
thing of the whole process, and so is the state of this module.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator

EXIT_CODE = 128 + signal.SIGTERM  # as a shell tells it
Result = TypeVar("Result")


class Request:
    """What was asked for, and what is to be done about it."""

    asked = False
    save: Callable[[], None] | None = None


def ends_at_sigterm(main: Callable[[list[str] | None], Result]) -> Callable[..., Result]:
    """A `main` that SIGTERM ends with `EXIT_CODE`; outside of it the signal means what it meant before. Only the main thread
    of a process can ask for signals: in another one nothing changes."""

    @wraps(main)
    def guarded(argv: list[str] | None = None) -> Result:
        if threading.current_thread() is not threading.main_thread():
            return main(argv)
        Request.asked, Request.save = False, None
        before = signal.signal(signal.SIGTERM, heard)
        try:
            return main(argv)
        finally:
            signal.signal(signal.SIGTERM, before)
            Request.save = None

    return guarded


def heard(number: int, frame: Any) -> None:
    """The handler: ends the process where there is nothing to save; where there is, `stop_if_asked` does."""
    Request.asked = True
    if Request.save is None:
        end()


def before_end(save: Callable[[], None] | None) -> None:
    """What to do before SIGTERM ends this process; `None`: nothing."""
    Request.save = save


def stop_if_asked(accelerator: Accelerator | None = None) -> None:
    """Save and end if SIGTERM came.

    Args:
        accelerator (`Accelerator`, *optional*): To be given where all processes call this at the same place: they stop as
            soon as one of them was asked to. Without it a process decides alone.

    Raises:
        SystemExit: With `EXIT_CODE`.
    """
    asked = Request.asked
    if accelerator is not None and accelerator.num_processes > 1:
        asked = bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum"))
    if asked:
        if Request.save is not None:
            Request.save()
        if accelerator is not None:
            accelerator.wait_for_everyone()  # a launcher ends them all when it sees the first one go
        end()


def end() -> NoReturn:
    Request.save = None
    print("SIGTERM: stopped; go on with `--resume_from_checkpoint latest`", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE)
