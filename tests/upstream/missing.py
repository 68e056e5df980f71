"""Packages that are not installed, as modules in which every class takes any arguments and does nothing."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Missing(ModuleType):
    """A module that is not installed."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower():
            return importlib.import_module(f"{self.__name__}.{name}")
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


class Finder(MetaPathFinder, Loader):
    """Finds every module of these packages."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        missing = any(f"{name}.".startswith(f"{package}.") for package in self.packages)
        return ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Missing(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def install(*packages: str) -> None:
    """Let imports of these packages, and of anything in them, succeed."""
    sys.meta_path.insert(0, Finder(packages))
