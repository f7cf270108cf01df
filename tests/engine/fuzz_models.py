"""Models with branches against themselves compiled; run as a program under the sanitizers.

`python tests/engine/fuzz_models.py SEEDS`
"""

import sys

import torch
from torch import nn

from granet.engine import ops
from granet.engine.capture import trace
from granet.engine.program import KernelChoice, Program, kernel_choices
from granet.engine.runtime import build


class Block(nn.Module):
    """A bottleneck with a shortcut, and the activation asked for."""

    def __init__(self, inputs: int, width: int, stride: int, activation: nn.Module):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            activation,
            nn.Conv2d(width, width, 3, stride, 1, groups=2),
            nn.BatchNorm2d(width),
            activation,
            nn.Conv2d(width, 2 * width, 1),
            nn.BatchNorm2d(2 * width),
        )
        self.shortcut = nn.Conv2d(inputs, 2 * width, 1, stride) if stride > 1 or inputs != 2 * width else nn.Identity()
        self.activation = activation

    def forward(self, x):
        return self.activation(self.body(x) + self.shortcut(x))


class Network(nn.Module):
    """A stem, a max-pool, blocks, a mean and a classifier: all that the compiler fuses."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 7, 2, 3), nn.BatchNorm2d(12), activation, nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(
            Block(12, 8, 1, activation), Block(16, 8, 1, activation), Block(16, 16, 2, activation)
        )
        self.dilated = nn.Conv2d(32, 20, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 7)

    def forward(self, x):
        y = self.dilated(self.blocks(self.stem(x)))
        y = torch.relu(self.norm(y + y))
        return self.head(y.mean([2, 3])), y


def network(activation: nn.Module, density: float) -> nn.Module:
    """A random network in eval mode, with batch statistics that are no identity."""
    model = Network(activation).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) < density).mul_(2)
    return model


def check_every_choice(model: nn.Module, x: torch.Tensor) -> None:
    """The compiled model under every kernel and batch layout against the model itself."""
    ((part, args),) = trace(model, x)
    with torch.no_grad():
        expected = part.module(*args)
        stages, _ = part.stages(args)
        assert stages.segments
        width = ops.cpu()[0]
        for batch in (1, width, 2 * width):
            for pick in (
                KernelChoice("sparse", 1),
                KernelChoice("sparse", 5),
                KernelChoice("sparse", 12),
                KernelChoice("block"),
            ):

                def choose(layer, pick=pick, batch=batch):
                    return (
                        pick
                        if pick in kernel_choices(layer, batch) or pick.kind == "sparse"
                        else KernelChoice("sparse", 8)
                    )

                for chain in (False, True):
                    run = build(stages, {s: Program(s, choose, batch, chain=chain) for s in stages.segments})
                    for _ in range(2):  # the second run finds the first one's numbers in the arena
                        found = run(*args)
                        for a, b in zip(found, expected, strict=True):
                            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
                        for segment in run.children():
                            segment._arenas[0].fill_(float("nan"))


if __name__ == "__main__":
    torch.set_num_threads(2)
    ops.prepare()
    for seed in range(int(sys.argv[1])):
        torch.manual_seed(seed)
        activation = [nn.ReLU(), nn.ReLU6(), nn.SiLU()][seed % 3]
        images, size = [(1, 37), (3, 32), (17, 24)][seed % 3]
        check_every_choice(network(activation, 0.3), torch.randn(images, 3, size, size))
