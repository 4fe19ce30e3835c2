"""Make diffusers load our classes by the name of this library.

diffusers loads pipeline components from the libraries in its table `LOADABLE_CLASSES` only. The table lives in a module whose
import costs more than all of ours, so it is not imported here: it is amended when somebody imports it, or at once where
that has happened already.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE_MODULE = "diffusers.pipelines.pipeline_loading_utils"


def add_to_table(table_module: ModuleType) -> None:
    """Let components be named `["discrete_schedulers", "<class>"]` in `model_index.json`."""
    methods = ["save_pretrained", "from_pretrained"]
    table_module.LOADABLE_CLASSES.setdefault("discrete_schedulers", {"ModelMixin": methods, "SchedulerMixin": methods})


class TableLoader(Loader):
    """The module's own loader, and the amendment after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        add_to_table(module)


class TableFinder(MetaPathFinder):
    """Waits for the import of the one module, then steps out of the way."""

    def find_spec(self, fullname: str, path, target=None) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = TableLoader(spec.loader)
        return spec


def register() -> None:
    """Amend the table now or on its import. Calling it twice changes nothing."""
    if TABLE_MODULE in sys.modules:
        add_to_table(sys.modules[TABLE_MODULE])
    elif not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
