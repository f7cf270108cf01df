"""The bytes of a saved model: tensors in safetensors, with the header as JSON in the file's metadata.

Nothing in a file is executed. It is read as a whole before it is checked, so that it cannot change afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from granet import files
from granet.engine.saved.records import FORMAT, Header

KEY = "granet.compiled"  # of the header in the metadata


class CompiledFileError(ValueError):
    """A file that is no saved compiled model, or one that cannot be used here. The message names it and says why."""


def to_bytes(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the content of a file."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own = tensor.untyped_storage().nbytes() == tensor.nbytes and place not in seen
        separate[name] = tensor if own else tensor.clone()
        seen.add(place)
    return safetensors.torch.save(separate, {KEY: header.model_dump_json()})


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Returns the header and the tensors of a file.

    Raises:
        FileNotFoundError: there is no such file.
        CompiledFileError: it is none that `to_bytes` made, or made by another version.
    """
    return parse(files.read(path.resolve()), path)


def parse(content: bytes, path: Path) -> tuple[Header, dict[str, Tensor]]:
    """The same for the content of a file; `path` is for messages."""
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CompiledFileError(
            f"{path} is not a safetensors file, or not a whole one: {' '.join(str(error).split()):.200}"
        ) from None
    text = metadata.get(KEY)
    if text is None:
        raise CompiledFileError(f"{path} is a safetensors file, but no compiled model that granet saved")
    try:
        return Header.model_validate_json(text), tensors
    except ValidationError as error:
        raise CompiledFileError(f"{path}: {_why(text, error)}") from None


def _why(text: str, error: ValidationError) -> str:
    try:
        header = json.loads(text)
        version, granet = header["format"], str(header["granet"])[:40]
    except (ValueError, LookupError, TypeError, RecursionError):
        version, granet = FORMAT, ""
    if version != FORMAT:
        return (
            f"it has version {version!r:.40} of the format (granet {granet}), and this granet reads version {FORMAT}: "
            "save the compiled model again"
        )
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))[:120]
    return f"its header is damaged, at {place or 'the beginning'}: {first['msg']}"
