import torch

from granet.sparsifier import stepping


def test_mixing_is_exact_and_in_float32():
    first, second = torch.tensor([1.0, -2.0]).bfloat16(), torch.tensor([3.0, 5.0]).bfloat16()
    copy = stepping.mixed(None, first, 0.0, 1.0)
    assert copy.dtype == torch.bfloat16 and copy is not first and torch.equal(copy, first)
    kept = stepping.mixed(None, first, 1.0, 0.1)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, first.float() * 0.1)
    again = stepping.mixed(kept, second, 0.5, 2.0)
    assert again is kept
    torch.testing.assert_close(again, first.float() * 0.05 + second.float() * 2)
    assert torch.equal(stepping.mixed(kept, first, 0.0, 0.25), first.float() * 0.25)


def test_buffers_are_found_by_shape():
    p, q = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizers = [torch.optim.AdamW([p], amsgrad=True), torch.optim.SGD([q], lr=0.1, momentum=0.9)]
    assert stepping.buffers(optimizers, p) == []
    for parameter, optimizer in zip((p, q), optimizers, strict=True):
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
    assert len(stepping.buffers(optimizers, p)) == 3  # two moments and the largest of the second
    assert len(stepping.buffers(optimizers, q)) == 1


def test_learning_rates_are_those_of_each_group():
    p, q, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.5}, {"params": [q]}], lr=0.1)
    rates = stepping.learning_rates([optimizer], {"p": p, "q": q, "other": other})
    assert rates == {"p": 0.5, "q": 0.1, "other": 0.0}
