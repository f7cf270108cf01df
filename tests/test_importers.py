import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from granet import Fixed, Sparsifier, import_masks


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def pruned():
    """A model as torch.nn.utils.prune leaves it, twice pruned in the first layer, with its masks and output."""
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[0], "weight", amount=2, n=2, dim=0)
    prune.random_unstructured(model[2], "weight", amount=0.25)
    masks = {"0.weight": model[0].weight_mask.bool(), "2.weight": model[2].weight_mask.bool()}
    return model, masks, model(torch.ones(1, 8))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_from_torch_prune_and_on_with_training():
    model, expected, output = pruned()
    kept = model[0]._parameters["weight_orig"]
    masks = import_masks(model)
    assert same(masks, expected) and all(mask.dtype == torch.bool for mask in masks.values())
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert not list(model.named_buffers()) and not model[0]._forward_pre_hooks
    assert model[0].weight is kept
    assert torch.equal(model(torch.ones(1, 8)), output)

    sparsifier = Sparsifier(model, Fixed(), masks=masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        F.cross_entropy(model(torch.randn(6, 8)), torch.arange(6) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model[0].weight, before)
    for name, mask in expected.items():
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.filterwarnings("ignore:.*deprecat.*")  # torch moves torch.ao.pruning elsewhere and says so
def test_from_torch_ao_pruning_model_or_state():
    from torch.ao.pruning import WeightNormSparsifier

    model = mlp()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    output, kept = model(torch.ones(1, 8)), model[0].parametrizations.weight.original
    state = sparsifier.state_dict()
    expected = {"0.weight": state["state"]["0.weight"]["mask"].bool(), "2.weight": torch.ones(4, 12, dtype=torch.bool)}
    assert 0 < expected["0.weight"].sum() < 96
    assert same(import_masks(mlp(), state), expected)
    assert same(import_masks(model), expected)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert torch.equal(model(torch.ones(1, 8)), output)
    assert model[0].weight is kept


@pytest.mark.parametrize("rename", ["{}", "module.{}", "module._orig_mod.{}", "{}_mask", "module.{}_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_from_a_dict_under_any_of_the_usual_names(rename, dtype):
    _, expected, _ = pruned()
    given = {rename.format(name): mask.to(dtype) for name, mask in expected.items()}
    assert same(import_masks(mlp(), given), expected)


def test_from_a_state_dict_of_a_pruned_model_and_by_layers():
    model, expected, _ = pruned()
    assert same(import_masks(mlp(), model.state_dict()), expected)
    by_layer = {name.removesuffix(".weight"): mask for name, mask in expected.items()}
    assert same(import_masks(mlp(), by_layer), expected)


def test_a_tied_weight_has_one_mask():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    mask = torch.rand(5, 5) > 0.5
    assert same(import_masks(model, {"1.weight": mask}), {"0.weight": mask})


def test_what_does_not_fit_is_refused_by_name():
    _, masks, _ = pruned()
    with pytest.raises(
        ValueError, match=r"'0.wieght' is of no parameter of the model; the nearest names are: 0.weight"
    ):
        import_masks(mlp(), {"0.wieght": masks["0.weight"]})
    with pytest.raises(ValueError, match=r"mask of '2.weight' has shape \(12, 4\), the parameter \(4, 12\)"):
        import_masks(mlp(), {"2.weight": masks["2.weight"].T})
    with pytest.raises(ValueError, match=r"'0.weight' has other values than 0 and 1"):
        import_masks(mlp(), {"0.weight": masks["0.weight"] * 0.5})
    with pytest.raises(ValueError, match=r"'0.bias' has a mask, and stays dense: bias"):
        import_masks(mlp(), {"0.bias": torch.tensor([0.0] + [1.0] * 11)})
    with pytest.raises(ValueError, match=r"carries no masks .*granet.Fixed\(\)"):
        import_masks(mlp())
    with pytest.raises(ValueError, match="no masks in what was given"):
        import_masks(mlp(), {})


def test_another_parametrization_beside_the_mask_is_refused():
    class Mask(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.register_buffer("mask", torch.ones(shape))

        def forward(self, weight):
            return weight * self.mask

    model = mlp()
    parametrizations.weight_norm(model[0])
    nn.utils.parametrize.register_parametrization(model[0], "weight", Mask((12, 8)))
    with pytest.raises(ValueError, match=r"0.weight is parametrized by _WeightNorm too"):
        import_masks(model)


def test_masks_that_are_refused_are_still_there():
    model, expected, output = pruned()
    dense = model[0].weight_orig.detach().clone()
    prune.random_unstructured(model[2], "bias", amount=0.5)
    with pytest.raises(ValueError, match=r"'2\.bias' has a mask, and stays dense"):
        import_masks(model)
    assert torch.equal(model[0].weight_orig, dense) and prune.is_pruned(model)
    masks = import_masks(model, only=["linear", "2.bias"])  # as the message says
    assert same({name: masks[name] for name in expected}, expected) and int(masks["2.bias"].sum()) == 2
    torch.testing.assert_close(model(torch.ones(1, 8)), output, rtol=1, atol=1)


def test_the_attention_mask_of_a_pruned_transformer_is_no_mask_of_weights():
    model, expected, _ = pruned()
    model.register_buffer("causal_mask", torch.ones(3, 3).tril())
    assert same(import_masks(mlp(), model.state_dict()), expected)
