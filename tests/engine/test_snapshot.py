"""Compiling leaves the model as it was."""

import copy

import torch
from small_models import close, sparse
from torch import nn

from granet.engine import inference


class Cell(nn.Module):
    """Keeps its state, as streaming models do."""

    def __init__(self):
        super().__init__()
        self.i, self.r, self.h, self.seen = nn.Linear(8, 8), nn.Linear(8, 8), torch.zeros(2, 8), []

    def forward(self, x):
        self.h = torch.tanh(self.i(x) + self.r(self.h))
        self.seen.append(len(self.seen))
        return self.h


def test_state_on_the_module_is_followed_and_compiling_leaves_no_trace(always):
    model = sparse(Cell())
    start, random, twin = model.h, torch.get_rng_state(), copy.deepcopy(model)
    fast = inference.compile(model, torch.randn(2, 8))
    torch.set_rng_state(random)
    assert model.h is start and not start.any() and model.seen == []
    for _ in range(3):
        x = torch.randn(2, 8)
        close(fast(x), twin(x).detach())
        close(model.h, twin.h.detach())
        assert type(model.h) is torch.Tensor and model.seen == twin.seen
