"""A model as it is stored, and the way back, on which everything is checked before anything changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, overload

import torch
from torch import Tensor, nn

from granet.names import did_you_mean, matched
from granet.parsing import from_json
from granet.storage import codec, container, contents
from granet.storage.codec import Entry
from granet.storage.container import Part, StorageError
from granet.text import short

FORMAT = 1
KEY = "granet"  # of the metadata of a safetensors file
ABOUT = ("granet", "method", "sparsity", "pattern", "dtype")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Packed:
    """The tensors of a model in few bytes: in memory (`pack`), or in an open file (`opened`).

    Attributes:
        source: what messages call it, a path for instance.
        about: granet's version, method, sparsity, pattern and the dtype asked for; empty for another's file.
        entries: how each tensor is stored, by name.
        ties: names of tensors that are those of other names.
        parts: what is stored.
    """

    source: str
    about: dict[str, Any]
    entries: dict[str, Entry]
    ties: dict[str, str]
    parts: Mapping[str, Part] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all parts, without the header of a file."""
        return sum(part.nbytes for part in self.parts.values())

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of a safetensors file with these tensors."""
        entries = {name: {} if self._is_plain(name) else entry.as_json() for name, entry in self.entries.items()}
        values = {"format": FORMAT, **self.about, "tensors": entries, "ties": self.ties}
        return {KEY: json.dumps(values, separators=(",", ":"))}

    def _is_plain(self, name: str) -> bool:
        return self.entries[name].active is None and self.entries[name].stored == self.entries[name].dtype

    @overload
    def unpack(self, into: None = None) -> dict[str, Tensor]: ...

    @overload
    def unpack(self, into: Model) -> Model: ...

    def unpack(self, into=None):
        """Returns the dense tensors by name; or the model `into`, after its tensors were written to, one at a time.

        Raises:
            StorageError: the tensors do not fit the model, or contradict themselves. The model is then as it was.
            TypeError: `into` is no module.
        """
        if into is None:
            self._refuse_more_than_memory()
            self._verify()
            made = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in self.entries.items()}
            for name, out in made.items():
                codec.decode(name, self.entries[name], self.parts, out)
            return made | {name: made[other] for name, other in self.ties.items()}
        model = contents.bare(into)
        try:
            targets = contents.targets_of(model)
            names = self._matched(targets)
            ties = self._ties(model, names, targets)
        except StorageError:
            raise
        except ValueError as error:
            raise StorageError(f"{self.source} cannot be loaded into the model: {error}") from None
        self._verify()
        for name, entry in self.entries.items():
            codec.decode(name, entry, self.parts, targets[names[name]])
        for tie in ties:
            tie()
        return into

    @contextmanager
    def said_of(self, name: str) -> Iterator[None]:
        """Turns errors within the block into a StorageError that names the source and the tensor."""
        try:
            yield
        except StorageError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise StorageError(f"{self.source}: tensor {name!r}: {error}") from None

    def _matched(self, targets: Mapping[str, Tensor]) -> dict[str, str]:
        """Returns the model's name of each tensor.

        Raises:
            StorageError: a name has no counterpart, or shapes or kinds of numbers differ.
        """
        own = [*self.entries, *self.ties]
        names = matched(own, targets)
        for name in own:
            if name not in names:
                pruned = name + "_orig" in targets
                hint = (
                    "; it is pruned by torch.nn.utils.prune: call granet.import_masks(model) first"
                    if pruned
                    else did_you_mean(name, targets)
                )
                raise StorageError(f"{self.source}: the model has no tensor {name!r}{hint}")
        missing = [name for name in targets if name not in names.values()]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise StorageError(f"{self.source} has no tensor {missing[0]!r}{more}, which the model needs")
        if len(set(names.values())) < len(names):
            raise StorageError(f"{self.source} has two tensors for one of the model's: {short(names)}")
        for name in own:
            entry, target = self.entries[self.ties.get(name, name)], targets[names[name]]
            if entry.shape != tuple(target.shape):
                shapes = f"shape {entry.shape}, and the model's has {tuple(target.shape)}"
                raise StorageError(f"{self.source}: tensor {name!r} has {shapes}")
            if _kind(entry.dtype) != _kind(target.dtype):
                raise StorageError(f"{self.source}: tensor {name!r} is {entry.dtype}, and the model's {target.dtype}")
        return names

    def _ties(
        self, model: nn.Module, names: Mapping[str, str], targets: Mapping[str, Tensor]
    ) -> list[Callable[[], None]]:
        """Returns what ties tensors in the model that are one tensor here.

        Raises:
            ValueError: the model ties tensors that are different ones here, or cannot tie those that are one.
        """
        back, there = {other: name for name, other in names.items()}, contents.tied(targets)
        for name, other in there.items():
            one, two = (self.ties.get(back[each], back[each]) for each in (name, other))
            if one != two:
                raise ValueError(
                    f"{one!r} and {two!r} are two tensors, and in the model {name!r} and {other!r} are one: untie them "
                    "there, or save a model in which they are tied"
                )
        pairs = [(names[name], names[other]) for name, other in self.ties.items()]
        apart = [pair for pair in pairs if len({there.get(name, name) for name in pair}) > 1]
        return [contents.tie(model, *pair) for pair in apart]

    def _verify(self) -> None:
        for name, entry in self.entries.items():
            with self.said_of(name):
                codec.verify(name, entry, self.parts)

    def _refuse_more_than_memory(self) -> None:
        needed, there = sum(entry.nbytes for entry in self.entries.values()), _memory()
        if there is not None and needed > there:
            raise StorageError(
                f"{self.source} claims {needed:,} bytes of dense tensors, and this machine's memory has {there:,}"
            )


def from_file(file: BinaryIO, source: str) -> Packed:
    """Returns what an open file holds.

    Raises:
        StorageError: it is no safetensors file, is truncated, or contradicts itself.
    """
    metadata, parts = container.read(file, source)
    try:
        values = from_json(metadata.get(KEY, "{}"))
        about, entries, ties = _described(values, parts)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = error if type(error) is ValueError else f"they are {short(metadata[KEY])}"
        raise StorageError(f"{source}: its metadata {KEY!r} are damaged: {reason}") from None
    found = Packed(source, about, entries, ties, parts)
    used: set[str] = set()
    for name, entry in entries.items():
        with found.said_of(name):
            used |= codec.check(name, entry, parts)
    for name, part in parts.items():
        if name not in used:
            if name in entries:
                raise StorageError(f"{source}: tensor {name!r} is stored twice, dense and sparse")
            entries[name] = Entry(part.shape, part.dtype, part.dtype)
    for name, other in ties.items():
        if other not in entries or name in entries:
            raise StorageError(f"{source}: tensor {name!r} is said to be {short(other)}, which is not there")
    return found


def _described(values: Any, parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, Entry], dict[str, str]]:
    """Returns what the metadata say of a model, of its tensors, and which are tied.

    Raises:
        ValueError: they contradict themselves.
    """
    if not values:
        return {}, {}, {}
    if values["format"] != FORMAT:
        raise ValueError(f"they are of format {short(values['format'])}, and this version of granet reads {FORMAT}")
    entries = {}
    for name, entry in values["tensors"].items():
        try:
            part = parts.get(name)
            plain = not entry and part is not None
            entries[name] = Entry(part.shape, part.dtype, part.dtype) if plain else Entry.from_json(entry)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"tensor {name!r}: {error if type(error) is ValueError else short(entry)}") from None
    ties = values["ties"]
    if not isinstance(ties, dict) or not all(isinstance(other, str) for other in ties.values()):
        raise ValueError(f"the tied tensors are {short(ties)}")
    about = {key: values.get(key) for key in ABOUT}
    return about, entries, ties


def _kind(dtype: torch.dtype) -> str:
    """Returns the kind of numbers, within which they are converted to the model's dtype."""
    return "floating" if dtype.is_floating_point else str(dtype)


def _memory() -> int | None:
    """Returns the bytes of this machine's memory, or None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
