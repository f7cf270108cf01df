"""Checkpoints: one directory each, visible only when complete, readable without unpickling anything.

`model.safetensors` has the dense model's own keys and loads into the plain model anywhere. `state.safetensors` and
`state.json` hold the rest: the tensors, and the tree that they hang in with all numbers and names. Both files of
tensors may leave zeros out (`granet.storage`); `granet.load` reads such a model.
"""

import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from granet import files
from granet.files import replace as replace
from granet.parsing import from_json
from granet.storage import saving
from granet.storage.container import StorageError
from granet.storage.packed import from_file
from granet.text import short

logger = logging.getLogger(__name__)

FORMAT = "granet checkpoint 1"
NAMES = ("model.safetensors", "state.safetensors", "state.json")  # the files of a checkpoint


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; the message names the file and the cause."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the model's state dict, and everything else as a tree of dicts, lists and tensors."""

    path: Path
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def best(self) -> int | None:
        """The step of the run's best checkpoint at that time, or None.

        Raises:
            CheckpointError: the checkpoint is damaged, here as below.
        """
        with distrusted(self.path):
            best = self.state["best"]
            return None if best is None else _whole(best["step"])

    @property
    def metrics(self) -> int:
        """The length of the file of records at that time, in bytes."""
        with distrusted(self.path):
            return _whole(self.state["metrics"])

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of the sparse parameters, by name."""
        return self._of_sparsifier("masks")

    @property
    def ever(self) -> dict[str, Tensor]:
        """Which weights of the sparse parameters were ever active, by name."""
        return self._of_sparsifier("ever")

    def _of_sparsifier(self, kind: str) -> dict[str, Tensor]:
        with distrusted(self.path):
            found = self.state["sparsifier"][kind]
            for name, mask in found.items():
                if mask.dtype != torch.bool or mask.ndim < 2 or not mask.any() or mask.shape != self.model[name].shape:
                    raise ValueError(f"{kind} of {name!r} are none")
            return found


def save(
    folder: Path, *, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any], compress: bool = False
) -> Path:
    """Returns the directory of the new checkpoint, `folder/<step>`, which appears at once and complete.

    Args:
        folder: the folder of all checkpoints.
        step: the step of the training.
        model: the model's state dict.
        state: all else, as a tree of dicts, lists, tensors, numbers and texts.
        compress: whether zeros are left out of the files; all numbers come back bit for bit.

    Raises:
        CheckpointError: it could not be written, on a full disk for instance; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    write = _small if compress else to_bytes
    contents = {"model.safetensors": write(_separate(model)), "state.safetensors": write(_separate(tensors))}
    sums = {name: zlib.crc32(content) for name, content in contents.items()}
    head = {"format": FORMAT, "step": step, "crc32": sums | {"state.json": _sum_of(step, tree)}}
    contents["state.json"] = json.dumps(head | {"state": tree}).encode()

    target = folder / f"{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        files.remove(temporary, NAMES)  # of a killed process that had the same number
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            files.write_and_sync(temporary / name, content)
        files.sync(temporary)
        # one may be there: left damaged by an earlier attempt, or saved twice at the same step
        if files.there(target) and not files.remove(target, NAMES):
            raise files.FileError(f"something that is no checkpoint has its name; move it away: {target}")
        temporary.rename(target)
        files.sync(folder)
    except OSError as error:
        files.remove(temporary, NAMES)
        size = sum(map(len, contents.values())) / 1e6
        older = next((path.name for path in paths(folder) if path != target), None)
        left = f"The checkpoint before it, {older}, is untouched" if older else "There is no checkpoint before it"
        raise CheckpointError(
            f"the checkpoint {target} ({size:.1f} MB) could not be written: {error.strerror or error}. "
            f"{left}; make room and resume"
        ) from error
    return target


def prune(folder: Path, *, keep: int, also: set[int]) -> None:
    """Removes all checkpoints but the last `keep` and those of the steps in `also`.

    What is not a checkpoint as `save` writes it, by its name and by what it holds, is neither counted nor removed.
    """
    own = [path for path in paths(folder) if files.only_holds(path, NAMES)]
    for path in own[keep:]:
        if int(path.name) not in also:
            files.remove(path, NAMES)
    for path in folder.glob(".*.*"):  # of processes that were killed while writing
        killed = re.fullmatch(r"\.\d{8,}\.(\d+)", path.name, re.ASCII)
        if killed and int(killed[1]) != os.getpid():
            files.remove(path, NAMES)


