"""Layers as bipartite graphs: which links they are likely to grow, and which they start with.

A layer has a node for each output, a node for each input, and a link for each active weight. Each position of a kernel
counts as an input of its own.

*Link prediction* judges by the links alone (Cannistraci-Hebb theory). An output and an input are likely to be linked if
many paths of three links lead from one to the other, and the more so if the two nodes in the middle of a path, which
belong to the *local community* of the place, keep to themselves. With `i` the number of links that such a node has to
nodes of the community, and `e` the number of its links that leave the community, its own link to an end of the path not
counted:

    CH3-L3p   sum over paths of 1 / sqrt((1 + e1) (1 + e2))                         CHT (Zhang et al., ICLR 2024)
    CH2-L3p   sum over paths of sqrt((1 + i1) (1 + i2)) / sqrt((1 + e1) (1 + e2))
    CH2-L3n   sum over nodes of (1 + i) / (1 + e)                                   CHTs (Zhang et al. 2025)
    CH3-L3n   sum over nodes of 1 / (1 + e)

Sums over nodes are four products of matrices; those over paths need a product for each output.

*Receptive fields* are links between nodes that are near each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from granet import distribution, topology
from granet.criterion import Layer, own_values
from granet.names import unknown

_ROWS = 1024  # nodes whose communities are looked at together


def predictor(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`, which gives each place of a mask its score.

    >>> path = torch.tensor([[True, False], [True, True]])  # three links, from the first output to the second input
    >>> predictor("ch2-l3n")(path)[0, 1], predictor("ch3-l3p")(path)[0, 1]
    (tensor(4.), tensor(1.))

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in PREDICTORS:
        raise ValueError(unknown("predictor", name, PREDICTORS))
    return PREDICTORS[name]


def over_nodes(mask: Tensor, *, internal: bool) -> Tensor:
    """Scores of all places, each a sum over the nodes of its local community (L3n).

    They are computed in float64, so that scores that are equal on paper are equal when they are rounded to float32.

    Args:
        mask: the links, of shape (outputs, inputs, ...).
        internal: whether links inside of the community count (CH2), or only those that leave it (CH3).

    Returns:
        Scores in float32, of the mask's shape, zero where no path leads. Scores of links themselves mean nothing.
    """
    graph = _graph(mask)
    scores = _among_outputs(graph, internal) + _among_outputs(graph.T, internal).T
    return scores.float().view(mask.shape)


def over_paths(mask: Tensor, *, internal: bool) -> Tensor:
    """Scores of all places, each a sum over the paths of three links that lead to it (L3p); else as `over_nodes`."""
    graph = _graph(mask)
    outputs = _worth(graph @ graph.T, graph.sum(1), internal).sqrt()
    inputs = _worth(graph.T @ graph, graph.sum(0), internal).sqrt()
    scores = torch.zeros_like(graph)
    for output, links in enumerate(graph):  # a path leads over an input and another output to the place
        over = links.nonzero().squeeze(1)
        scores[output] = outputs[output] @ (graph[:, over] @ inputs[:, over].T * graph)
    return scores.float().view(mask.shape)


def _graph(mask: Tensor) -> Tensor:
    """The adjacency matrix, outputs by inputs."""
    return mask.reshape(len(mask), -1).double()


def _among_outputs(graph: Tensor, internal: bool) -> Tensor:
    """The part of the sums over nodes that comes from outputs, which link to the place's input."""
    degrees = graph.sum(1)
    return torch.cat([_worth(some @ graph.T, degrees, internal) @ graph for some in graph.split(_ROWS)])


def _worth(common: Tensor, degrees: Tensor, internal: bool) -> Tensor:
    """What nodes are worth in the communities of places, without the square root that paths take.

    Args:
        common: how many neighbours each node shares with the end of the path that is on its own side: the node's links
            inside of the community. Without any it does not belong to it, and is worth nothing.
        degrees: how many neighbours each node has.
        internal: whether the links inside count.
    """
    external = (degrees - common - 1).clamp(min=0)  # it is below zero only where the place is a link
    return (1 + common if internal else 1) * (common > 0) / (1 + external)


PREDICTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "ch2-l3n": lambda mask: over_nodes(mask, internal=True),
    "ch3-l3n": lambda mask: over_nodes(mask, internal=False),
    "ch2-l3p": lambda mask: over_paths(mask, internal=True),
    "ch3-l3p": lambda mask: over_paths(mask, internal=False),
}


def receptive_fields(
    counts: Mapping[str, int], shapes: Mapping[str, Sequence[int]], randomness: float, rng: torch.Generator
) -> dict[str, Tensor]:
    """Masks of links between nodes that are near each other (bipartite receptive fields, BRF, Zhang et al. 2025).

    Of outputs and inputs, those that are fewer stand at equal distances along the ring of the others, and have equally
    many links, or one more. A link at a distance d is drawn with a probability that falls like
    `(1 + d) ** -((1 - r) / r)`. Masks are the same for every device and number of ranks.

    Args:
        counts: the number of links of each layer.
        shapes: the shape of each layer.
        randomness: r, from 0, where all links are the nearest ones, to 1, where the distance does not matter.
        rng: the random generator of the topology.

    Raises:
        ValueError: a layer has to obey an N:M pattern.
    """
    masks = {}
    for name, shape in shapes.items():
        if distribution.capacity(shape) < prod(shape):
            raise ValueError(f"receptive fields obey no pattern, and {name!r} has to: let it start at random places")
        outputs, inputs = shape[0], prod(shape[1:])
        few, many = sorted((outputs, inputs))
        centres = torch.arange(few, device="cpu").unsqueeze(1) * many // few
        distance = (torch.arange(many, device="cpu") - centres).abs()
        distance = torch.minimum(distance, many - distance).float()
        near = topology.draw(1 / (1 + distance), rng, (1 - randomness) / randomness) if randomness else -distance
        more = topology.grow_random(torch.zeros(few, dtype=torch.bool, device="cpu"), counts[name] % few, rng)
        links = topology.top_of_rows(Layer(near), own_values, counts[name] // few + more.int(), near < float("inf"))
        masks[name] = (links if outputs == few else links.T).reshape(tuple(shape))
    return masks
