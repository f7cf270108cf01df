"""Programs compute their segment with every kernel, layout and number of threads."""

import pytest
import torch
from fuzz_models import check_every_choice, network
from torch import nn

from granet.engine import ops
from granet.engine.capture import trace
from granet.engine.program import Program, kernel_choices
from granet.engine.runtime import build


@pytest.mark.parametrize(
    ("activation", "images", "size"), [(nn.ReLU(), 1, 37), (nn.ReLU6(), 3, 32), (nn.SiLU(), 17, 24)]
)
def test_every_kernel_and_layout_computes_the_model(activation, images, size):
    torch.manual_seed(0)
    check_every_choice(network(activation, 0.3), torch.randn(images, 3, size, size))


def test_any_number_of_threads_computes_the_same():
    torch.manual_seed(0)
    model, x, threads = network(nn.ReLU(), 0.3), torch.randn(2, 3, 64, 64), torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            check_every_choice(model, x)
    finally:
        torch.set_num_threads(threads)


class OneResidual(nn.Module):
    """Several 1x1 layers, each adding the same residual to what the one before gave."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(8, 32, 3, padding=1)
        self.layer = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        residual, y = self.first(x), self.second(x)
        for _ in range(3):
            y = torch.relu(self.layer(y) + residual)
        return (y,)


def test_a_residual_is_kept_until_the_last_layer_has_added_it():
    torch.manual_seed(0)
    model = OneResidual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) < 0.2 if p.ndim > 1 else 1.0)
    check_every_choice(model, torch.randn(3, 8, 16, 16))


@pytest.mark.parametrize("images", [1, 2, 16])
@pytest.mark.parametrize(
    ("kernel", "size", "padding", "stride"),
    [(3, 3, 0, 1), (5, 5, 0, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2), (1, 1, 0, 1), (1, 1, 1, 3), (1, 2, 0, 2)],
)
def test_an_output_of_one_position(kernel, size, padding, stride, images):
    """Every way to compute the last convolution of a LeNet, say, whatever lies around its only position."""
    model = nn.Sequential(nn.Conv2d(16, 32, kernel, stride, padding)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.2)
    x = torch.randn(images, 16, size, size)
    ((part, args),) = trace(model, x)
    stages, _ = part.stages(args)
    for batch in (1, ops.cpu()[0]):
        for pick in kernel_choices(stages.segments[0].layers[0], batch):
            programs = {s: Program(s, lambda layer, pick=pick: pick, batch) for s in stages.segments}
            with torch.no_grad():
                (found,) = build(stages, programs)(*args)
                torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)


def test_blocks_are_offered_where_output_channels_share_their_positions():
    def kinds(mask):
        model = nn.Sequential(nn.Conv2d(16, 32, 3)).eval()
        with torch.no_grad():
            model[0].weight.mul_(mask)
        ((part, args),) = trace(model, torch.randn(1, 16, 8, 8))
        stages, _ = part.stages(args)
        return {choice.kind for choice in kernel_choices(stages.segments[0].layers[0], 1)}

    unstructured = torch.rand(32, 16, 3, 3) < 0.1
    patterned = (torch.rand(8, 16, 3, 3) < 0.1).repeat_interleave(4, dim=0)
    assert kinds(unstructured) == {"sparse"}
    assert kinds(patterned) == {"sparse", "block"}
    assert kinds(torch.ones(32, 16, 3, 3)) == {"sparse", "block"}
    assert kinds(torch.zeros(32, 16, 3, 3)) == {"sparse"}
