import pytest
import torch
import torch.nn.functional as F

from granet.train.scores import Tally


def test_a_tally_over_batches_is_the_mean_over_all_images():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(0, 3, (50,))  # no image of the last class
    tally = Tally(4, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        tally.add(logits[part], labels[part])
    found = tally.evaluation()
    hit = logits.argmax(1) == labels
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert found.accuracy == hit.sum().item() / 50
    assert found.per_class == (*(hit[labels == k].sum().item() / (labels == k).sum().item() for k in range(3)), None)


def test_the_tallies_of_ranks_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3), torch.randint(0, 3, (8,))
    whole, *parts = (Tally(3, torch.device("cpu")) for _ in range(3))
    whole.add(logits, labels)
    for part, of in zip(parts, (slice(0, 5), slice(5, 8)), strict=True):
        part.add(logits[of], labels[of])
    parts[0].sums += parts[1].sums
    assert parts[0].evaluation().per_class == whole.evaluation().per_class
    assert parts[0].evaluation().loss == pytest.approx(whole.evaluation().loss)
