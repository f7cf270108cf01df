"""Compiled models that a file cannot hold are refused with the reason, before anything is written."""

import collections

import pytest
import torch
from small_models import mlp, sparse
from torch import nn

import granet
from granet.engine.saved.whole import NotSavable


class Around(nn.Module):
    """A model whose forward function is given."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.run = mlp(), forward
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0

    def forward(self, x):
        return self.run(self, x)


def branch(self, x):
    return self.body(x) if x.sum() > 0 else -self.body(x)


def counting(self, x):
    self.calls += 1
    return self.body(x)


def remembering(self, x):
    self.seen += x.sum()
    return self.body(x)


def in_place(self, x):
    return self.body(x.add_(1))


def drawing(self, x):
    return self.body(x) + torch.rand(8)


def sorting(self, x):
    return self.body(x).sort().values


def printing(self, x):
    torch._dynamo.graph_break()
    return self.body(x)


Pair = collections.namedtuple("Pair", "first second")


def naming(self, x):
    return Pair(self.body(x), x + 1)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branch, "Data-dependent branching|data-dependent"),
        (printing, "graph_break|Graph break|graph break"),
        (counting, "changes its inputs, buffers or attributes"),
        (remembering, "changes its inputs, buffers or attributes"),
        (in_place, "changes its inputs, buffers or attributes"),
        (drawing, r"it calls aten.rand.default, which is none of the operators that a file can hold"),
        (naming, "it takes or returns a Pair, and a file holds tensors, lists"),
        (sorting, r"it calls aten.sort.default, which is none of the operators"),
    ],
)
def test_what_a_file_cannot_hold(always, tmp_path, forward, message):
    fast = granet.compile(sparse(Around(forward)), torch.rand(2, 16))
    assert fast.report().chosen == "sparse"
    (tmp_path / "fast.granet").write_text("an earlier file")
    with pytest.raises(NotSavable, match=message) as error:
        fast.save(tmp_path / "fast.granet")
    assert "for inputs 2x16, the model cannot be saved" in str(error.value)
    assert (tmp_path / "fast.granet").read_text() == "an earlier file" and len(list(tmp_path.iterdir())) == 1


def test_a_dense_model_is_not_saved(tmp_path):
    fast = granet.compile(nn.Sequential(nn.ReLU()).eval(), torch.rand(2, 16))
    with pytest.raises(NotSavable, match=r"there is nothing to save: the dense model runs .*torch.export saves dense"):
        fast.save(tmp_path / "fast.granet")
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_mode_is_not_saved(always, tmp_path):
    fast = granet.compile(mlp(), torch.rand(2, 16))
    fast.model.train()
    with pytest.raises(NotSavable, match=r"the model is in training mode, in which it runs dense: call eval\(\) first"):
        fast.save(tmp_path / "fast.granet")
    fast.model.eval()
    fast.save(tmp_path / "fast.granet")
    assert len(list(tmp_path.iterdir())) == 1
