import copy

import pytest
import torch

import granet


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_file_computes_what_the_model_computes_for_any_batch(model, x, tmp_path):
    found = granet.export.pt2(model, x[:1] + 5, tmp_path / "model.pt2", inputs=[x])
    assert found.deviation == 0 and found.comparison.examples == 4
    loaded = torch.export.load(found.path)
    assert loaded.example_inputs is None  # nobody's images
    expected = copy.deepcopy(model).eval()(x)
    for batch in (1, 4):
        torch.testing.assert_close(loaded.module()(x[:batch]), expected[:batch])
    assert b"test_to_pt2" not in found.path.read_bytes() and b"site-packages" not in found.path.read_bytes()
