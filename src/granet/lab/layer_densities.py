"""From the sensitivity of layers to a recipe: layers that lose little become sparser than those that lose much."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import numpy as np

from granet import files
from granet.lab.sensitivity import Sensitivity
from granet.names import unknown
from granet.train.recipe import Recipe, validate

METHODS = {"static": {}, "rigl": {"end": "75%", "interval": "1ep"}}  # those that keep the number of weights of a layer
HALVINGS = 60


def densities(found: Sensitivity, sparsity: float) -> dict[str, float]:
    """Returns a density for each layer, so that each loses equally much accuracy when it is pruned to it alone.

    The loss is what was measured, interpolated between measurements over the logarithm of the density. It is chosen so
    that the layers have the given sparsity together, or less where no layer loses anything at that.

    Args:
        found: what was measured.
        sparsity: the share of inactive weights of all these layers together.

    Raises:
        ValueError: if it is impossible, or beyond the measurements.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be above 0 and below 1")
    curves: dict[str, tuple[list[float], list[float]]] = {}
    sizes: dict[str, int] = {}
    for name, density in found.present.items():
        points = [point for point in found.points if point.layer == name]
        if not points:  # sparser than all that was measured
            continue
        sizes[name] = points[0].total
        losses = accumulate((max(0.0, found.accuracy - point.accuracy) for point in points), max)
        curves[name] = [density, *(p.active / p.total for p in points)], [0.0, *losses]

    def at(loss: float) -> dict[str, float]:
        return {name: _least_density(*curve, loss) for name, curve in curves.items()}

    def active(loss: float) -> float:
        return sum(sizes[name] * density for name, density in at(loss).items())

    wanted, low, high = (1 - sparsity) * sum(sizes.values()), 0.0, 1.0
    if active(high) > wanted:
        least = 1 - active(high) / sum(sizes.values())
        raise ValueError(
            f"{sparsity:g} is beyond what was measured: with every layer at its highest sparsity the network has "
            f"{least:.3f}; measure higher ones with --sparsities"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if active(middle) > wanted else (low, middle)
    return at(high) | {name: found.present[name] for name in found.present if name not in curves}


def recipe_with(recipe: Recipe, found: Sensitivity, sparsity: float, method: str, name: str) -> Recipe:
    """Returns a recipe that differs in its method, which shares the active weights among layers by their sensitivity.

    Args:
        recipe: that of the run whose layers were pruned.
        found: what was measured.
        sparsity: the sparsity to train with.
        method: a key of `METHODS`.
        name: the name of the recipe.

    Raises:
        ValueError: if the method is another one, or the sparsity is impossible.
    """
    if method not in METHODS:
        raise ValueError(unknown("method with a fixed number of weights in each layer", method, METHODS))
    shares = ", ".join(f"{layer}={density:.4g}" for layer, density in densities(found, sparsity).items())
    section = {"name": method, "sparsity": sparsity, "distribution": shares} | METHODS[method]
    train = recipe.model_dump()["train"] | {"max_steps": None, "evaluate_images": None}  # those are for a quick look
    return validate(recipe.model_dump() | {"name": name, "method": section, "train": train}, source=name)


def write(path: Path, recipe: Recipe, found: Sensitivity) -> None:
    """Writes a recipe of `recipe_with` to a file that `granet train` takes."""
    about = f"# Densities by layer, from the sensitivity of {found.name} on its {found.split} images.\n"
    files.replace(path, about + recipe.to_yaml(defaults=False))


def _least_density(density: list[float], loss: list[float], allowed: float) -> float:
    """Returns the least density at which a layer loses no more than is allowed; both lists run to the sparsest."""
    last = max(i for i, value in enumerate(loss) if value <= allowed)
    if last == len(loss) - 1:
        return density[-1]
    share = (allowed - loss[last]) / (loss[last + 1] - loss[last])
    return math.exp(float(np.interp(share, [0, 1], [math.log(density[last]), math.log(density[last + 1])])))
