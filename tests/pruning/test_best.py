import pytest
import torch

from granet.pattern import parse
from granet.pruning import best


@pytest.fixture
def scores():
    """Scores of which many are equal."""
    return torch.randint(5, (12, 24), generator=torch.Generator().manual_seed(0)).float()


def naive(scores, n):
    """The places of the n highest of a flat list, of equal ones the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    return [i in order for i in range(len(scores))]


@pytest.mark.parametrize("n", [0, 1, 77, 288])
def test_of_a_matrix(scores, n):
    mask = best.of_matrix(scores, n)
    assert mask.sum() == n
    assert mask.flatten().tolist() == naive(scores.flatten().tolist(), n)


@pytest.mark.parametrize("n", [0, 5, 100, 288])
def test_of_rows(scores, n):
    mask = best.of_rows(scores, n)
    assert mask.sum() == n
    for i, row in enumerate(scores.tolist()):
        assert mask[i].tolist() == naive(row, n // 12 + (i < n % 12))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3"])
def test_of_groups(scores, pattern):
    pattern = parse(pattern)
    mask = best.of_groups(scores, pattern)
    assert pattern.obeyed(mask) and mask.sum() == scores.numel() * pattern.n // pattern.m
    for chosen, group in zip(mask.view(-1, pattern.m), scores.view(-1, pattern.m), strict=True):
        assert chosen.tolist() == naive(group.tolist(), pattern.n)
