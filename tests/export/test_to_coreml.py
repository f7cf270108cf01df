import pytest
import torch

import granet
from granet.export import ExportError

pytest.importorskip("coremltools", reason="needs the extra granet[coreml]")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_weights_are_read_back_from_a_package_with_sparse_weights(model, x, tmp_path):
    found = granet.export.coreml(model, x, tmp_path / "sparse.mlpackage")
    assert found.deviation is None and "the weights of its 3 layers were read back" in str(found)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 0.01
    dense = granet.export.coreml(model, x, tmp_path / "dense.mlpackage")
    assert dense.nbytes - found.nbytes > 0.7 * 4 * 16 * 19 * 9  # of two convolutions, a tenth is active
    with pytest.raises(ExportError, match="is not in the package"):
        granet.export.coreml(model, x, tmp_path / "wrong.mlpackage", tolerance=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.mlpackage", "sparse.mlpackage"]
