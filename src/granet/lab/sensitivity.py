"""Layer sensitivity: the accuracy of a trained network when one layer at a time is pruned, without retraining."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from granet import topology
from granet.criterion import Layer, magnitude
from granet.distribution import budget
from granet.lab.plasticity.cell import Bench
from granet.lab.plasticity.page import svg
from granet.lab.rows import csv_of
from granet.report import page as report
from granet.sparsifier import masking
from granet.text import columns
from granet.train import checkpoint
from granet.train.run import Run

if TYPE_CHECKING:
    import altair

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Point:
    """The accuracy with one layer at one sparsity, all others as they were trained."""

    layer: str
    sparsity: float
    active: int
    total: int
    accuracy: float


@dataclass(frozen=True)
class Sensitivity:
    """Accuracies of a network with one layer pruned. `str(...)` is a table, most sensitive layer first.

    Attributes:
        name: name of the run.
        split: split of the data that the accuracies are measured on.
        accuracy: accuracy of the unpruned network, with the batch-norm statistics of its training.
        points: one for each layer and sparsity; a layer has none below the sparsity that it was trained to.
        batch_norm: training batches that batch-norm statistics were recomputed on after each pruning, 0 for none.
        present: the density of each layer in the unpruned network.
    """

    name: str
    split: str
    accuracy: float
    points: tuple[Point, ...]
    batch_norm: int
    present: dict[str, float]

    @property
    def layers(self) -> list[str]:
        """The layers, those first that cost most at the highest sparsity."""
        last = {point.layer: point.accuracy for point in self.points}
        return sorted(last, key=last.get)

    @property
    def sparsities(self) -> list[float]:
        """The sparsities, ascending."""
        return sorted({point.sparsity for point in self.points})

    def __str__(self) -> str:
        head = ["layer", "weights", *(f"{sparsity:g}" for sparsity in self.sparsities)]
        at = {(point.layer, point.sparsity): point for point in self.points}
        body = []
        for layer in self.layers:
            row = [at.get((layer, sparsity)) for sparsity in self.sparsities]
            total = next(point.total for point in row if point)
            body.append([layer, f"{total:,}", *(f"{100 * p.accuracy:.2f}" if p else "-" for p in row)])
        norm = f", batch-norm statistics recomputed on {self.batch_norm} batches" if self.batch_norm else ""
        about = (
            f"{self.name}: {self.split} accuracy with one layer pruned to a sparsity, in %; {100 * self.accuracy:.2f}"
        )
        return f"{about} unpruned{norm}\n\n{columns([head, *body], right=range(1, len(head)))}"

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns the points as CSV, and writes them to ``path`` if one is given."""
        return csv_of(Point, self.points, path)

    def figure(self) -> "altair.LayerChart":
        """Returns accuracy against the share of a layer's weights that stay, one curve per layer; dashed: unpruned.

        Raises:
            ModuleNotFoundError: Altair is not installed; the message says how to.
        """
        try:
            import altair as alt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('a figure needs altair: pip install "granet[train]"') from error
        points = [asdict(point) | {"density": point.active / point.total} for point in self.points]
        domain = [1, 0.8 * min(point["density"] for point in points)]
        x = alt.X(
            "density:Q", title="share of the layer's weights that stay",
            scale=alt.Scale(type="log", domain=domain, nice=False), axis=alt.Axis(format="~%", grid=False),
        )  # fmt: skip
        y = alt.Y("accuracy:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format="~%"))
        colour = alt.Color("layer:N", sort=self.layers, scale=alt.Scale(scheme="viridis"), title="layer")
        base = alt.Chart(alt.Data(values=points)).encode(x=x, y=y, color=colour)
        tooltip = ["layer:N", alt.Tooltip("sparsity:Q"), alt.Tooltip("accuracy:Q", format=".2%"), "active:Q", "total:Q"]
        level = alt.Chart().mark_rule(strokeDash=[5, 4], opacity=0.7).encode(y=alt.datum(self.accuracy))
        return alt.layer(
            level, base.mark_line(), base.mark_point(filled=True, size=40).encode(tooltip=tooltip),
            data=alt.Data(values=points),
        ).properties(width=640, height=320)  # fmt: skip

    def write(self, out: str | Path) -> dict[str, Path]:
        """Returns the files written to the folder ``out``: numbers, figure and page."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        written = {"numbers": out / "sensitivity.csv", "figure": out / "sensitivity.svg"}
        self.to_csv(written["numbers"])
        chart = self.figure()
        checkpoint.replace(written["figure"], svg(chart))
        about, _, table = str(self).partition("\n\n")
        lines = [line.split() for line in table.splitlines()]
        written["page"] = report.write_page(
            out / "sensitivity.html",
            title=f"{self.name}: layer sensitivity",
            headings=lines[0],
            rows=[(line, "transparent") for line in lines[2:]],
            colours={},
            notes=[about],
            drawn=[("Layer sensitivity", "accuracy with one layer pruned, none retrained", True, chart)],
        )
        return written


def layer_sensitivity(
    run: str | Path | Run,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    which: Literal["best", "last"] | None = None,
    batch_norm: int = 0,
    split: Literal["train", "validation", "test"] = "test",
) -> Sensitivity:
    """Returns the accuracies of a run's network with one layer at a time pruned by magnitude, nothing retrained.

    Args:
        run: the run, or its directory.
        sparsities: sparsities of the pruned layer; those below its present sparsity are left out.
        which: of the run's checkpoints, the best or the last; the best if there is one, else the last, if not given.
        batch_norm: recompute batch-norm statistics on so many training batches after each pruning; 0 keeps those of
            training.
        split: images to measure on.

    Raises:
        ValueError: a sparsity is impossible, or there is no batch norm to recompute.
        CheckpointError: the run has no such checkpoint.
    """
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ValueError(f"the sparsity of a layer must be above 0 and below 1, not {sparsity}")
    if not sparsities:
        raise ValueError("sparsities is empty: there would be nothing to prune")
    run = run if isinstance(run, Run) else Run.open(Path(run))
    found = checkpoint.pick(run.checkpoints, which)
    on = Bench(run)
    network = on.trainer.model if on.trainer.ema is None else on.trainer.ema
    if batch_norm and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise ValueError(f"{run.recipe.model.name} has no batch norm whose statistics could be recomputed")
    before = found.masks
    on.place(found, before)
    unpruned = on.trainer.evaluate(split).accuracy
    batches = on.trainer.probe(batch_norm).batches if batch_norm else []
    points = []
    for name, mask in before.items():
        for sparsity in sorted(sparsities):
            left = max(1, budget(mask.numel(), 1 - sparsity))
            if left > topology.count(mask):
                continue
            on.place(found, before)
            weight = dict(on.trainer.model.named_parameters())[name].detach()
            layer = {name: Layer(weight)}
            pruned = topology.prune_each({name: masking.like(mask, weight)}, {name: left}, layer, magnitude)
            on.place(found, dict(before) | pruned)
            if batch_norm:
                update_bn(batches, network)
            points.append(Point(name, sparsity, left, mask.numel(), on.trainer.evaluate(split).accuracy))
    if not points:
        raise ValueError(f"every layer of {run.path} is sparser than {max(sparsities)}: ask for higher sparsities")
    present = {name: topology.count(mask) / mask.numel() for name, mask in before.items()}
    return Sensitivity(run.path.name, split, unpruned, tuple(points), batch_norm, present)
