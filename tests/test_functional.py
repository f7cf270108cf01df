"""A module under several names, and weights that are tied: with other tensors, and untouched afterwards."""

import pytest
import torch
from torch import nn

import granet
from granet.functional import called_with
from granet.probe import Probe


class Twice(nn.Module):
    """A norm that stands under two names, and two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.tail = nn.Sequential(self.norm, self.a, nn.ReLU(), self.b, nn.Linear(8, 3))

    def forward(self, x):
        return self.tail(x)


def held(model):
    return [
        (path, leaf, tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]
    ]


def test_other_tensors_are_computed_with_everywhere():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(5, 8)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(called_with(model, tensors, x), model(x))
    changed = tensors | {"a.weight": torch.zeros(8, 8), "b.bias": torch.ones(8)}
    last = model.tail[-1]
    expected = last(torch.ones(8)).expand(5, 3)
    torch.testing.assert_close(called_with(model, changed, x), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: granet.flops.count(model, torch.ones(1, 8)),
        lambda model: Probe(model, [(torch.ones(4, 8), torch.zeros(4, dtype=torch.long))]).gradients(),
        lambda model: Probe(model, [], example=torch.ones(1, 8)).synaptic_flow(),
        lambda model: granet.Sparsifier(
            model,
            granet.GraSP(sparsity=0.5),
            probe=Probe(model, [(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))]),
        ),
    ],
    ids=["flops", "gradients", "synaptic flow", "GraSP"],
)
def test_a_model_looked_at_keeps_its_own_tensors(use):
    model = Twice()
    before = held(model)
    use(model)
    after = held(model)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(one[2] is other[2] for one, other in zip(before, after, strict=True))
