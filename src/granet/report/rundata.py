"""The contents of a run directory, as tables and pages need them (`granet.train.run` describes the files)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from granet import files, parsing
from granet.train.summary import read_object, read_records, read_summary


@dataclass(frozen=True, eq=False)
class RunData:
    """The files of a run directory, read and checked.

    Attributes:
        path: The run directory.
        recipe: The recipe, as YAML.
        environment: Versions, device and command of the training.
        records: The lines of `metrics.jsonl`.
        summary: The summary, None while the run is not finished.
    """

    path: Path
    recipe: str
    environment: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The recipe's name, or the directory's name while the run is not finished."""
        return self.summary["name"] if self.summary else self.path.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe as a mapping."""
        return parsing.from_yaml(self.recipe)

    @property
    def is_dense(self) -> bool:
        """Whether the run is finished and has no inactive weights."""
        return self.summary is not None and not self.summary["sparsity"]

    @property
    def score(self) -> dict[str, Any]:
        """The accuracies of the best weights of a finished run, or those of its last weights if there are no best."""
        return self.summary["best"] or self.summary["last"]

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The records of training batches."""
        return [record for record in self.records if record["kind"] == "train"]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """The records of evaluations."""
        return [record for record in self.records if record["kind"] == "eval"]

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        """The records of topology updates."""
        return [record for record in self.records if record["kind"] == "update"]


def read_run(path: str | Path) -> RunData:
    """Returns the contents of the run directory `path`, without a last line of metrics that is only half written.

    Raises:
        FileNotFoundError: `path` is not a run directory.
        ValueError: A file in it is damaged; the message names the file and the line.
    """
    path = Path(path)
    missing = [name for name in ("recipe.yaml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is not the directory of a run: it has no {' and no '.join(missing)}")
    environment, summary = read_object(path / "environment.json"), read_summary(path / "summary.json")
    records = tuple(read_records(path / "metrics.jsonl"))
    try:
        recipe = files.read(path / "recipe.yaml").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'recipe.yaml'} is damaged: {error}") from None
    run = RunData(path, recipe, environment or {}, records, summary)
    try:
        is_mapping = isinstance(run.settings, dict)
    except ValueError:
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"{path / 'recipe.yaml'} is damaged: it does not hold a recipe")
    return run


def labels(runs: Sequence[RunData]) -> dict[str, RunData]:
    """Returns the runs by the label that tells them apart: the name, else the directory's name, else the path."""
    names = [run.name for run in runs]
    by_label = {run.name if names.count(run.name) == 1 else run.path.name: run for run in runs}
    return by_label if len(by_label) == len(runs) else {str(run.path): run for run in runs}
