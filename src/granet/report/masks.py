"""Pictures of the masks of a run's last checkpoint: one per layer, small enough for a page."""

import base64
import logging
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from granet.report.rundata import RunData
from granet.train import checkpoint

logger = logging.getLogger(__name__)

ROWS, COLUMNS = 96, 192  # the most cells of a picture


def pictures(run: RunData) -> dict[str, dict[str, Any]]:
    """Returns the picture of each sparse layer by name; none for a dense run, or where no checkpoint can be read."""
    if run.is_dense:
        return {}
    try:
        found = checkpoint.load_latest(run.path / "checkpoints")
        return {name: picture(mask) for name, mask in found.masks.items()} if found else {}
    except checkpoint.CheckpointError as error:
        logger.warning("%s: the page shows no masks of this run", error)
        return {}


def picture(mask: Tensor) -> dict[str, Any]:
    """Returns the picture of a mask of shape (outputs, ...): one row per output unit, one column per weight of it.

    A mask with more rows or columns than a picture has cells is averaged: a cell is then the density of a block.

    Returns:
        `rows` and `columns` of the picture, the `shape` of the matrix behind it, the `largest` density of a cell, and
        `cells`: one byte per cell, row by row, from 0 (no active weight) to 255 (the largest density), in base64.
    """
    matrix = mask.flatten(1).float()
    rows, columns = min(len(matrix), ROWS), min(matrix.shape[1], COLUMNS)
    density = adaptive_avg_pool2d(matrix[None], (rows, columns))[0]
    largest = density.max().item()
    levels = (density * (255 / largest)).round().byte() if largest else density.byte()
    cells = base64.b64encode(levels.numpy().tobytes()).decode()
    return {"rows": rows, "columns": columns, "shape": list(matrix.shape), "largest": largest, "cells": cells}
