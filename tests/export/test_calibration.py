import pytest
import torch

from granet.export.calibration import examples
from granet.export.network import Network


def test_the_arguments_of_all_batches_are_taken(model, x):
    network = Network(model, x)
    found = examples(network, [(x, torch.arange(4)), (x[:2], torch.arange(2))], "int8")
    assert [len(batch) for (batch,) in found] == [4, 2]
    assert len(examples(network, x, "int8")) == 1
    assert examples(network, None, "float32") == []


def test_what_does_not_fit(model, x):
    network = Network(model, x)
    for nothing in (None, []):
        with pytest.raises(ValueError, match="needs calibration="):
            examples(network, nothing, "int8")
    with pytest.raises(ValueError, match="not for 'float32'"):
        examples(network, [x], "float32")
    with pytest.raises(ValueError, match="NaN"):
        examples(network, [x * float("nan")], "int8")
    with pytest.raises(ValueError, match="first axis"):
        examples(network, [x[:, :1]], "int8")
