"""Registries: names of methods, models, datasets, optimizers and recipes, to which other packages can add.

A registry is filled when it is first read: by the module of granet that holds its built-in entries, then by *plugins*.
A plugin is a module that registers something when it is imported. Plugins are found in two ways:

- the entry point group `granet` of an installed package, each entry of which names a module,
- the environment variable `GRANET_PLUGINS`, names of modules or paths of Python files (`./mine.py`) separated by
  commas, for scripts that do not belong to a package.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Generic, TypeVar

from granet.names import unknown

GROUP = "granet"
"""The entry point group of plugins."""
VARIABLE = "GRANET_PLUGINS"
"""The environment variable that names modules to import as plugins."""

T = TypeVar("T")
Added = TypeVar("Added")


class PluginError(ValueError):
    """A plugin that cannot be imported; the message names it, says where it is listed and what went wrong."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to entries of one kind, in the order in which they were added.

    Args:
        kind: one word for the entries in messages, "method" for example.
        home: the module that adds the built-in entries when it is imported.
        check: called with the name and the entry before it is added; raises ValueError or TypeError to reject it.

    >>> fruits = Registry("fruit", home="granet.registry")
    >>> @fruits.add("apple")
    ... class Apple: ...
    >>> fruits["apple"].__name__, list(fruits)
    ('Apple', ['apple'])
    """

    def __init__(self, kind: str, *, home: str, check: Callable[[str, T], None] | None = None):
        self.kind = kind
        self._home = home
        self._check = check
        self._entries: dict[str, T] = {}
        self._places: dict[str, tuple[str, str] | None] = {}  # where each entry is defined

    def add(self, name: str, *, defined_by: object = None) -> Callable[[Added], Added]:
        """Returns a decorator that adds a class or function under `name` and returns it unchanged.

        A class or function that is defined again in the same place, as in a notebook cell that is run twice,
        replaces the earlier one.

        Args:
            name: the name of the entry, in lower case.
            defined_by: a class or function whose definition identifies an entry that is neither.

        Raises:
            ValueError: `name` is not a usable name, or is taken already.
        """
        if not isinstance(name, str) or not name or not set(name) <= ALLOWED or name[0] in "-.":
            raise ValueError(
                f"{name!r} cannot be the name of a {self.kind}: use lower-case letters, digits, '-', '_' and '.', "
                "and begin with neither '-' nor '.'"
            )

        def decorate(thing: Added) -> Added:
            import_module(self._home)  # built-in entries come first, so that nothing takes their names
            place = _place(thing if defined_by is None else defined_by)
            if name in self._entries and (place is None or place != self._places[name]):
                raise ValueError(f"there is already a {self.kind} named {name!r}: choose another name")
            if self._check is not None:
                self._check(name, thing)
            self._entries[name], self._places[name] = thing, place
            return thing

        return decorate

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Removes, at the end of the `with` block, the entries that were added in it; for tests."""
        before = dict(self._filled()), dict(self._places)
        try:
            yield
        finally:
            self._entries, self._places = before

    def _filled(self) -> dict[str, T]:
        """Returns all entries, after the built-in ones and those of plugins were added."""
        import_module(self._home)
        load_plugins()
        return self._entries

    def __getitem__(self, name: str) -> T:
        entries = self._filled()
        try:
            return entries[name]
        except (KeyError, TypeError):
            raise UnknownNameError(unknown(self.kind, name, entries)) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._filled()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._filled()))

    def __len__(self) -> int:
        return len(self._filled())

    def __repr__(self) -> str:
        return f"<registry of {self.kind}s: {', '.join(self._entries)}>"


class UnknownNameError(KeyError, ValueError):
    """A name that is not registered; the message lists the registered names and suggests the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


ALLOWED = set("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def _place(thing: object) -> tuple[str, str] | None:
    """Returns the module and the qualified name of a class or function, or None for anything else."""
    name = getattr(thing, "__qualname__", None)
    return None if name is None else (getattr(thing, "__module__", ""), name)


_lock = threading.RLock()
_state: dict[str, str | bool] = {}  # "done": the import of plugins has begun; "failed": the message of its error


def load_plugins() -> None:
    """Imports all plugins, once; does nothing afterwards, nor when a plugin itself reads a registry.

    Raises:
        PluginError: a plugin cannot be imported. It is raised again at each call, so that no command runs with only
            some of the plugins.
    """
    with _lock:
        if "failed" in _state:
            raise PluginError(_state["failed"])
        if "done" in _state:
            return
        _state["done"] = True
        for module, source in _plugins():
            try:
                _import(module)
            except Exception as error:
                _state["failed"] = f"the plugin {module!r}, listed in {source}, cannot be imported: {_reason(error)}"
                raise PluginError(_state["failed"]) from error


def _plugins() -> Iterator[tuple[str, str]]:
    """Yields the modules to import, each with a description of where it is listed."""
    for entry in entry_points(group=GROUP):
        package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
        yield entry.module, f"the entry point {GROUP}.{entry.name}{package}"
    for module in os.environ.get(VARIABLE, "").split(","):
        if module.strip():
            yield module.strip(), f"the environment variable {VARIABLE}"


def _import(plugin: str) -> None:
    """Imports a module by its name, or a Python file by its path, under the file's name without `.py`."""
    if not plugin.endswith(".py"):
        import_module(plugin)
        return
    path = Path(plugin).expanduser().resolve()
    spec = spec_from_file_location(path.stem, path)
    if path.stem in sys.modules or spec is None or spec.loader is None:
        raise ImportError(f"another module named {path.stem!r} is imported already: rename the file")
    module = sys.modules[path.stem] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _reason(error: Exception) -> str:
    """Returns the text of an error in importing a plugin; if a module is missing, it says where modules are found."""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        reason += f" (a module must be installed or on PYTHONPATH; {VARIABLE} also takes a path such as ./mine.py)"
    return reason
