"""Random models with branches, aliases, views, in-place operations, state and hooks, compiled, against themselves.

`python tests/engine/fuzz_graphs.py FIRST LAST [PRECISION]` checks the seeds of this range and fails on the first wrong
number.
"""

import copy
import random
import sys
import traceback

import torch
import torch.nn.functional as F
from torch import nn

from granet.engine import inference, search, timing
from granet.engine.capture import TOLERANCES, CaptureSettings
from granet.engine.graph import tensors_of

WIDTH = 8


class Random(nn.Module):
    """A network whose operations a seed chooses, on images or on tokens. Branches may depend on rounding."""

    def __init__(self, seed: int, *, branches: bool = True):
        super().__init__()
        rng = random.Random(seed)
        self.tokens = rng.random() < 0.4
        self.steps = [(rng.choice(TOKENS if self.tokens else IMAGES), rng.random(), rng.random()) for _ in range(9)]
        if not branches:
            self.steps = [("layer" if name == "branch" else name, *where) for name, *where in self.steps]
        self.form = rng.choice(["one", "tuple", "dict", "nested"])
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(9):
            if self.tokens:
                self.layers.append(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0))
                self.norms.append(nn.LayerNorm(WIDTH) if i % 2 else nn.Identity())
            else:
                groups, kernel = rng.choice([1, 1, 2, WIDTH]), rng.choice([1, 3])
                mode = rng.choice(["zeros", "zeros", "circular"])
                self.layers.append(
                    nn.Conv2d(
                        WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups, bias=i % 2 == 0, padding_mode=mode
                    )
                )
                self.norms.append(nn.BatchNorm2d(WIDTH))
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU(inplace=rng.random() < 0.5)
        self.register_buffer("memory", torch.zeros(1))
        self.calls, self.kept = 0, []

    def forward(self, x, other=None, *, scale=None, extra=()):
        made = [x if other is None else x + other]
        for i, (name, first, second) in enumerate(self.steps):
            a, b = made[-1 - int(first * min(3, len(made)))], made[int(second * len(made))]
            made.append(OPERATIONS[name](self, i, a, b))
        y = made[-1] if scale is None else made[-1] * scale
        for tensor in extra:
            y = y + tensor
        early = made[len(made) // 2]
        forms = {
            "one": y,
            "tuple": (y, early),
            "dict": {"y": y, "early": early},
            "nested": [y, (early, {"x": made[0]})],
        }
        return forms[self.form]


def _keep(m, i, a, b):
    m.kept = [a.mean()]
    m.calls += i % 2
    return a


def _remember(m, i, a, b):
    m.memory.mul_(0.5).add_(a.mean())
    return a + m.memory


def _inplace(m, i, a, b):
    h = a * 1.0
    h.relu_()
    return h


def _in_view(m, i, a, b):
    h = a.clone()
    h[:, :1].mul_(2.0)
    return h


OPERATIONS = {
    "layer": lambda m, i, a, b: m.layers[i](a),
    "normed": lambda m, i, a, b: m.norms[i](m.layers[i](a)),
    "block": lambda m, i, a, b: m.relu(m.norms[i](m.layers[i](a)) + b),
    "keyword": lambda m, i, a, b: m.layers[i](input=a),
    "relu": lambda m, i, a, b: m.relu(a),
    "relu6": lambda m, i, a, b: F.relu6(a),
    "silu": lambda m, i, a, b: F.silu(a),
    "sigmoid": lambda m, i, a, b: torch.sigmoid(a),
    "sum": lambda m, i, a, b: a + b,
    "scaled": lambda m, i, a, b: torch.add(a, b, alpha=0.5),
    "product": lambda m, i, a, b: a * torch.tanh(b),
    "drop": lambda m, i, a, b: m.drop(a),
    "contiguous": lambda m, i, a, b: a.contiguous(),
    "transposed": lambda m, i, a, b: a.transpose(-1, -2).contiguous().transpose(-1, -2),
    "view": lambda m, i, a, b: a.reshape(a.shape[0], -1).view(a.shape),
    "inplace": _inplace,
    "statement": lambda m, i, a, b: (a.relu_(), a)[1],
    "iadd": lambda m, i, a, b: a.add_(b) if i else a + b,
    "in view": _in_view,
    "concatenate": lambda m, i, a, b: torch.cat([a, b], 1).chunk(2, 1)[i % 2],
    "outside": lambda m, i, a, b: a + b.mean(),
    "keep": _keep,
    "remember": _remember,
    "branch": lambda m, i, a, b: a if a.sum() > 1 else -a,  # not 0, the sum of what a layer norm gives
    "pool": lambda m, i, a, b: F.max_pool2d(a, 3, 1, 1),
    "gate": lambda m, i, a, b: a * torch.sigmoid(m.layers[i](F.adaptive_avg_pool2d(a, 1))),
    "mean": lambda m, i, a, b: a + a.mean([2, 3], keepdim=True),
    "last": lambda m, i, a, b: a.contiguous(memory_format=torch.channels_last),
}
IMAGES = [n for n in OPERATIONS if n != "branch"] + 3 * ["layer", "normed", "block"]
TOKENS = [n for n in IMAGES if n not in ("pool", "gate", "mean", "last")] + ["branch"]


# Inputs differ from those that the ranges of int8 come from, and products and sums amplify what rounding does to them.
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.4}


