"""The findings of the paper on pruning plasticity, each with a criterion that is computed and a verdict.

A finding is put to curves (or to moments). It holds where their mean difference is above zero by two of its standard
errors over them, and three in four of those that differ by more than the noise are for it; it does not hold where the
mean is below zero by as much, or where three in four of a quorum are against it. The noise is two standard errors of
one difference: over seeds where there are several, pooled, else that of a difference of two accuracies on the test
images. Curves of one network share its accidents, so the standard error of their mean is rather too small: more seeds
make it sound.
"""

import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from granet.lab.plasticity.table import Row, Table, points

FREE = 0.5  # points that a nearly free pruning may cost
MAJORITY = 0.75  # of the votes, for a finding or against it
QUORUM = 0.5  # of the voters, for a verdict by the votes alone

Votes = Mapping[Hashable, Mapping[int, float]]  # voter to seed to difference in points


@dataclass(frozen=True)
class Finding:
    """What the paper found, how that is tested, and what came out."""

    claim: str
    criterion: str
    verdict: str  # "holds", "does not hold" or "undecided"
    figures: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}. {self.figures} Criterion: {self.criterion}"


def findings(table: Table) -> list[Finding]:
    """Returns the findings of the paper, judged by the table.

    Raises:
        ValueError: the table has no rows.
    """
    if not table.rows:
        raise ValueError("there are no rows to judge by: no cell of the study is made yet")
    return [
        _falls(table),
        _second_is_sharper(table),
        _mildest_is_free(table),
        _regeneration_helps_most(table, "restore", "Regeneration helps most at high pruning rates"),
        _regeneration_helps_most(table, "equal", "The same at equal density (not in the paper)"),
        _positive_at_high_rate(table),
        _sparse_gain(table),
    ]


def _judge(table: Table, claim: str, criterion: str, votes: Votes, unit: str, note: str = "") -> Finding:
    """Returns the finding with the verdict of the votes."""
    if not votes:
        return Finding(claim, criterion, "undecided", "The study has nothing to judge this by.")
    noise = _noise(table, votes)
    means = [statistics.fmean(by_seed.values()) for by_seed in votes.values()]
    yes, no = sum(mean > noise for mean in means), sum(mean < -noise for mean in means)
    cast, mean = yes + no, statistics.fmean(means)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else noise / 2
    if mean > 2 * error and yes >= MAJORITY * cast:
        verdict = "holds"
    elif mean < -2 * error or (cast >= QUORUM * len(means) and no >= MAJORITY * cast):
        verdict = "does not hold"
    else:
        verdict = "undecided"
    figures = (
        f"Mean {points(mean)} ± {error:.2f}, from {points(min(means))} to {points(max(means))}; {yes} of {len(means)} "
        f"{unit} for, {no} against, {len(means) - cast} within the noise of {noise:.2f} points.{note}"
    )
    return Finding(claim, criterion, verdict, figures)


def _noise(table: Table, votes: Votes) -> float:
    """Returns two standard errors of a difference, in points."""
    several = [list(by_seed.values()) for by_seed in votes.values() if len(by_seed) > 1]
    if several:
        variance = statistics.fmean(statistics.variance(values) for values in several)
        return 2 * math.sqrt(variance / statistics.fmean(len(values) for values in several))
    accuracy = statistics.fmean(row.accuracy_before for row in table.rows)
    return 200 * math.sqrt(2 * accuracy * (1 - accuracy) / table.tested)


def _minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def _by_phase(table: Table, arm: str) -> dict[tuple, dict[int, dict[int, float]]]:
    """Returns the mean plasticity of each curve of an arm, by phase of the learning rate and seed."""
    found = table.per_seed("plasticity", lambda row: (row.curve, table.phase(row)), lambda row: row.arm == arm)
    curves: dict[tuple, dict[int, dict[int, float]]] = {}
    for (curve, phase), by_seed in found.items():
        curves.setdefault(curve, {})[phase] = by_seed
    return curves


def _falls_of(table: Table, arm: str = "none") -> dict[tuple, dict[int, float]]:
    """Returns by how many points plasticity falls from phase to phase, by curve and drop, by seed."""
    falls = {}
    for curve, phases in _by_phase(table, arm).items():
        for drop in range(1, len(table.drops) + 1):
            if drop in phases and drop - 1 in phases:
                falls[curve, drop] = _minus(phases[drop - 1], phases[drop])
    return {key: fall for key, fall in falls.items() if fall}


def _falls(table: Table) -> Finding:
    falls = _falls_of(table)
    by_drop = {
        drop: [statistics.fmean(fall.values()) for (_, at), fall in falls.items() if at == drop]
        for drop in range(1, len(table.drops) + 1)
    }
    note = "".join(f" Mean fall at drop {drop}: {statistics.fmean(v):.2f} points." for drop, v in by_drop.items() if v)
    return _judge(
        table,
        "Plasticity falls at every drop of the learning rate",
        "mean plasticity of the moments before a drop minus that of the moments after it, without regeneration; one "
        "vote for each pretrained sparsity, pruning rate and drop.",
        falls,
        "falls",
        note,
    )


def _second_is_sharper(table: Table) -> Finding:
    falls = _falls_of(table)
    votes = {
        curve: difference
        for curve in {curve for curve, _ in falls}
        if (curve, 1) in falls and (curve, 2) in falls and (difference := _minus(falls[curve, 2], falls[curve, 1]))
    }
    return _judge(
        table,
        "The fall is sharpest at the second drop",
        "fall at the second drop minus fall at the first; one vote for each pretrained sparsity and pruning rate.",
        votes,
        "curves",
    )


