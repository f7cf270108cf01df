"""Criteria look at each weight by itself, in float32 at least."""

import pytest
import torch

from granet.criterion import Layer, gradient, magnitude, own_values


@pytest.mark.parametrize("criterion", [own_values, magnitude, gradient])
def test_a_criterion_of_parts_is_a_part_of_the_criterion(criterion):
    layer = Layer(torch.randn(6, 5, 3), torch.randn(6, 5, 3))
    parts = torch.cat([criterion(part) for part in layer.parts(7)])
    assert torch.equal(parts, criterion(layer).reshape(-1))


def test_half_precision_scores_are_float32_and_double_stays_double():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]:
        weight = torch.tensor([-1.5, 0.25], dtype=dtype)
        assert magnitude(Layer(weight)).dtype == gradient(Layer(weight, weight)).dtype == expected
        assert magnitude(Layer(weight)).tolist() == [1.5, 0.25]


def test_a_missing_gradient_is_an_error():
    with pytest.raises(ValueError, match="needs the dense gradient"):
        gradient(Layer(torch.ones(3)))


def test_flat_order_does_not_depend_on_the_memory_format():
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(Layer(weight.to(memory_format=torch.channels_last)).flat().weight, torch.arange(24.0))
