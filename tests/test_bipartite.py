"""Predictions equal those of loops over the paths of a graph, and receptive fields those of the definition."""

import pytest
import torch

from granet import bipartite
from granet.bipartite import PREDICTORS, predictor, receptive_fields
from granet.pattern import parse
from path_oracle import naive_score, neighbours


@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (1, 6), (5, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_are_those_of_the_paths(name, density, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density
    near, scores = neighbours(mask), predictor(name)(mask)
    assert scores.shape == mask.shape and scores.dtype == torch.float32
    flat = scores.reshape(len(mask), -1)
    for i, j in (~mask).reshape(len(mask), -1).nonzero().tolist():
        assert float(flat[i, j]) == pytest.approx(naive_score(near, ("out", i), ("in", j), name))


def test_the_example_of_a_path():
    """One path of three links: each of the two nodes on it has one link inside of the community, none outside."""
    path = torch.tensor([[True, False], [True, True]])
    scores = {name: float(predictor(name)(path)[0, 1]) for name in PREDICTORS}
    assert scores == {"ch2-l3n": 4.0, "ch3-l3n": 2.0, "ch2-l3p": 2.0, "ch3-l3p": 1.0}


@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_that_are_equal_on_paper_are_equal(name):
    """A graph that looks the same from every place: thirds and sevenths, added in any order."""
    ring = torch.zeros(24, 24, dtype=torch.bool)
    for shift in (0, 1, 3, 7, 12):
        ring |= torch.eye(24, dtype=torch.bool).roll(shift, 1)
    scores = predictor(name)(ring)
    for shift in range(24):
        assert len(set(scores.diagonal(shift).tolist()) | set(scores.diagonal(shift - 24).tolist())) == 1


@pytest.mark.parametrize("name", PREDICTORS)
def test_without_links_or_without_places_nothing_is_predicted(name):
    assert not predictor(name)(torch.zeros(3, 4, dtype=torch.bool)).any()
    assert predictor(name)(torch.ones(3, 4, dtype=torch.bool)).isfinite().all()


def test_communities_of_many_nodes_are_looked_at_in_parts(monkeypatch):
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    whole = predictor("ch2-l3n")(mask)
    monkeypatch.setattr(bipartite, "_ROWS", 7)
    assert torch.equal(predictor("ch2-l3n")(mask), whole)


def test_an_unknown_predictor_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown predictor 'ch2-l3m': .* did you mean 'ch2-l3."):
        predictor("ch2-l3m")


SHAPES = {"wide": (6, 30), "tall": (30, 6), "kernels": (5, 3, 2, 2)}


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_receptive_fields_have_exact_counts_and_equal_degrees(r):
    counts = {"wide": 45, "tall": 46, "kernels": 13}
    first, again, other = (receptive_fields(counts, SHAPES, r, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(mask, again[name]) for name, mask in first.items())
    assert any(not torch.equal(mask, other[name]) for name, mask in first.items())
    for name, mask in first.items():
        flat = mask.reshape(len(mask), -1)
        degrees = flat.sum(dim=1 if flat.shape[0] < flat.shape[1] else 0)
        assert mask.shape == SHAPES[name] and int(flat.sum()) == counts[name]
        assert int(degrees.max() - degrees.min()) <= 1


def test_without_randomness_links_are_the_nearest_along_the_ring():
    mask = receptive_fields({"a": 12}, {"a": (4, 12)}, 0.0, torch.Generator())["a"]
    assert mask.nonzero().tolist() == [[i, j] for i in range(4) for j in sorted((3 * i + d) % 12 for d in (-1, 0, 1))]


def test_a_link_is_as_likely_as_its_distance_says():
    """With r = 1/3 a link at a distance of 1 is 4 times, and one of 2 is 9 times less likely than one of 0."""
    rng, seen = torch.Generator().manual_seed(0), [0, 0, 0]
    for _ in range(1000):
        place = int(receptive_fields({"a": 1}, {"a": (1, 5)}, 1 / 3, rng)["a"].nonzero()[0, 1])
        seen[min(place, 5 - place)] += 1
    expected = [1000 * share / (1 + 2 / 4 + 2 / 9) for share in (1, 2 / 4, 2 / 9)]
    assert seen == pytest.approx(expected, abs=50)  # three standard deviations


def test_receptive_fields_refuse_a_pattern():
    shape = parse("2:4").shape((8, 8))
    with pytest.raises(ValueError, match=r"no pattern, and 'a' has to"):
        receptive_fields({"a": 16}, {"a": shape}, 0.5, torch.Generator())
