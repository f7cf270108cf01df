"""Means and gains over the cells of a study."""

import dataclasses

from granet.lab.plasticity.findings import paragraph


def test_arms_are_compared_where_both_are_made(made_up, like_the_paper):
    """A cell that is missing takes its counterpart out, rather than shift a mean."""
    whole = made_up(like_the_paper, noise=0.0)
    rows = tuple(row for row in whole.rows if row.arm == "none" or row.epoch < 4)
    part = dataclasses.replace(whole, rows=rows, missing=len(whole.rows) - len(rows))
    said = paragraph(part)
    assert said.startswith(f"{part.missing} cells of the study are missing")
    assert "the arm `restore` changes plasticity by +0.00 at rate 0.2, +0.00 at rate 0.5, +3.00 at rate 0.9" in said
    assert set(part.gain("plasticity", "restore", "none")) == {
        (row.pretrained_sparsity, row.rate, row.step, row.seed) for row in rows if row.arm == "restore"
    }
