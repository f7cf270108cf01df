import copy

import pytest
import torch

import granet
from granet.pruning import OWL

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def test_the_outlier_ratio_is_that_of_all_layers_of_a_block():
    scores = [torch.ones(10, 10), torch.ones(4, 5)]
    scores[0][0, :3] = 100
    scores[1][0, 0] = 100
    mean = (116 + 400) / 120
    assert OWL(outlier=5.0).ratio(scores) == 4 / 120 and mean * 5 < 100
    assert OWL(outlier=100 / mean).ratio(scores) == 0  # above, not at


@pytest.mark.parametrize("spread", [0.0, 0.08, 0.2])
def test_densities_lie_around_the_whole_models(spread):
    ratios, sizes = {"a": 0.02, "b": 0.05, "c": 0.03}, {"a": 100, "b": 100, "c": 400}
    found = OWL(spread=spread).densities(ratios, sizes, 0.5)
    assert max(found.values()) - min(found.values()) == pytest.approx(2 * spread)
    assert sum(found[name] * sizes[name] for name in sizes) / 600 == pytest.approx(0.5)
    assert found["c"] - found["a"] == pytest.approx(2 * spread / 3)  # in proportion to the ratios


def test_equal_blocks_are_equally_dense():
    assert OWL().densities({"a": 0.1, "b": 0.1}, {"a": 5, "b": 5}, 0.3) == pytest.approx({"a": 0.3, "b": 0.3})


@pytest.mark.parametrize(("density", "spread"), [(0.05, 0.2), (0.95, 0.2)])
def test_a_spread_that_leaves_a_block_empty_or_too_full(density, spread):
    with pytest.raises(ValueError, match=r"OWL with spread=0.2 would give [ab] a density of .* use a smaller spread"):
        OWL(spread=spread).densities({"a": 0.1, "b": 0.2}, {"a": 5, "b": 5}, density)


@pytest.mark.parametrize("settings", [{"outlier": 0.0}, {"outlier": float("inf")}, {"spread": -0.1}, {"spread": 0.5}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*: give a"):
        OWL(**settings)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_budgets_of_a_language_model(language_model, calibration, method):
    dense = copy.deepcopy(language_model)
    report = granet.prune(language_model, 0.6, method, calibration, budgets="owl")
    assert report.active == granet.distribution.budget(report.total, 0.4)
    blocks = {}
    for layer in report.layers:
        blocks.setdefault(layer.name.split(".")[2], []).append(layer)
    densities = {}
    for name, layers in blocks.items():
        densities[name] = sum(x.active for x in layers) / sum(x.shape[0] * x.shape[1] for x in layers)
        assert all(abs(x.density - densities[name]) < 1e-3 for x in layers)
    assert max(densities.values()) - min(densities.values()) == pytest.approx(0.16, abs=1e-3)

    # the naive way: inputs of all layers of the dense model, put aside
    inputs, handles = {}, []
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            inputs[name] = []
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0][0])))
    with torch.no_grad():
        for ids in calibration:
            dense(ids)
    modules = dict(dense.named_modules())
    ratios = {}
    for block in blocks:
        names = [name for name in inputs if name.split(".")[2] == block]
        scores = [(modules[name].weight.abs() * torch.cat(inputs[name]).norm(dim=0)).flatten() for name in names]
        scores = torch.cat([one / len(torch.cat(inputs[name])) ** 0.5 for one, name in zip(scores, names, strict=True)])
        ratios[block] = float((scores > 5 * scores.mean()).float().mean())
    order = sorted(blocks, key=ratios.get)
    assert order == sorted(blocks, key=densities.get)
    share = (ratios[order[1]] - ratios[order[0]]) / (ratios[order[2]] - ratios[order[0]])
    assert (densities[order[1]] - densities[order[0]]) / 0.16 == pytest.approx(share, abs=0.02)
