"""Models of every kind: shared and computed weights, all kinds of layers, memory formats, bfloat16, torch.compile."""

import warnings

import torch
from small_training import granet_method, nonzero_inactive, three_layers, train_steps
from torch import nn

import granet
from granet import Sparsifier, Static


def test_masks_take_one_byte_a_weight_and_the_model_gains_nothing():
    model = three_layers()
    keys, hooks = (
        list(model.state_dict()),
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )
    sparsifier = Sparsifier(model, granet_method())
    assert all(mask.element_size() == 1 and mask.dtype == torch.bool for mask in sparsifier.masks.values())
    assert list(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_bf16_autocast_scores_in_float32():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(16, 12)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert nonzero_inactive(sparsifier, optimizer) == 0


def test_pure_bf16_parameters():
    model = three_layers().bfloat16()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(12):
        model(torch.randn(16, 12).bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert nonzero_inactive(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)


def test_torch_compile_does_not_recompile_as_the_topology_changes():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train_steps(torch.compile(model, backend=backend), optimizer, 30)
    assert sparsifier.version > 3
    assert len(compiled) == 1


def test_channels_last_gives_the_same_run():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 3)
        )
        model = model.double().to(memory_format=layout)
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier.attach(optimizer)
        for step in range(30):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double().to(memory_format=layout)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert nonzero_inactive(sparsifier, optimizer) == 0
        results.append(sparsifier.masks)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_tied_and_shared_weights_are_counted_and_masked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(10, 10)
            self.b = self.a
            self.c = nn.Linear(10, 10)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = Tied()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    assert list(sparsifier.masks) == ["a.weight"]
    assert sparsifier.total == 100 and sparsifier.active == 20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    assert model.c.weight is model.a.weight
    assert int((model.c.weight != 0).sum()) == 20


def test_every_kind_of_layer_trains_sparse():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(4, 8, 3, padding=1)
            self.b = nn.Conv2d(1, 4, 3, groups=1)
            self.c = nn.Conv3d(1, 3, 2)
            self.d = nn.ConvTranspose1d(8, 4, 2)
            self.e = nn.MultiheadAttention(8, 2, batch_first=True)
            self.f = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            y = self.d(self.a(x))
            z = self.b(x[:, None]).sum() + self.c(x[:, None, None].expand(-1, -1, 2, -1, -1)).sum()
            h = self.a(x).transpose(1, 2)
            return y.sum() + z + self.e(h, h, h)[0].sum() + self.f(h)[0].sum()

    model = Zoo()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    assert "e.in_proj_weight" in sparsifier.masks and "f.weight_hh_l0" in sparsifier.masks
    for _ in range(12):
        model(torch.randn(2, 4, 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nonzero_inactive(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)


def test_weight_norm_is_left_dense():
    """The weight is computed from its parameters: pruning them would divide zero by zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has a newer one, which was left dense already
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(12, 40)), nn.ReLU(), nn.Linear(40, 4))
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    assert set(sparsifier.counts) == {"2.weight"}
    assert torch.isfinite(model(torch.randn(2, 12))).all()
    assert "weight_norm computes the weight from it" in str(granet.plan(model, Static(sparsity=0.9)))
