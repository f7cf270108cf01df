import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from granet.pruning.perplexity import perplexity, pieces, split


class Bigrams(nn.Module):
    """Scores of the next token from a table."""

    def __init__(self, size):
        super().__init__()
        self.table = nn.Embedding(size, size)

    def forward(self, ids):
        return self.table(ids)


def test_perplexity_is_that_of_each_token_that_follows_another(text):
    torch.manual_seed(0)
    model = Bigrams(256).train()
    texts = [text[:50].view(1, -1), text[100:160].view(2, -1)]
    losses, table = [], model.table.weight.detach()
    for row in [text[:50], text[100:130], text[130:160]]:
        losses += [float(F.cross_entropy(table[a], b)) for a, b in pairwise(row)]
    assert perplexity(model, texts) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert model.training
    nn.init.zeros_(model.table.weight)
    assert perplexity(model, texts) == pytest.approx(256)
    nn.init.constant_(model.table.weight, float("nan"))
    assert math.isnan(perplexity(model, texts))


@pytest.mark.parametrize(("size", "length", "most"), [(1000, 10, 7), (1000, 10, 500), (999, 10, 99), (10, 10, 3)])
def test_pieces_are_spread_over_a_text_and_do_not_overlap(size, length, most):
    found = pieces(torch.arange(size), length, most)
    assert len(found) == min(most, size // length)
    assert all(piece.shape == (1, length) for piece in found)
    assert len({int(i) for piece in found for i in piece.flatten()}) == len(found) * length


def test_the_end_of_a_text_is_held_out():
    learn, measure = split(torch.arange(1000), 20, 100)
    assert (len(learn), len(measure)) == (45, 5)
    assert max(int(x.max()) for x in learn) < 900 <= min(int(x.min()) for x in measure)
    learn, measure = split(torch.arange(100), 50, 100)
    assert (len(learn), len(measure)) == (1, 1)
    with pytest.raises(ValueError, match="the text has 99 tokens, and at least 100 are needed"):
        split(torch.arange(99), 50, 100)
