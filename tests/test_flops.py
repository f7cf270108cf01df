import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from granet.distribution import erk
from granet.flops import count
from granet.train.models import MODELS

SIDES = {"digits-cnn": 8, "fashion-cnn": 28, "mlp": 28, "resnet18": 224, "resnet50": 224}


def meta_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        side = SIDES.get(name, 32)
        return MODELS[name](10 if side < 224 else 1000, 3), torch.empty(1, 3, side, side)


@pytest.mark.parametrize("name", MODELS)
def test_dense_total_is_that_of_torch(name):
    model, x = meta_model(name)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    flops = count(model, x)
    assert flops.inference() == counter.get_total_flops()
    assert {layer.name for layer in flops.per_layer()} == {n for n, p in model.named_parameters() if p.ndim > 1}


def test_resnet50_has_the_published_flops():
    model, x = meta_model("resnet50")
    flops = count(model, x)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    assert flops.inference() == pytest.approx(8.18e9, rel=1e-3)
    for density, published in {0.5: 0.714, 0.2: 0.414, 0.1: 0.242, 0.05: 0.122, 0.035: 0.085}.items():
        assert flops.inference(erk(shapes, density)) / flops.inference() == pytest.approx(published, abs=5e-4)
    # authors' own number for ERK at 50 %
    assert flops.inference(erk(shapes, 0.5)) == pytest.approx(5_844_558_336, rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "shape", "uses"),
    [
        (nn.Linear(5, 7), (3, 5), 3),
        (nn.Linear(5, 7), (3, 4, 5), 12),
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 8),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), 2 * 25),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 9),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (1, 4, 5, 5), 1),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25),  # once per place of the input
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 5),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_weight_counts_once_per_place(layer, shape, uses):
    flops = count(layer, torch.ones(shape))
    assert flops.dense["weight"] == 2 * uses * layer.weight.numel()
    assert flops.inference({"weight": 1}) == 2 * uses


class Reuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.twice = nn.Linear(4, 4)
        self.functional = nn.Parameter(torch.ones(4, 3, 2))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens):
        x = self.twice(self.twice(self.embedding(tokens)))
        return self.head(x), torch.einsum("bte,efg->btfg", x, self.functional)


def test_shared_tied_functional_and_unused_weights():
    flops = count(Reuse(), torch.zeros(2, 5, dtype=torch.long))
    assert {name: n for name, n in flops.dense.items() if n} == {
        "twice.weight": 2 * 2 * 10 * 16,
        "embedding.weight": 2 * 10 * 44,  # as the head; looking up costs nothing
        "functional": 2 * 10 * 24,
    }


def test_attention_projections_count_without_the_attention():
    query, memory = torch.ones(2, 7, 8), torch.ones(2, 5, 8)
    flops = count(nn.MultiheadAttention(8, 2, batch_first=True), (query, memory, memory))
    assert flops.dense["in_proj_weight"] == 2 * 64 * 2 * (7 + 5 + 5)
    assert flops.dense["out_proj.weight"] == 2 * 64 * 2 * 7


def test_recurrent_layers_count_every_time_step():
    flops = count(nn.LSTM(3, 5), torch.ones(7, 2, 3))
    assert flops.dense["weight_ih_l0"] == 2 * 7 * 2 * 60
    assert flops.dense["weight_hh_l0"] == 2 * 7 * 2 * 100


class LooksAtValues(nn.Sequential):
    def forward(self, x, scale=1):
        return super().forward(x) * scale if x.sum() > 0 else x


def test_a_model_that_looks_at_values_is_counted_where_it_is_and_left_alone():
    model = LooksAtValues(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flops = count(model, {"x": torch.ones(2, 3, 8, 8), "scale": 2})
    assert flops.dense["0.weight"] == 2 * 2 * 36 * 108
    assert flops.dense["3.weight"] == 2 * 2 * 288
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_transformer_gives_the_same_on_both_roads():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.ones(2, 7, 8)
    assert count(LooksAtValues(layer), x).inference() == count(layer, x).inference() == 2 * 14 * (4 * 64 + 2 * 128)


def test_training_step_takes_masks_or_counts():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    flops = count(model, torch.ones(4, 10))
    mask = torch.zeros(20, 10, dtype=torch.bool)
    mask[:2, :5] = True
    f_s, f_d = 2 * 4 * (10 + 100), 2 * 4 * (200 + 100)
    for active in ({"0.weight": mask}, {"0.weight": 10}):
        assert flops.inference(active) == f_s
        assert flops.training_step(active) == 3 * f_s
        assert flops.training_step(active, dense_gradient=True) == 2 * f_s + f_d
    rows = flops.per_layer({"0.weight": 10})
    assert [(row.name, row.active, row.total, row.flops) for row in rows] == [
        ("0.weight", 10, 200, 80),
        ("2.weight", 100, 100, 800),
    ]


def test_sparse_flops_are_the_products_with_active_weights():
    """Against a count, weight by weight and place by place, of a grouped convolution."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    mask = torch.rand(layer.weight.shape) < 0.3
    products = 0
    for _ in range(3 * 4):  # 3 x 4 places of a 7 x 9 image
        for out_channel in range(6):
            for weight in mask[out_channel].flatten().tolist():
                products += weight
    assert count(layer, torch.ones(1, 4, 7, 9)).inference({"weight": mask}) == pytest.approx(2 * products)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        ({"0.wieght": 3}, "did you mean '0.weight'"),
        ({"0.weight": 201}, "has 200 weights"),
        ({"0.weight": -1}, "has 200 weights"),
        ({"0.weight": torch.ones(10, 20)}, "has shape"),
    ],
)
def test_what_does_not_fit_is_refused(active, message):
    flops = count(nn.Sequential(nn.Linear(10, 20)), torch.ones(1, 10))
    with pytest.raises(ValueError, match=message):
        flops.inference(active)