def _close(found: object, expected: object, precision: str = "float32") -> bool:
    allowed = ALLOWED[precision]
    for a, b in zip(tensors_of([found]), tensors_of([expected]), strict=True):
        if precision == "float32":
            if not torch.allclose(a, b, atol=allowed * (1 + b.abs().max().item()), rtol=allowed):
                return False
        elif not (a - b).norm() <= allowed * (b.norm() + b.numel() ** 0.5):
            return False
    return True


def check(seed: int, precision: str = "float32") -> str:
    """Compiles the model of a seed and compares outputs, inputs, state and hooks; gives what was chosen."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Random(seed, branches=precision == "float32").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) < 0.4).mul_(1.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    shape = (2, 5, WIDTH) if model.tokens else (2, WIDTH, 6, 7)
    count = rng.choice([0, 0, 1])

    def call() -> tuple[tuple, dict]:
        named = {"scale": torch.rand(1)} if seed % 3 == 0 else {}
        if seed % 4 == 0:
            named["extra"] = [torch.randn(shape)]
        return tuple(torch.randn(shape) for _ in range(1 + count)), named

    twin = copy.deepcopy(model)
    seen = {id(model): [], id(twin): []}
    if seed % 5 == 0:
        for m in (model, twin):
            m.layers[0].register_forward_hook(lambda mod, a, out, m=m: seen[id(m)].append(out) or out * 1.5)
    example, named = call()
    if rng.random() < 0.3:
        example = tuple(torch.zeros_like(t) for t in example)
    before = copy.deepcopy((example, model.state_dict(), model.calls, model.kept))
    calibration = [example, *(call()[0] for _ in range(3))] if precision == "int8" else None
    if named:
        settings = CaptureSettings(TOLERANCES[precision], precision)
        fast = inference.CompiledModel(model, settings, shapes=8, calibration=calibration)
    else:
        fast = inference.compile(model, example, precision=precision, calibration=calibration)
        for a, b in zip(
            tensors_of(list(before)), tensors_of([example, model.state_dict(), model.calls, model.kept]), strict=True
        ):
            assert torch.equal(a, b), "compiling left a trace"
        assert model.calls == before[2]
    for turn in range(4):
        if turn == 2:
            with torch.no_grad():
                for m in (model, twin):
                    m.layers[1].weight.mul_(-0.5)
        inputs, named = call()
        same = copy.deepcopy((inputs, named))
        with torch.no_grad():
            expected, found = twin(*same[0], **same[1]), fast(*inputs, **named)
        assert _close(found, expected, precision), f"wrong numbers in turn {turn}"
        assert [t.stride() for t in tensors_of([found])] == [t.stride() for t in tensors_of([expected])]
        assert _close((inputs, named), same, precision), "the inputs were changed in another way"
        assert _close([model.memory, model.kept], [twin.memory, twin.kept], precision), "the state differs"
        assert model.calls == twin.calls
    assert all(type(t) is torch.Tensor for t in model.kept)
    return fast.report().chosen


def check_all(first: int, last: int, precision: str = "float32", *, fast: bool = True) -> dict[str, int]:
    """Checks a range of seeds with the compiled model chosen whatever is faster; counts what ran."""
    chosen: dict[str, int] = {}
    before = timing.NOISE, search.ROUNDS
    timing.NOISE, search.ROUNDS = (-1e9 if fast else before[0]), 1
    try:
        for seed in range(first, last):
            try:
                said = check(seed, precision)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {traceback.format_exc()[-3000:]}") from error
            chosen[said] = chosen.get(said, 0) + 1
    finally:
        timing.NOISE, search.ROUNDS = before
    return chosen


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(check_all(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
