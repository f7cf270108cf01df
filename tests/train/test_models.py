import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granet.train.data import epoch_batches, load
from granet.train.models import MODELS, build

# weights of the tensors with two or more dimensions, which are those that can be sparse
WEIGHTS = {
    ("resnet20", 10): 270_896,
    ("vgg19", 10): 20_024_000,
    ("vgg19", 100): 20_070_080,
    ("resnet50", 1000): 25_502_912,
    ("resnet18", 1000): 11_678_912,
    ("resnet18-cifar", 10): 11_164_352,
    ("resnet50-cifar", 10): 23_467_712,
}


@pytest.mark.parametrize(("name", "classes"), WEIGHTS)
def test_weights_are_those_of_the_literature(name, classes):
    with torch.device("meta"):
        model = build(name, classes=classes, in_channels=3)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == WEIGHTS[name, classes]


def test_small_networks_have_the_size_they_claim():
    sizes = {name: sum(p.numel() for p in MODELS[name](10, 1).parameters() if p.ndim > 1) for name in MODELS}
    assert 50_000 < sizes["digits-cnn"] < 100_000
    assert 200_000 < sizes["fashion-cnn"] < 400_000
    assert sizes["mlp"] == 784 * 300 + 300 * 100 + 100 * 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_images_become_a_number_for_each_class(name, channels, side):
    with torch.device("meta"):
        assert MODELS[name](7, channels)(torch.empty(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize(("name", "sizes"), [("resnet20", (32, 16, 8)), ("resnet50-cifar", (32, 16, 8, 4))])
def test_stages_halve_the_image(name, sizes):
    with torch.device("meta"):
        x, model = torch.empty(1, 3, 32, 32), MODELS[name](10, 3)
    x = model.stem(x)
    for stage, size in enumerate(sizes, 1):
        x = model.get_submodule(f"stage{stage}")(x)
        assert x.shape[2:] == (size, size)


def test_resnet50_strides_in_the_3x3_convolution():
    with torch.device("meta"):
        model = MODELS["resnet50"](1000, 3)
    first = model.stage2[0].body
    assert [(layer.kernel_size[0], layer.stride[0]) for layer in first if isinstance(layer, nn.Conv2d)] == [
        (1, 1),
        (3, 2),
        (1, 1),
    ]


def test_biases_are_where_the_papers_have_them():
    with torch.device("meta"):
        vgg, resnet = MODELS["vgg19"](10, 3), MODELS["resnet50-cifar"](10, 3)
    assert all(module.bias is None for module in vgg.modules() if isinstance(module, nn.Conv2d))
    assert vgg.head.bias is not None
    assert resnet.head.bias is None


def test_initial_weights_have_the_stated_deviations():
    torch.manual_seed(0)
    resnet, vgg = MODELS["resnet20"](10, 3), MODELS["vgg19"](10, 3)
    fan_in = resnet.stage3[1].body[0].weight
    assert fan_in.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert resnet.head.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    fan_out = next(m for m in vgg.modules() if isinstance(m, nn.Conv2d) and m.in_channels != m.out_channels == 128)
    assert fan_out.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert vgg.head.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_cifar_networks_of_granet_start_as_in_its_official_code():
    """ResNet-50 as torch makes its layers, 2.45 times smaller than Kaiming normal; ResNet-20's bias is not zero."""
    torch.manual_seed(0)
    resnet20, resnet50, imagenet = (MODELS[name](10, 3) for name in ("resnet20", "resnet50-cifar", "resnet50"))
    assert resnet20.head.bias.abs().min() > 0
    assert resnet20.head.bias.abs().max() <= 1 / 64**0.5
    for network, deviation in ((resnet50, (1 / 3 / 512 / 9) ** 0.5), (imagenet, (2 / 512 / 9) ** 0.5)):
        assert network.stage4[1].body[3].weight.std().item() == pytest.approx(deviation, rel=0.01)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet-50'.*did you mean 'resnet50'"):
        build("resnet-50", classes=10, in_channels=3)


@pytest.mark.slow
def test_digits_cnn_learns_to_read_digits():
    data = load("digits", validation=0.1)
    torch.manual_seed(0)
    model = build("digits-cnn", classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(8):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - epoch / 8)
        for x, y in epoch_batches(data.train, batch_size=64, epoch=epoch, train=True, mean=data.mean, std=data.std):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    ((x, y),) = epoch_batches(data.test, batch_size=360, train=False, mean=data.mean, std=data.std)
    assert (model(x).argmax(1) == y).float().mean() > 0.97
