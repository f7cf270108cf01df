"""Compiled sparse inference against the dense engines, interleaved, outputs checked first.

    python benchmarks/engine_inference.py --model resnet50 --sparsity 0.8 0.9 0.95 --batch 1 16
    python benchmarks/engine_inference.py --precision float32 bfloat16 int8 --pattern 1x4 --sparsity 0.9

With further precisions, torch's bfloat16 autocast, OpenVINO in bfloat16, and OpenVINO (by NNCF) and ONNX Runtime
(static quantisation) in int8 take part, and all ratios are to the fastest dense engine of all precisions. ONNX Runtime
and OpenVINO take part where installed (`pip install onnx onnxscript onnxruntime openvino nncf`). Weights and running
statistics are random: speed does not depend on them. A first convolution stays dense. torch.compile takes part where it
works, torch's compressed sparse rows in models without convolutions (torch has no sparse convolution).
"""

import argparse
import copy
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from granet.distribution import erk, uniform
from granet.engine.inference import compile as compile_sparse
from granet.train.models import build


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut; the stride is in the 3x3 (ResNet v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for 224x224 images (He et al. 2016)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, inputs = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.blocks, self.pool, self.head = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Linear(2048, 1000)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


CSR = "torch CSR"


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 10),
    )  # fmt: skip


class EncoderBlock(nn.Module):
    """A transformer's block with normalization first: self-attention, then two linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


def feed_forward() -> nn.Module:
    """The two linears of a transformer block with d = 512, without what is between two blocks."""
    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))


class CsrLinear(nn.Module):
    """A linear layer on torch's compressed sparse rows."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias.detach()

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(self.bias[:, None], self.weight, rows.T).T.reshape(*x.shape[:-1], -1)


