"""The verdicts on the findings of the paper, and the paragraph that sums up a study."""

import dataclasses

import pytest

from granet.lab.plasticity.findings import findings, paragraph


def test_findings_hold_where_the_numbers_are_like_the_papers(made_up, like_the_paper):
    judged = {finding.claim: finding for finding in findings(made_up(like_the_paper))}
    assert [finding.verdict for finding in judged.values()] == ["holds"] * 7
    falls = judged["Plasticity falls at every drop of the learning rate"]
    assert "16 of 16 falls for, 0 against" in falls.figures


def test_findings_do_not_hold_where_the_numbers_are_the_opposite(made_up, like_the_paper):
    judged = findings(made_up(lambda *where: -like_the_paper(*where)))
    assert {finding.verdict for finding in judged} == {"does not hold"}


def test_findings_are_undecided_where_noise_is_all_there_is(made_up):
    judged = {finding.claim: finding.verdict for finding in findings(made_up(lambda *where: 0.0, noise=0.02))}
    free = judged.pop("A pruning rate of 0.2 is nearly free")  # what changes nothing is free, if that can be told
    assert free != "does not hold"
    assert set(judged.values()) == {"undecided"}


def test_many_small_differences_decide_together(made_up):
    """No curve falls by more than its noise, all of them together do."""
    judged = findings(made_up(lambda sparsity, rate, arm, phase: -0.4 * phase, noise=0.01, seeds=2))
    falls = next(finding for finding in judged if finding.claim.startswith("Plasticity falls"))
    votes = int(falls.figures.partition("; ")[2].split(" of ")[0])
    assert falls.verdict == "holds" and votes < 8


def test_a_narrow_vote_without_a_mean_decides_nothing(made_up):
    """Three curves fall by as much in all as five others rise."""
    falling = {(0.0, 0.2), (0.0, 0.5), (0.9, 0.2)}
    table = made_up(lambda sparsity, rate, arm, phase: -phase * (5 if (sparsity, rate) in falling else -3))
    falls = next(finding for finding in findings(table) if finding.claim.startswith("Plasticity falls"))
    assert falls.verdict == "undecided" and "6 of 16 falls for, 10 against" in falls.figures


def test_findings_need_what_they_are_about(made_up, like_the_paper):
    """Without drops there is no fall, without the other arms no gain; one seed has the noise of the test set."""
    judged = {finding.claim: finding for finding in findings(made_up(like_the_paper, seeds=1, drops=()))}
    assert judged["Plasticity falls at every drop of the learning rate"].verdict == "undecided"
    assert judged["Regeneration helps most at high pruning rates"].verdict == "holds"
    assert (
        "noise of 1.13 points" in judged["Regeneration helps most at high pruning rates"].figures
    )  # 2 sqrt(2 .8 .2 / 1e4)
    alone = made_up(like_the_paper)
    alone = dataclasses.replace(alone, rows=tuple(row for row in alone.rows if row.arm == "none"))
    judged = {finding.claim: finding for finding in findings(alone)}
    assert judged["Regeneration helps most at high pruning rates"].verdict == "undecided"
    with pytest.raises(ValueError, match="no rows to judge"):
        findings(dataclasses.replace(alone, rows=()))


def test_the_paragraph_says_the_numbers(made_up, like_the_paper):
    said = paragraph(made_up(like_the_paper, noise=0.0))
    assert "plasticity is highest at epoch 1 of 12 (+3.00 points)" in said
    assert "drop at epoch 4 to those after it, plasticity changes by -1.00 at rate 0.2, -1.60 at rate 0.5" in said
    assert "the arm `restore` changes plasticity by +0.00 at rate 0.2, +0.00 at rate 0.5, +3.00 at rate 0.9" in said