def paths(folder: Path) -> list[Path]:
    """Returns the checkpoint directories in `folder`, the latest first."""
    found = [p for p in folder.glob("*") if re.fullmatch(r"\d{8,}", p.name, re.ASCII) and p.is_dir()]
    return sorted((p for p in found if not p.is_symlink()), key=lambda p: int(p.name), reverse=True)


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in the directory `path`, on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not granet's.
    """
    head_file = path / "state.json"
    try:
        files.within(path.parent, path.name)
        with distrusted(head_file):
            head = from_json(files.read(head_file))
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise CheckpointError(f"{head_file} is no {FORMAT!r}")
            if head["crc32"].get("state.json") not in (None, _sum_of(head["step"], head["state"])):
                raise CheckpointError(f"{head_file} is altered: its checksum differs")
            if _whole(head["step"]) != int(path.name) or not isinstance(head["state"], dict):
                raise ValueError(f"it says step {short(head['step'])}")
            sums = {name: head["crc32"][name] for name in ("model.safetensors", "state.safetensors")}
        model, tensors = (_read(path / name, crc32) for name, crc32 in sums.items())
        with distrusted(head_file):
            return Checkpoint(path, head["step"], model, _unpack(head["state"], tensors))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {Path(error.filename).name} is missing") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@contextmanager
def distrusted(path: Path) -> Iterator[None]:
    """Turns errors that a file's content causes in the `with` block into a CheckpointError that names the file.

    The file may be damaged, made up by someone else, or of another version.

    Raises:
        CheckpointError: names `path`; messages that are granet's own pass unchanged.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is damaged, or does not fit its recipe: {' '.join(cause.split()):.300}"
        ) from None


def pick(folder: Path, which: str | None = None) -> Checkpoint:
    """Returns the `"best"` of a run's checkpoints, or the `"last"`; by default the best, else the last.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ValueError: `which` is neither.
    """
    if which not in (None, "best", "last"):
        raise ValueError(f"there is no checkpoint {which!r}: write 'best' or 'last'")
    found = load_latest(folder)
    if found is None:
        raise CheckpointError(f"{folder.parent} has no checkpoint yet")
    if which == "last" or found.best == found.step or (which is None and found.best is None):
        return found
    if found.best is None:
        raise CheckpointError(
            f"{folder.parent} has no best checkpoint: it has not been evaluated at its target sparsity yet; try 'last'"
        )
    return load(folder / f"{found.best:08d}")


def load_latest(folder: Path) -> Checkpoint | None:
    """Returns the latest intact checkpoint in `folder`, None if there is none; warns of each damaged one passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    failures = []
    for path in paths(folder):
        try:
            found = load(path)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            logger.warning("%s; going back to step %d", failure, found.step)
        return found
    if failures:
        raise CheckpointError("no checkpoint is intact: " + "; ".join(failures))
    return None


def _read(path: Path, crc32: int) -> dict[str, Tensor]:
    content = files.read(path)
    if zlib.crc32(content) != crc32:
        raise CheckpointError(f"{path} is truncated or altered ({len(content)} bytes, checksum differs)")
    try:
        # from memory: a mapped file would tie the tensors to a file that may go
        return from_file(io.BytesIO(content), str(path)).unpack()
    except StorageError as error:
        raise CheckpointError(f"{error}") from None


def _small(tensors: Mapping[str, Tensor]) -> bytes:
    file = io.BytesIO()
    saving.write(file, tensors)
    return file.getvalue()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors contiguous on the CPU, those that share memory (tied weights) as copies."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _whole(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"{short(number)} is no whole number from 0 up")
    return number


def _sum_of(step: int, tree: Any) -> int:
    return zlib.crc32(json.dumps([step, tree]).encode())


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns `value` as JSON; its tensors are replaced by their paths and put into `tensors`."""
    match value:
        case Tensor():
            tensors[path] = value
            return {"$tensor": path}
        case dict():
            items = [[key, _pack(item, f"{path}/{key}" if path else str(key), tensors)] for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(items) if plain else {"$dict": items}
        case list() | tuple():
            items = [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"the state's {path or 'root'} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case {"$tensor": path}:
            return tensors[path]
        case {"$dict": items}:
            return {key: _unpack(item, tensors) for key, item in items}
        case {"$tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case dict():
            return {key: _unpack(item, tensors) for key, item in value.items()}
        case list():
            return [_unpack(item, tensors) for item in value]
    return value


def restore_layout(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer its state back, its buffers in the memory layout of their parameters (channels-last, say).

    Its settings (momentum, ...) stay those that it was made with, but for the learning rate of the last step.

    Raises:
        ValueError: a buffer is none of this optimizer, or of another shape than its parameter.
    """
    own = optimizer.state_dict()["param_groups"]
    pairs = zip(own, state["param_groups"], strict=True)
    groups = [mine | {"params": saved["params"], "lr": float(saved["lr"])} for mine, saved in pairs]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    known = BUFFERS.get(type(optimizer).__name__)
    for parameter, buffers in optimizer.state.items():
        if known and buffers and set(buffers) != known:
            raise ValueError(f"{type(optimizer).__name__} keeps {', '.join(sorted(known))}, not {short(set(buffers))}")
        for name, buffer in buffers.items():
            if not isinstance(buffer, Tensor):
                if buffer is not None and not isinstance(buffer, int | float):
                    raise ValueError(f"the optimizer's {name} is {short(buffer)}")
                continue
            if buffer.numel() != 1 and buffer.shape != parameter.shape:
                shapes = f"{tuple(buffer.shape)}, its parameter of {tuple(parameter.shape)}"
                raise ValueError(f"the optimizer's {name} is of shape {shapes}")
            if buffer.shape == parameter.shape and buffer.stride() != parameter.stride():
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)


BUFFERS = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
"""What the optimizers of recipes keep for a parameter, from its first step on."""
