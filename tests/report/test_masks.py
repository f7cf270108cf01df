import base64
import logging

import pytest
import torch

from granet.report.masks import COLUMNS, ROWS, picture, pictures
from granet.report.rundata import read_run
from granet.train import checkpoint


def cells(shown):
    return list(base64.b64decode(shown["cells"]))


def test_a_small_mask_is_shown_weight_by_weight():
    shown = picture(torch.tensor([[True, False, False], [False, False, True]]))
    assert cells(shown) == [255, 0, 0, 0, 0, 255]
    assert (shown["rows"], shown["columns"], shown["shape"], shown["largest"]) == (2, 3, [2, 3], 1.0)


def test_a_large_mask_is_shown_as_densities_of_blocks():
    mask = torch.zeros(2 * ROWS, COLUMNS // 4, 4, 4, dtype=torch.bool)
    mask[:2, 0, 0, :4] = True  # one block of 2 * 4 weights
    mask[2, 0, 0, 0] = True
    shown = picture(mask)
    assert (shown["rows"], shown["columns"], shown["shape"]) == (ROWS, COLUMNS, [2 * ROWS, 4 * COLUMNS])
    assert shown["largest"] == 1.0
    assert cells(shown)[0] == 255 and cells(shown)[COLUMNS] == 32  # 1 of 8
    assert sum(cells(shown)) == 255 + 32


def test_the_pictures_are_those_of_the_last_checkpoint(finished, copied, caplog):
    masks = checkpoint.load_latest(finished[0] / "checkpoints").masks
    shown = pictures(read_run(finished[0]))
    assert shown.keys() == masks.keys()
    small = min(masks, key=lambda name: masks[name].numel())
    assert cells(shown[small]) == (255 * masks[small].flatten().int()).tolist()
    assert pictures(read_run(finished[1])) == {}  # dense

    for path in checkpoint.paths(copied / "checkpoints"):
        (path / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert pictures(read_run(copied)) == {}
    assert "the page shows no masks" in caplog.text


@pytest.mark.parametrize("missing", [False, True])
def test_a_run_without_checkpoints_has_no_pictures(copied, missing):
    for path in checkpoint.paths(copied / "checkpoints"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    if missing:
        (copied / "checkpoints").rmdir()
    assert pictures(read_run(copied)) == {}
