"""Link prediction by loops over the paths of a graph, for tests: it knows neither matrices nor outputs from inputs."""

from itertools import product
from math import sqrt

import numpy as np


def neighbours(mask):
    """The neighbours of each node; nodes are ("out", i) and ("in", j)."""
    flat = mask.reshape(len(mask), -1).numpy()
    found = {("out", i): set() for i in range(flat.shape[0])} | {("in", j): set() for j in range(flat.shape[1])}
    for i, j in zip(*np.nonzero(flat), strict=True):
        found["out", int(i)].add(("in", int(j)))
        found["in", int(j)].add(("out", int(i)))
    return found


def naive_score(near, start, end, name):
    """The score of a place that has no link, from its paths of three links."""
    paths = [(z1, z2) for z1, z2 in product(near[start], near[end]) if z2 in near[z1]]
    community = {z for path in paths for z in path}
    inside = {z: len(near[z] & community) for z in community}
    outside = {z: len(near[z] - community - {start, end}) for z in community}
    part = {z: (1 + inside[z] if "ch2" in name else 1) / (1 + outside[z]) for z in community}
    if name.endswith("n"):
        return sum(part.values())
    return sum(sqrt(part[z1] * part[z2]) for z1, z2 in paths)
