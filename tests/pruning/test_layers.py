import pytest
import torch
from torch import nn
from torch.nn import functional as F

from granet.pruning import layers


def target_of(module):
    (found,) = layers.targets(nn.Sequential(module), None, (), None, True)
    return found


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"stride": 2, "padding": (0, 2), "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "padding_mode": "circular", "padding": (0, 1)},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_is_a_product_of_its_matrix_and_tokens(settings):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, **({"kernel_size": 3} | settings), bias=False)
    x = torch.randn(2, 4, 9, 8)
    outputs = layers.tokens(module, x) @ target_of(module).matrix().t()
    expected = module(x)
    torch.testing.assert_close(outputs, expected.movedim(1, -1).flatten(0, 2))
    assert torch.equal(layers.tokens(module, x[0]), layers.tokens(module, x[:1]))


@pytest.mark.parametrize(
    "module", [nn.Linear(5, 7), nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 3), nn.ConvTranspose2d(3, 4, 2)]
)
def test_a_matrix_goes_back_to_its_place(module):
    (target,) = layers.targets(module, None, (), None, False)
    before = module.weight.detach().clone()
    matrix = target.matrix()
    assert matrix.shape == (len(before), target.columns)
    target.write(matrix * 2)
    assert torch.equal(module.weight, before * 2)


def test_gpt2s_layers_have_inputs_first():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason='needs pip install "granet[huggingface]"')
    module = pytorch_utils.Conv1D(6, 4)  # 4 inputs, 6 outputs
    target = target_of(module)
    assert target.shape == (6, 4) and target.columns == 4
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(layers.tokens(module, x) @ target.matrix().t(), module(x).flatten(0, 1))
    target.write(2 * target.matrix())
    torch.testing.assert_close(layers.tokens(module, x) @ target.matrix().t(), module(x).flatten(0, 1))


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_means_over_all_tokens(diagonal):
    torch.manual_seed(0)
    module = nn.Linear(6, 3).to(torch.bfloat16)
    model, x = nn.Sequential(module), torch.randn(4, 5, 6).to(torch.bfloat16)
    target = layers.targets(model, None, (), None, True)
    with layers.observed(target, diagonal) as moments:
        model(x[:1])
        model(x[1:])
    model(x)  # no longer observed
    flat = x.flatten(0, 1).float()
    expected = flat.t() @ flat / 20
    found = moments["0.weight"]
    assert found.count == 20 and found.mean().dtype == torch.float32
    torch.testing.assert_close(found.mean(), expected.diagonal() if diagonal else expected)


def test_the_error_is_that_of_the_outputs():
    torch.manual_seed(0)
    dense, x = torch.randn(5, 8), torch.randn(100, 8)
    pruned = dense * (torch.rand(5, 8) < 0.5)
    expected = ((dense - pruned) @ x.t()).norm() / (dense @ x.t()).norm()
    assert layers.error(dense, pruned, x.t() @ x / 100) == pytest.approx(float(expected), rel=1e-5)
    assert layers.error(dense, dense, x.t() @ x) == 0
    assert layers.error(dense * 0, dense * 0, x.t() @ x) == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def test_a_tied_weight_is_seen_wherever_it_is_used():
    model = Tied()
    found = layers.targets(model, None, (), None, True)
    assert [target.name for target in found] == ["a.weight"]
    with layers.observed(found) as moments:
        model(torch.randn(7, 4))
    assert moments["a.weight"].count == 14