def with_csr(model: nn.Module) -> nn.Module:
    """A copy of the model with all its linear layers on torch's compressed sparse rows."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, CsrLinear(module))
    return twin


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (ResNet50, (3, 224, 224)),
    "vgg19": (lambda: build("vgg19", classes=10, in_channels=3), (3, 32, 32)),
    "resnet20": (lambda: build("resnet20", classes=10, in_channels=3), (3, 32, 32)),
    "mlp": (mlp, (784,)),
    "feed-forward": (feed_forward, (128, 512)),
    "encoder": (lambda: nn.Sequential(*(EncoderBlock(512, 8) for _ in range(4))), (128, 512)),
}


def make(name: str, sparsity: float, distribution: str, block: tuple[int, int] = (1, 1)) -> nn.Module:
    """The model with random weights, all but a first convolution made sparse, and statistics that are no identity."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    weights = weights[1:] if weights[0][1].dim() > 2 else weights
    shapes = {n: tuple(p.shape) for n, p in weights}
    counts = (erk if distribution == "erk" else uniform)(shapes, 1 - sparsity)
    with torch.no_grad():
        for n, p in weights:
            high, wide = (b if n % b == 0 else 1 for n, b in zip(p.shape, block, strict=False))
            keep = torch.zeros(p.shape[0] // high, p.shape[1] // wide, *p.shape[2:], dtype=torch.bool)
            keep.view(-1)[torch.randperm(keep.numel())[: counts[n] // (high * wide)]] = True
            p.mul_(keep.repeat_interleave(high, dim=0).repeat_interleave(wide, dim=1))
            p.mul_((2 * p[0].numel() / max(1, p.square().sum().item()) / p[0].numel() * p.shape[0]) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model


def onnx_int8(path: str, x: torch.Tensor) -> str:
    """The path of an ONNX file in int8, calibrated on `x`."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x.numpy()}]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    prepared, made = f"{path}.prepared", f"{path}.int8"
    quantization.shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(prepared, made, Reader(), per_channel=True)
    return made


def contenders(
    model: nn.Module, x: torch.Tensor, *, torch_compile: bool, precisions: list[str]
) -> dict[str, Callable[[], torch.Tensor]]:
    """What can run the model here, by name; those not installed are named on the terminal."""
    found: dict[str, Callable[[], torch.Tensor]] = {"torch eager": lambda: model(x)}
    channels_last = x.to(memory_format=torch.channels_last) if x.dim() == 4 else None
    if channels_last is not None:
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        found["torch channels_last"] = lambda: twin(channels_last)
    if "bfloat16" in precisions:
        inputs = x if channels_last is None else channels_last
        other = model if channels_last is None else twin

        def autocast() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return other(inputs)

        found["torch bfloat16"] = autocast
    if torch_compile:
        compiled = torch.compile(model)
        compiled(x)
        found["torch.compile"] = lambda: compiled(x)
    if x.dim() < 4:
        sparse_rows = with_csr(model)
        found[CSR] = lambda: sparse_rows(x)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        try:
            torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=True, verbose=False, external_data=False)
        except (ImportError, ModuleNotFoundError) as error:
            print(f"ONNX Runtime and OpenVINO skipped: {error}")
            return found
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            paths = {"onnxruntime": path} | ({"onnxruntime int8": onnx_int8(path, x)} if "int8" in precisions else {})
            for name, file in paths.items():
                session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
                found[name] = lambda s=session: torch.from_numpy(s.run(None, {"x": x.numpy()})[0])
        except ImportError:
            print("ONNX Runtime skipped: not installed")
        try:
            import openvino

            core, array = openvino.Core(), x.numpy()
            variants = {"openvino": (core.read_model(path), "f32")}
            if "bfloat16" in precisions:
                variants["openvino bfloat16"] = (core.read_model(path), "bf16")
            if "int8" in precisions:
                import nncf

                data = nncf.Dataset([array])
                variants["openvino int8"] = (nncf.quantize(core.read_model(path), data, subset_size=1), "f32")
            for name, (network, hint) in variants.items():
                options = {
                    "INFERENCE_PRECISION_HINT": hint,
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                }
                request = core.compile_model(network, "CPU", options).create_infer_request()
                found[name] = lambda r=request: torch.from_numpy(r.infer([array])[0].copy())
        except ImportError as error:
            print(f"OpenVINO skipped: {error}")
    return found


def measure(
    calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, tuple[float, float, int]]:
    """Minimum and median in milliseconds and the number of repeats of each call, taking turns for `seconds`."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, spent.values())) < 5:
        for name, call in calls.items():
            call()  # the caches and the clock as this engine leaves them
            start = clock()
            call()
            spent[name].append((clock() - start) * 1e3)
    return {name: (min(s), statistics.median(s), len(s)) for name, s in spent.items()}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet50"], choices=MODELS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--distribution", nargs="+", default=["uniform"], choices=("uniform", "erk"))
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--pattern", default="1x1", choices=("1x1", "1x2", "1x4", "4x1"), help="of the random masks")
    parser.add_argument("--seconds", type=float, default=20, help="for each table row")
    parser.add_argument("--torch-compile", action="store_true", help="torch.compile takes part")
    parser.add_argument("--layers", action="store_true", help="print the report of every compiled model")
    parser.add_argument("--threads", type=int, help="of every engine; the default is torch's")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time: for one thread on a busy machine"
    )
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    clock = time.process_time if settings.cpu_time else time.perf_counter
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {'processor' if settings.cpu_time else 'wall'} time\n"
    )
    print("| model | batch | distribution | sparsity | engine | min ms | median ms | repeats | vs fastest dense |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in settings.model:
        for batch in settings.batch:
            for distribution in settings.distribution:
                for sparsity in settings.sparsity:
                    model = make(name, sparsity, distribution, tuple(map(int, settings.pattern.split("x"))))
                    x = torch.randn(batch, *MODELS[name][1])
                    with torch.no_grad():
                        began = time.perf_counter()
                        fast = compile_sparse(model, x)
                        compiling = time.perf_counter() - began
                        calls = contenders(
                            model, x, torch_compile=settings.torch_compile, precisions=settings.precision
                        )
                        calls["granet"] = lambda f=fast, x=x: f(x)
                        reports = []
                        for precision in settings.precision:
                            if precision != "float32":
                                calibration = [x] if precision == "int8" else None
                                low = compile_sparse(
                                    model, x, precision=precision, calibration=calibration, tolerance=0.2
                                )
                                calls[f"granet {precision}"] = lambda f=low, x=x: f(x)
                                reports.append(low.report())
                        expected = model(x)
                        for other, call in calls.items():
                            gap = call().float() - expected
                            error = (gap.abs().max() / expected.abs().max()).item()
                            if other.endswith(("bfloat16", "int8")):
                                error = (gap.norm() / expected.norm()).item()
                                print(f"<!-- {other}: root mean square error {error:.1%} of that of the output -->")
                            if not error < (0.2 if other.endswith(("bfloat16", "int8")) else 1e-3):
                                raise SystemExit(f"{other} is off by {error:.1e}")
                        times = measure(calls, settings.seconds, clock)
                    dense = min(t[0] for n, t in times.items() if n != CSR and not n.startswith("granet"))
                    for engine, (least, median, repeats) in times.items():
                        print(
                            f"| {name} | {batch} | {distribution} | {sparsity:.0%} | {engine} | {least:.2f} "
                            f"| {median:.2f} | {repeats} | {dense / least:.2f}x |",
                            flush=True,
                        )
                    for report in reports:
                        print(
                            f"<!-- {report.precision}: runs {report.chosen}; packed {report.nbytes / 1e6:.1f} MB; "
                            f"{sum(row.chosen != report.precision for row in report.layers)} layers in float32 -->"
                        )
                    report = fast.report()
                    parameters = sum(4 * p.numel() for p in model.parameters())
                    print(
                        f"<!-- runs {report.chosen}; packed {report.nbytes / 1e6:.1f} MB, dense weights "
                        f"{parameters / 1e6:.1f} MB; working memory {report.arena_nbytes / 1e6:.1f} MB; "
                        f"compiled in {compiling:.1f} s -->",
                        flush=True,
                    )
                    if settings.layers:
                        print(report)


if __name__ == "__main__":
    main()