def _mildest_is_free(table: Table) -> Finding:
    rate = table.rates[0]

    def only(row: Row) -> bool:
        return row.rate == rate and row.arm == "none"

    votes = {}
    for measure in ("plasticity", "final_gap"):
        found = table.per_seed(measure, lambda row: (row.pretrained_sparsity, row.step), only)
        votes |= {(measure, *key): {seed: x + FREE for seed, x in seeds.items()} for key, seeds in found.items()}
    return _judge(
        table,
        f"A pruning rate of {rate:g} is nearly free",
        f"plasticity, and final gap, plus {FREE} points; one vote for each measure, pretrained sparsity and moment.",
        votes,
        "values",
    )


def _regeneration_helps_most(table: Table, arm: str, claim: str) -> Finding:
    criterion = (
        f"gain in plasticity of `{arm}` over `none`, at the higher half of the pruning rates minus at the lower half; "
        "one vote for each pretrained sparsity and moment."
    )
    half = len(table.rates) // 2
    if arm not in table.arms or "none" not in table.arms or not half:
        return _judge(table, claim, criterion, {}, "moments")
    gains = table.gain("plasticity", arm, "none")
    votes: dict[tuple, dict[int, float]] = {}
    for sparsity, step, seed in {(sparsity, step, seed) for sparsity, _, step, seed in gains}:
        at = [gains.get((sparsity, rate, step, seed)) for rate in table.rates]
        if None not in at:
            votes.setdefault((sparsity, step), {})[seed] = statistics.fmean(at[-half:]) - statistics.fmean(at[:half])
    return _judge(table, claim, criterion, votes, "moments", f" Mean gain by rate: {_by_rate(table, gains)}.")


def _by_rate(table: Table, values: Mapping[tuple, float]) -> str:
    """Returns means by pruning rate, which is second in the keys, as text."""
    found = {rate: [x for key, x in values.items() if key[1] == rate] for rate in table.rates}
    return ", ".join(f"{points(statistics.fmean(xs))} at rate {rate:g}" for rate, xs in found.items() if xs)


def _positive_at_high_rate(table: Table) -> Finding:
    rates = table.rates[:-1] or table.rates
    votes = table.per_seed(
        "plasticity",
        lambda row: row.curve,
        lambda row: row.arm == "none" and table.phase(row) == 0 and row.rate in rates,
    )
    return _judge(
        table,
        "Plasticity is positive while the learning rate is high",
        "mean plasticity of the moments before the first drop, without regeneration; one vote for each pretrained "
        "sparsity and pruning rate but the highest.",
        votes if table.drops else {},
        "curves",
    )


def _sparse_gain(table: Table) -> Finding:
    rate = table.rates[0]
    votes = table.per_seed(
        "final_gap",
        lambda row: (row.pretrained_sparsity, row.step),
        lambda row: row.arm == "none" and row.rate == rate and row.pretrained_sparsity >= 0.9,
    )
    return _judge(
        table,
        "Extremely sparse networks gain from mild pruning in the end",
        f"final gap at pruning rate {rate:g} of networks of sparsity 0.9 and more, without regeneration; one vote for "
        "each pretrained sparsity and moment.",
        votes,
        "moments",
    )


def paragraph(table: Table) -> str:
    """Returns what the numbers say, in a few sentences: where plasticity peaks, falls, and what regeneration adds."""
    if not table.rows:
        return "No cell of the study is made yet."
    arm = "none" if "none" in table.arms else table.arms[0]
    moments = sorted({row.epoch for row in table.rows})
    by_moment = {at: table.mean("plasticity", epoch=at, arm=arm) for at in moments}
    by_moment = {at: mean for at, mean in by_moment.items() if mean is not None}
    top = max(by_moment, key=by_moment.get)
    best = max((row for row in table.rows), key=lambda row: row.plasticity)
    said = [f"{table.missing} cells of the study are missing; this is what the others say."] if table.missing else []
    said.append(
        f"In the arm `{arm}`, averaged over pretrained sparsities and pruning rates, plasticity is highest at epoch "
        f"{top:g} of {table.epochs} ({points(by_moment[top])} points); the highest single value is "
        f"{points(100 * best.plasticity)} points (epoch {best.epoch:g}, pretrained sparsity "
        f"{best.pretrained_sparsity:g}, rate {best.rate:g}, arm `{best.arm}`)."
    )
    falls = {
        (drop, curve[1], curve, seed): -fall
        for (curve, drop), by_seed in _falls_of(table, arm).items()
        for seed, fall in by_seed.items()
    }
    for drop, epoch in enumerate(table.drops, 1):
        if here := {key: x for key, x in falls.items() if key[0] == drop}:
            said.append(
                f"From the moments before the drop at epoch {epoch:g} to those after it, plasticity changes by "
                f"{_by_rate(table, here)}."
            )
    for other in table.arms:
        for measure, name in (("plasticity", "plasticity"), ("final_gap", "the final gap")):
            if other != arm and (gains := table.gain(measure, other, arm)):
                said.append(f"Against `{arm}`, the arm `{other}` changes {name} by {_by_rate(table, gains)}.")
    return " ".join(said)
