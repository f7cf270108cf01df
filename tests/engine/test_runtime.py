"""The module that a packed graph becomes: its results have the strides of the dense model, and threads may share it."""

import copy
import pickle

import torch
from small_models import close, in_threads, sparse, wide
from torch import nn

from granet.engine import inference


def test_inputs_of_other_strides_keep_the_strides_of_the_output(always):
    model, x = sparse(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())), torch.randn(2, 8, 6, 6)
    fast = inference.compile(model, x)
    for inputs in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        close(fast(inputs), model(inputs).detach())
        assert fast(inputs).stride() == model(inputs).stride()


def test_threads_share_a_compiled_model_and_copies_work():
    model = wide()
    inputs = [torch.randn(1, 192, 28, 28) for _ in range(3)]
    fast = inference.compile(model, inputs[0])
    expected = [model(x).detach() for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.allclose(fast(inputs[i]), expected[i], atol=1e-4):
                wrong.append(i)

    in_threads(work, 3)
    assert not wrong
    torch.testing.assert_close(copy.deepcopy(fast)(inputs[0]), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(inputs[0]), expected[0], atol=1e-4, rtol=1e-4)
