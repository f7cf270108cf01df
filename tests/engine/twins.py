"""A small network on the sparse kernels and its dense twin."""

import copy

import torch
from fuzz_training import same
from torch import nn

import granet
from granet.engine import ops


class Counted:
    """An accelerated network of two layers, its dense twin, and how often the sparse kernels were asked."""

    def __init__(self, monkeypatch, method=None):
        torch.manual_seed(0)
        self.fast = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.sparsifier = granet.Sparsifier(self.fast, method or granet.Static(sparsity=0.6))
        self.dense = copy.deepcopy(self.fast)
        self.x, self.sparse_calls = torch.randn(8, 16), 0
        self.plan = granet.accelerate(self.sparsifier, self.x)
        run = ops.conv

        def counting(*args, **kwargs):
            self.sparse_calls += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(ops, "conv", counting)

    def agree(self, *, sparse=True):
        """Raises AssertionError unless both give the same output, by sparse kernels or without."""
        self.sparse_calls = 0
        with torch.no_grad():
            same(self.fast(self.x), self.dense(self.x), "output")
        assert bool(self.sparse_calls) == sparse
