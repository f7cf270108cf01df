"""Whether zeros make other runtimes faster: sparse networks in ONNX Runtime and OpenVINO, beside the dense one.

Every network is exported by `granet.export`, which compares the file with it, before anything is timed. All files take
turns. Times are processor time of one call with one thread, so that other work on the machine matters less.

    python benchmarks/other_runtimes.py
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

import granet
from granet.train.models import build

PRECISIONS = {"ONNX Runtime float32": ("onnx", "float32"), "ONNX Runtime int8": ("onnx", "int8")}
PRECISIONS |= {"OpenVINO float32": ("openvino", "float32"), "OpenVINO int8": ("openvino", "int8")}


def network(name: str, x: torch.Tensor, sparsity: float, pattern: str) -> nn.Module:
    """A network with random weights, running statistics and masks; dead filters emit constants of both signs."""
    torch.manual_seed(0)
    model = build(name, classes=1000, in_channels=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    if sparsity:
        method = granet.Static(sparsity=sparsity, distribution="uniform")
        granet.Sparsifier(model, method, pattern=pattern, skip=granet.selection.unfit(model, pattern))
    return model.eval()


def runner(path: str, form: str, x: torch.Tensor):
    if form == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, feed)
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()
    return lambda: request.infer([x.numpy()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=30)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, 3, settings.size, settings.size, generator=torch.Generator().manual_seed(1))
    networks = {
        "dense": network(settings.model, x, 0, "unstructured"),
        "90 % unstructured": network(settings.model, x, 0.9, "unstructured"),
        "90 % 1x4": network(settings.model, x, 0.9, "1x4"),
        "half of the channels, as trained": network(settings.model, x, 0.5, "channel"),
    }
    small = granet.shrink(networks["half of the channels, as trained"], x)
    networks["half of the channels, cut out"] = small.model
    print(str(small).splitlines()[-2:])
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for row, model in networks.items():
            for column, (form, precision) in PRECISIONS.items():
                path = f"{folder}/{len(calls)}{'.onnx' if form == 'onnx' else '.xml'}"
                options = {"calibration": [torch.cat([x, -x])]} if precision == "int8" else {}
                made = getattr(granet.export, form)(model, x, path, precision=precision, tolerance=0.5, **options)
                print(f"{row}, {column}: deviation {made.deviation:.2g}", flush=True)
                calls[row, column] = runner(path, form, x)
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(settings.repeats):
        for key, call in calls.items():
            call()
            start = time.process_time()
            call()
            spent[key].append((time.process_time() - start) * 1e3)
    print(f"\n| network | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}")
    for row in networks:
        cells = (f"{min(s):.1f} / {statistics.median(s):.1f}" for s in (spent[row, one] for one in PRECISIONS))
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
