"""The three methods on one matrix, against naive versions of what the papers write."""

import pytest
import torch

from granet.pattern import parse
from granet.pruning import Magnitude, SparseGPT, Wanda

NM = parse("2:4")


@pytest.fixture
def layer():
    """A weight, inputs whose columns differ much and are correlated, and their second moment; in float64."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=rng, dtype=torch.float64)
    x = torch.randn(400, 32, generator=rng, dtype=torch.float64) @ torch.randn(
        32, 32, generator=rng, dtype=torch.float64
    )
    x = x * torch.logspace(-1, 1, 32, dtype=torch.float64)
    return weight, x, x.t() @ x / len(x)


def naive_wanda(weight, x, n, pattern):
    """Loops over outputs, and groups of inputs."""
    out = torch.zeros_like(weight)
    rows, columns = weight.shape
    for i in range(rows):
        score = [abs(float(weight[i, j])) * float(x[:, j].norm()) for j in range(columns)]
        step, keep = (columns, n // rows + (i < n % rows)) if pattern is None else (pattern.m, pattern.n)
        for start in range(0, columns, step):
            for j in sorted(range(start, start + step), key=lambda j: (-score[j], j))[:keep]:
                out[i, j] = weight[i, j]
    return out


def naive_sparsegpt(weight, moment, n, pattern, dampening, width):
    """Optimal brain surgery with inverses by `torch.linalg.inv` of what is left of H, one column after the other."""
    hessian = moment + dampening * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    weight, size = weight.clone(), len(hessian)
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(size)]  # of the columns that are still free at j
    mask = torch.zeros_like(weight, dtype=torch.bool)

    def choose(start, stop, keep):
        places = [(i, j) for i in range(len(weight)) for j in range(start, stop)]
        score = {(i, j): float(weight[i, j] ** 2 / left[j][0, 0]) for i, j in places}
        return sorted(places, key=lambda place: -score[place])[:keep]

    for j in range(size):
        if pattern is None and j % width == 0:
            stop = min(j + width, size)
            for place in choose(j, stop, n * stop // size - n * j // size):
                mask[place] = True
        if pattern is not None and j % pattern.m == 0:
            places = torch.zeros_like(mask)
            for i in range(len(weight)):
                score = [float(weight[i, c] ** 2 / left[c][0, 0]) for c in range(j, j + pattern.m)]
                for c in sorted(range(pattern.m), key=lambda c: -score[c])[: pattern.n]:
                    places[i, j + c] = True
            mask |= places
        for i in range(len(weight)):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j] / left[j][0, 0] * left[j][0]
    return weight * mask


def test_magnitude_keeps_the_largest(layer):
    weight, *_ = layer
    pruned = Magnitude().prune(weight, None, 100, None)
    kept = pruned != 0
    assert kept.sum() == 100 and torch.equal(pruned[kept], weight[kept])
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    pruned = Magnitude().prune(weight, None, 0, NM)
    assert NM.obeyed(pruned != 0) and (pruned != 0).sum() == 256


@pytest.mark.parametrize(("n", "pattern"), [(256, None), (100, None), (0, NM)])
def test_wanda(layer, n, pattern):
    weight, x, moment = layer
    assert torch.equal(Wanda().prune(weight, moment, n, pattern), naive_wanda(weight, x, n, pattern))


@pytest.mark.parametrize(("n", "pattern"), [(256, None), (131, None), (0, NM), (0, parse("1:8"))])
@pytest.mark.parametrize("columns", [32, 8, 12])
def test_sparsegpt(layer, n, pattern, columns):
    weight, _, moment = layer
    method = SparseGPT(dampening=0.05, columns=columns)
    pruned = method.prune(weight, moment, n, pattern)
    torch.testing.assert_close(
        pruned, naive_sparsegpt(weight, moment, n, pattern, 0.05, columns), rtol=1e-8, atol=1e-10
    )
    assert (pruned != 0).sum() == (n or 512 * pattern.n // pattern.m)
    assert torch.equal(pruned, method.prune(weight, moment, n, pattern))


@pytest.mark.parametrize("pattern", [None, NM])
def test_each_method_leaves_less_error_than_the_one_before(layer, pattern):
    weight, x, moment = layer
    errors = [
        ((method.prune(weight, moment, 256, pattern) - weight) @ x.t()).norm()
        for method in (Magnitude(), Wanda(), SparseGPT())
    ]
    assert errors[0] > errors[1] > 1.05 * errors[2]
    assert pattern or errors[0] > 3 * errors[1]


def test_without_correlations_sparsegpt_scores_as_wanda_and_changes_no_weight(layer):
    weight, _, moment = layer
    moment = moment.diagonal().diag()
    pruned = SparseGPT(dampening=0.0).prune(weight, moment, 256, None)
    kept = pruned != 0
    assert torch.equal(pruned[kept], weight[kept])
    score = weight.abs() * moment.diagonal().sqrt()
    assert score[kept].min() > score[~kept].max()
    assert torch.equal(SparseGPT(dampening=0.0).prune(weight, moment, 0, NM), Wanda().prune(weight, moment, 0, NM))


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
def test_weights_of_dead_inputs_go_first(layer, method):
    weight, x, _ = layer
    x[:, ::4] = 0
    moment = x.t() @ x / len(x)
    pruned = method.prune(weight, moment, 16 * 24, None)
    assert not pruned[:, ::4].any() and (pruned != 0).sum() == 16 * 24
    torch.testing.assert_close(pruned @ x.t(), weight @ x.t())
    pruned = method.prune(weight, moment, 16 * 28, None)  # some of them have to stay, and stay as they were
    assert (pruned != 0).sum() == 16 * 28
    kept = pruned[:, ::4] != 0
    assert torch.equal(pruned[:, ::4][kept], weight[:, ::4][kept])


def test_sparsegpt_with_fewer_tokens_than_inputs(layer):
    weight, x, _ = layer
    x = x[:10]
    moment = x.t() @ x / len(x)
    pruned = SparseGPT().prune(weight, moment, 256, None)
    assert pruned.isfinite().all() and (pruned != 0).sum() == 256
    errors = [((one - weight) @ x.t()).norm() for one in (pruned, Wanda().prune(weight, moment, 256, None))]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(
        ValueError, match=r"of its 32 inputs, with dampening=0.0, cannot be inverted: calibrate on more"
    ):
        SparseGPT(dampening=0.0).prune(weight, moment, 256, None)


def test_sparsegpt_of_a_layer_without_any_input_keeps_the_largest(layer):
    weight, *_ = layer
    pruned = SparseGPT().prune(weight, torch.zeros(32, 32, dtype=torch.float64), 256, None)
    assert pruned.isfinite().all() and (pruned != 0).sum() == 256


@pytest.mark.parametrize(
    "settings", [{"dampening": -1.0}, {"dampening": float("nan")}, {"columns": 0}, {"columns": 1.5}]
)
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*: give a"):
        SparseGPT(**settings)
