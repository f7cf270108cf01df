"""Checkpoints: one directory each, visible only when complete, readable without unpickling anything.

``model.safetensors`` has the dense model's own keys and loads into the plain model anywhere. ``state.safetensors`` and
``state.json`` hold the rest: the tensors, and the tree that they hang in with all numbers and names.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = "granet checkpoint 1"


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read: names the file and the cause."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the model's state dict, and everything else as a tree of dicts, lists and tensors."""

    path: Path
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, *, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Returns the directory of the new checkpoint, ``folder/<step>``, which appears at once and complete.

    Raises:
        CheckpointError: it could not be written, on a full disk for instance; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    files = {"model.safetensors": to_bytes(_separate(model)), "state.safetensors": to_bytes(_separate(tensors))}
    sums = {name: zlib.crc32(content) for name, content in files.items()}
    head = {"format": FORMAT, "step": step, "crc32": sums | {"state.json": _sum_of(step, tree)}}
    files["state.json"] = json.dumps(head | {"state": tree}).encode()

    target = folder / f"{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_and_sync(temporary / name, content)
        _sync(temporary)
        if target.exists():  # left damaged by an earlier attempt, or saved twice at the same step
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(map(len, files.values())) / 1e6
        raise CheckpointError(
            f"the checkpoint {target} ({size:.1f} MB) could not be written: {error.strerror or error}. "
            f"Older checkpoints are intact; make room and resume"
        ) from error
    return target


def prune(folder: Path, *, keep: int, also: set[int]) -> None:
    """Removes all checkpoints but the last ``keep`` and those of the steps in ``also``."""
    for path in paths(folder)[keep:]:
        if int(path.name) not in also:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.*"):  # of processes that were killed while writing
        if path.name.rpartition(".")[2] != str(os.getpid()):
            shutil.rmtree(path, ignore_errors=True)


def paths(folder: Path) -> list[Path]:
    """Returns the checkpoint directories in ``folder``, the latest first."""
    return sorted((p for p in folder.glob("*") if p.name.isdecimal() and p.is_dir()), reverse=True)


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in the directory ``path``, on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not granet's.
    """
    try:
        head = json.loads((path / "state.json").read_bytes())
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise CheckpointError(f"{path / 'state.json'} is no {FORMAT!r}")
        if head["crc32"].get("state.json") not in (None, _sum_of(head["step"], head["state"])):
            raise CheckpointError(f"{path / 'state.json'} is altered: its checksum differs")
        model, tensors = (
            _read(path / name, head["crc32"][name]) for name in ("model.safetensors", "state.safetensors")
        )
        return Checkpoint(path, head["step"], model, _unpack(head["state"], tensors))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: {Path(error.filename).name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error!r}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """Returns the latest intact checkpoint in ``folder``, None if there is none; warns of each damaged one passed over.

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


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: str) -> None:
    """Writes a file such that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_and_sync(temporary, content.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, crc32: int) -> dict[str, Tensor]:
    content = path.read_bytes()
    if zlib.crc32(content) != crc32:
        raise CheckpointError(f"{path} is truncated or altered ({len(content)} bytes, checksum differs)")
    try:
        # from memory: a mapped file would tie the tensors to a file that may go
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors contiguous on the CPU, those that share memory (tied weights) as copies."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _sum_of(step: int, tree: Any) -> int:
    return zlib.crc32(json.dumps([step, tree]).encode())


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns ``value`` as JSON; its tensors are replaced by their paths and put into ``tensors``."""
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
    """Gives an optimizer its state back, its buffers in the memory layout of their parameters (channels-last, say)."""
    optimizer.load_state_dict(dict(state))
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape and buffer.stride() != parameter.stride():
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)
