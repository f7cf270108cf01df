"""The index structures of masks, compiled and plain."""

import pytest
import torch

from granet.engine.geometry import geometry
from granet.engine.index import forward_structure, index_structures
from granet.engine.spec import Spec


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_compiled_structure_is_the_plain_one(stride, groups):
    spec = Spec(in_channels=32, out_channels=48, kernel=(3, 3), padding=(1, 1), stride=stride, groups=groups)
    mask = torch.rand(spec.weight_shape) < 0.2
    place = geometry(spec, 16, (16, 16), vector=16, batch=16, chunks=2)
    found, expected = index_structures(mask, place)[0], forward_structure(mask, spec, place)
    assert found.blocks == expected.blocks > 1
    for part in ("ptr", "id", "offset", "index"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part


def test_a_mask_that_does_not_fit_is_an_error():
    place = geometry(Spec(in_channels=8, out_channels=8), 1, (4, 4), vector=16)
    with pytest.raises(RuntimeError, match="mask does not fit"):
        index_structures(torch.ones(8, 3, 1, 1, dtype=torch.bool), place)
