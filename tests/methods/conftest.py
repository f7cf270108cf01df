import numpy as np
import pytest
import torch

from granet.criterion import Layer

SHAPES = {"first": (4, 3, 3), "narrow": (2, 5), "wide": (12, 9)}


@pytest.fixture(params=[(seed, ties) for seed in range(10) for ties in (False, True)], ids=str)
def case(request):
    """Weights, gradients and masks as arrays, and what a method is given."""
    seed, ties = request.param
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(-3, 4, s).astype(np.float32)) if ties else (lambda s: rng.normal(size=s).astype("f"))
    weights, grads = ({name: draw(shape) for name, shape in SHAPES.items()} for _ in range(2))
    masks = {name: rng.random(shape) < rng.choice([0.3, 0.7, 1.0]) for name, shape in SHAPES.items()}
    for name, mask in masks.items():
        mask.flat[0] = True
        weights[name] *= mask
    layers = {name: Layer(torch.from_numpy(weights[name]), torch.from_numpy(grads[name])) for name in SHAPES}
    given = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    return weights, grads, masks, layers, given
