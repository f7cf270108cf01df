"""The files of a run directory that say what a run came to, checked: `summary.json` and `metrics.jsonl`.

They may be damaged, of another version, or made up by someone else. What is read here has the entries that tables and
reports rely on, of the right types and within sense; more entries than these may be there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from granet import files
from granet.parsing import from_json
from granet.text import short

Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Score(_Part):
    test_accuracy: Share
    validation_accuracy: Share
    test_accuracy_per_class: list[Share | None] | None = None  # by the number of the class


class _Parameters(_Part):
    total: Count
    active: Count


class _Flops(_Part):
    inference: Amount
    inference_dense: Positive
    training: Amount
    training_dense: Positive


class _Layer(_Part):
    name: str
    shape: list[Count]
    total: Annotated[Count, Field(gt=0)]
    active: Count
    flops: Amount


class _Summary(_Part):
    name: str
    method: str
    model: str
    data: str
    seed: int
    pattern: str = "unstructured"
    sparsity: Share
    exploration: Share | None = None
    parameters: _Parameters
    flops: _Flops
    best: _Score | None
    last: _Score
    seconds: Amount
    steps: Annotated[Count, Field(gt=0)]
    layers: list[_Layer]


class _Record(_Part):
    step: Count
    epoch: Amount


class _Train(_Record):
    kind: Literal["train"]
    loss: float
    accuracy: Share
    sparsity: Share
    lr: Amount | None = None


class _Eval(_Record):
    kind: Literal["eval"]
    loss: float
    accuracy: Share
    sparsity: Share
    realised_sparsity: Share


class _Update(_Record):
    kind: Literal["update"]
    sparsity: Share
    regeneration: Amount
    exploration: Share
    active: dict[str, Count]
    grown: dict[str, Count]
    dropped: dict[str, Count]


_RECORD = TypeAdapter(Annotated[_Train | _Eval | _Update, Field(discriminator="kind")])
KINDS = ("train", "eval", "update")


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, None if there is no file.

    Raises:
        ValueError: the file is damaged.
        FileError: it is no plain file.
    """
    try:
        value = from_json(files.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return value


def read_summary(path: Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run, None if there is none.

    Raises:
        ValueError: the file is damaged, or lacks something.
        FileError: it is no plain file.
    """
    value = read_object(path)
    if value is not None:
        try:
            _Summary.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {_first(error)}") from None
    return value


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a run, one a line; a last line that is half written is left out.

    Raises:
        ValueError: a line is damaged; the message names it.
        FileNotFoundError: there is no file.
        FileError: it is no plain file.
    """
    lines = files.read(path).split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # after the last \n is nothing, or the beginning of a line
        try:
            record = from_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError("it is no record")
            if record["kind"] in KINDS:
                _RECORD.validate_python(record)
        except ValidationError as error:
            raise ValueError(f"{path}, line {number} is damaged: {_first(error)}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}") from None
        yield record


def _first(error: ValidationError) -> str:
    """Returns in a line what is wrong: what is missing, all of it, or else the first value that is not possible."""
    problems = error.errors(include_url=False)
    missing = [".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"]
    if missing:
        return f"it lacks {', '.join(missing[:5])}"
    where = ".".join(str(part) for part in problems[0]["loc"] if part not in KINDS)
    return f"{short(where)[1:-1]} cannot be {short(problems[0]['input'])}"
