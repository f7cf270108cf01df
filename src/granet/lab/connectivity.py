"""Connectivity: what masks have in common, between runs and through a run, and which units are cut off.

The overlap of two masks is their Jaccard index, |both| / |either|. Two random masks of the same sizes overlap as well:
with a and b of n weights active, a * b / n are in both on average, which gives the overlap expected by chance.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from granet.lab.plasticity.page import svg
from granet.lab.rows import csv_of
from granet.report import page as report
from granet.text import columns
from granet.topology import count
from granet.train import checkpoint
from granet.train.run import Run

if TYPE_CHECKING:
    import altair

ALL = "all layers"
UNITS = {  # headings of the table of units, with what they mean
    "run": "directory of the run",
    "layer": "name of the parameter",
    "density": "share of the weights that are active",
    "units": "output units (neurons, filters)",
    "no input": "output units without an active weight: their output is constant",
    "inputs": "input units",
    "no output": "input units that no active weight reads",
    "R_s": "share of the weights that were ever active",
}
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Overlap:
    """What two masks of a layer have in common; `first` and `second` name run and step."""

    kind: str  # "between runs", "through a run"
    first: str
    second: str
    layer: str
    jaccard: float
    chance: float


@dataclass(frozen=True)
class LayerUnits:
    """A layer of a run's last network.

    Attributes:
        run: the run's directory.
        layer: the parameter.
        density: share of active weights.
        units: output units (neurons, filters).
        without_inputs: output units none of whose weights is active: their output is constant.
        inputs: input units of the layer.
        without_outputs: input units that no active weight reads: they are computed for nothing.
        exploration: R_s, share of weights that were ever active.
    """

    run: str
    layer: str
    density: float
    units: int
    without_inputs: int
    inputs: int
    without_outputs: int
    exploration: float


@dataclass(frozen=True)
class Connectivity:
    """Overlaps and units of several runs. `str(...)` is a table of each."""

    overlaps: tuple[Overlap, ...]
    layers: tuple[LayerUnits, ...]

    def __str__(self) -> str:
        text = columns([list(UNITS), *self.unit_rows()], right=range(2, len(UNITS)))
        for kind in dict.fromkeys(one.kind for one in self.overlaps):
            rows = [one for one in self.overlaps if one.kind == kind]
            lines = [[one.first, one.second, one.layer, f"{one.jaccard:.3f}", f"{one.chance:.3f}"] for one in rows]
            text += f"\n\n{columns([[kind, 'and', 'layer', 'Jaccard', 'by chance'], *lines], right=(3, 4))}"
        return text

    def unit_rows(self) -> list[list[str]]:
        """Returns the layers as rows of text under the headings of `UNITS`, as terminal and page show them."""
        return [
            [
                one.run, one.layer, f"{one.density:.2%}", f"{one.units:,}", f"{one.without_inputs:,}",
                f"{one.inputs:,}", f"{one.without_outputs:,}", f"{one.exploration:.2%}",
            ]
            for one in self.layers
        ]  # fmt: skip

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns the overlaps as CSV, and writes them to ``path`` if one is given."""
        return csv_of(Overlap, self.overlaps, path)

    def figure(self) -> "altair.FacetChart":
        """Returns the overlaps of each pair by layer, beside those expected by chance.

        Raises:
            ModuleNotFoundError: Altair is not installed; the message says how to.
            ValueError: there is a single network, so nothing overlaps.
        """
        if not self.overlaps:
            raise ValueError("a single checkpoint of a single run overlaps with nothing: give several runs")
        try:
            import altair as alt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('a figure needs altair: pip install "granet[train]"') from error
        points = [asdict(one) | {"pair": f"{one.first} / {one.second}"} for one in self.overlaps]
        base = alt.Chart().encode(y=alt.Y("layer:N", title=None, sort=None))
        x = alt.X("jaccard:Q", title="Jaccard index (bar), by chance (tick)", scale=alt.Scale(domain=[0, 1]))
        tooltip = ["pair:N", "layer:N", alt.Tooltip("jaccard:Q", format=".3f"), alt.Tooltip("chance:Q", format=".3f")]
        bars = base.mark_bar(color="#3a78e7", opacity=0.8).encode(x=x, tooltip=tooltip)
        ticks = base.mark_tick(color="#d9730d", thickness=3).encode(x="chance:Q", tooltip=tooltip)
        return (
            alt.layer(bars, ticks, data=alt.Data(values=points))
            .properties(width=300, height=alt.Step(16))
            .facet(
                facet=alt.Facet("pair:N", title=None, sort=list(dict.fromkeys(point["pair"] for point in points))),
                columns=2,
            )
        )

    def write(self, out: str | Path) -> dict[str, Path]:
        """Returns the files written to the folder ``out``: numbers, figure and page."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        written = {"numbers": out / "connectivity.csv"}
        self.to_csv(written["numbers"])
        chart = self.figure()
        written["figure"] = out / "connectivity.svg"
        checkpoint.replace(written["figure"], svg(chart))
        written["page"] = report.write_page(
            out / "connectivity.html",
            title="Connectivity",
            headings=list(UNITS),
            explanations=UNITS,
            prose=["layer"],
            rows=[(row, "transparent") for row in self.unit_rows()],
            colours={},
            drawn=[("Overlap of masks", "Jaccard index; tick: expected of random masks as dense", True, chart)],
        )  # fmt: skip
        return written


def overlap(a: Masks, b: Masks) -> dict[str, tuple[float, float]]:
    """Returns Jaccard index and its value expected by chance, by layer and for all layers together.

    The latter is the ratio of the expected sizes, the number of active weights in every layer as it is.

    Raises:
        ValueError: the masks are of different models.

    >>> import torch
    >>> overlap({"a": torch.tensor([True, True, False, False])}, {"a": torch.tensor([True, False, True, False])})["a"]
    (0.3333333333333333, 0.3333333333333333)
    """
    shapes_a, shapes_b = ({name: tuple(mask.shape) for name, mask in masks.items()} for masks in (a, b))
    if shapes_a != shapes_b:
        name, shape = sorted(set(shapes_a.items()) ^ set(shapes_b.items()))[0]
        raise ValueError(f"the masks are of different models: {name!r} of shape {shape} is only in one of them")
    found, sums = {}, [0, 0, 0.0, 0.0]
    for name in a:
        active_a, active_b = count(a[name]), count(b[name])
        both = count(a[name] & b[name])
        by_chance = active_a * active_b / a[name].numel()
        sizes = (both, active_a + active_b - both, by_chance, active_a + active_b - by_chance)
        found[name] = (sizes[0] / sizes[1], sizes[2] / sizes[3])
        sums = [x + y for x, y in zip(sums, sizes, strict=True)]
    return found | {ALL: (sums[0] / sums[1], sums[2] / sums[3])}


def units(mask: Tensor) -> tuple[int, int]:
    """Returns how many output units of a layer have no active input, and how many input units no active output.

    The mask is of shape (out, in, ...); of a grouped convolution the input units of a group stand for all groups.
    """
    connected = mask.flatten(2).any(2) if mask.ndim > 2 else mask
    return int((~connected.any(1)).sum()), int((~connected.any(0)).sum())


def connectivity_of(runs: str | Path | Run | Iterable[str | Path | Run]) -> Connectivity:
    """Returns what the masks of runs have in common, and which units of their last networks are cut off.

    Every run's checkpoints are compared with the first of them and with the one before; the last networks of all runs
    with one another. Train with ``train.keep`` to have checkpoints of certain moments.

    Args:
        runs: run directories, or one.

    Raises:
        FileNotFoundError: there is no run.
        CheckpointError: a run has no checkpoint, or a damaged one.
        ValueError: no runs are given, or of different models.
    """
    one = isinstance(runs, str | Path | Run)
    opened = [run if isinstance(run, Run) else Run.open(Path(run)) for run in ([runs] if one else runs)]
    if not opened:
        raise ValueError("no runs were given: give one or several run directories")
    names = [run.path.name for run in opened]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in opened]
    overlaps: list[Overlap] = []
    layers: list[LayerUnits] = []
    last: dict[str, Masks] = {}
    for label, run in zip(labels, opened, strict=True):
        found = [checkpoint.load(path) for path in reversed(checkpoint.paths(run.checkpoints))]
        if not found:
            raise checkpoint.CheckpointError(f"{run.path} has no checkpoint: there are no masks to compare")
        masks = [one.masks for one in found]
        overlaps += _through(label, [one.step for one in found], masks)
        last[label] = masks[-1]
        layers += _layers(label, masks[-1], found[-1].ever)
    for a, b in itertools.combinations(last, 2):
        overlaps += [Overlap("between runs", a, b, name, *pair) for name, pair in overlap(last[a], last[b]).items()]
    return Connectivity(tuple(overlaps), tuple(layers))


def _through(label: str, steps: Sequence[int], masks: Sequence[Masks]) -> list[Overlap]:
    """Returns the overlap of each checkpoint with the one before, and of all layers together with the first."""
    kind, found = "through a run", []
    for i in range(1, len(steps)):
        first, second = f"{label} step {steps[i - 1]}", f"{label} step {steps[i]}"
        found += [Overlap(kind, first, second, name, *pair) for name, pair in overlap(masks[i - 1], masks[i]).items()]
        if i > 1:
            first = f"{label} step {steps[0]}"
            found.append(Overlap(kind, first, second, ALL, *overlap(masks[0], masks[i])[ALL]))
    return found


def _layers(label: str, masks: Masks, ever: Masks) -> list[LayerUnits]:
    found = []
    for name, mask in masks.items():
        dead, unread = units(mask)
        density, explored = count(mask) / mask.numel(), count(ever[name]) / mask.numel()
        found.append(LayerUnits(label, name, density, mask.shape[0], dead, mask.shape[1], unread, explored))
    return found
