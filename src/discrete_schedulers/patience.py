"""What to do when the Hub is busy or a connection breaks: wait, try again for a bounded time, and check what came.

`huggingface_hub` itself repeats requests for metadata and commits, and resumes a download that was cut off. It does not repeat
a download that the server refused for now, nor the creation of a repository, and it takes the contents of a file on trust.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

BUSY = (408, 429, 500, 502, 503, 504)
BROKEN = {"TimeoutException", "NetworkError", "RemoteProtocolError"}  # of httpx, whatever huggingface_hub calls it
WAITS = (1, 2, 4, 8)  # seconds before each further try, where the server does not say how long
LONGEST = 120  # seconds in all; a server that wants more is an error now
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class DamagedDownload(OSError):
    """A file came that is not the one of its name."""


def patiently(call: Callable[[], Result], busy: Iterable[int] = BUSY) -> Result:
    """`call()`, which the Hub answers; repeated where it says that it is busy, where the connection breaks, and where a
    damaged file came.

    Args:
        call (`Callable`): What to do; it can be repeated.
        busy (`tuple[int, ...]`): Status codes that may be others a moment later.

    Raises:
        Exception: What the last try raised.
    """
    began, waits, busy = time.monotonic(), iter(WAITS), frozenset(busy)
    while True:
        try:
            return call()
        except Exception as error:
            seconds = pause(error, next(waits, None), busy)
            if seconds is None or time.monotonic() - began + seconds > LONGEST:
                raise
            logger.warning("the Hub did not do it (%s); again in %g s", type(error).__name__, seconds)
        time.sleep(seconds)


def pause(error: BaseException, wait: float | None, busy: frozenset[int]) -> float | None:
    """Seconds to wait after an error; `None`: it will not go away, or there was enough waiting."""
    if wait is None:
        return None
    for cause in causes(error):
        if isinstance(cause, LocalEntryNotFoundError):  # huggingface_hub has tried for its own time, or is offline
            return None
        if isinstance(cause, HfHubHTTPError):
            asked = cause.response.headers.get("Retry-After", "")
            if cause.response.status_code not in busy:
                return None
            return float(asked) if re.fullmatch(r"\d+", asked) else wait
        if isinstance(cause, DamagedDownload) or any(kind.__name__ in BROKEN for kind in type(cause).__mro__):
            return wait
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from, newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def out_of_reach(error: BaseException) -> str:
    """Why the Hub gave nothing, of an error that huggingface_hub ends with: for it, a refusal is a Hub out of reach too."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return f"answers {cause.response.status_code} ({cause.server_message or cause.response.reason_phrase})"
    return "cannot be reached"


def check_download(path: Path, since: float) -> None:
    """Hold a file of the Hub's cache against the hash that is its name there, if it was written after `since` (seconds of
    `time.time`): SHA-256 of large files, git's own of others. Files elsewhere have no such name and pass.

    Raises:
        DamagedDownload: If it is another file; it is removed.
    """
    blob = path.resolve()
    name = blob.name
    if (
        blob.parent.name != "blobs"
        or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name)
        or blob.stat().st_mtime < since
    ):
        return
    digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    with blob.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise DamagedDownload(
            f"{path.name} came damaged from the Hub: its hash is {digest.hexdigest()}, not {name}; removed"
        )
