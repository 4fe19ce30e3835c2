"""A second device on machines that have none: its tensors refuse to meet those of the CPU, as they do on a GPU.

Values are computed by the CPU, so that everything runs, also what looks at them. As on a GPU a tensor of the CPU may meet one
from elsewhere if it has no axes, if it is an index, or to be copied.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = "elsewhere"
CAN_RUN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # of later versions of torch
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Elsewhere(Tensor):
    """A tensor on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=f"{ELSEWHERE}:0", **layout)
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Tensors that are made elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """`torch.tensor` of numbers, which no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and kwargs.get("device"):
            return func(*args, **(kwargs | {"device": "cpu"})).to(kwargs["device"])
        return func(*args, **kwargs)


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation, by the CPU, if its tensors are where they have to be."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    some_elsewhere = any(isinstance(value, Elsewhere) for value in tensors)
    here = [value for value in tensors if not isinstance(value, Elsewhere) and value.dim()]
    may_meet = func in COPIES or (func in INDEXED and isinstance(args[0], Elsewhere))
    if some_elsewhere and here and not may_meet:
        raise RuntimeError(f"{func} gets tensors of two devices: {[tuple(value.shape) for value in here]} of the CPU")
    wanted = kwargs.get("device")
    goes_elsewhere = some_elsewhere if wanted is None else torch.device(wanted).type == ELSEWHERE
    if func is torch.ops.aten._local_scalar_dense.default:
        goes_elsewhere = False
    if func is torch.ops.aten.copy_.default:
        goes_elsewhere = isinstance(args[0], Elsewhere)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = tree_map(lambda value: value.held if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = func(*inner[0], **inner[1])
    if not goes_elsewhere:
        return result
    moved = tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, moved) if some_elsewhere else moved


def held(value: Tensor) -> Tensor:
    """A tensor of the other device on the CPU; one of the CPU fails."""
    assert isinstance(value, Elsewhere), value
    return value.held


def with_another_device(check: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a fork where there is a device `"elsewhere"`: torch cannot forget it again."""

    @functools.wraps(check)
    def in_a_fork(*args: Any, **kwargs: Any) -> None:
        reads, writes = os.pipe()
        if not os.fork():
            said = b"the fork ended"
            try:
                torch.set_num_threads(1)  # OpenMP's threads do not come along in a fork
                backend_registration._setup_privateuseone_for_python_backend(ELSEWHERE)
                with torch.no_grad(), Literals(), Factories():
                    check(*args, **kwargs)
                said = b""
            except BaseException:
                said = traceback.format_exc().encode()
            finally:
                with os.fdopen(writes, "wb") as pipe:
                    pipe.write(said)
                os._exit(0)
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            said = pipe.read()
        os.wait()
        assert not said, said.decode()

    return in_a_fork
