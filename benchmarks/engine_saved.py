"""Time to load a saved compiled model beside that to compile it, and the size of its file.

    python benchmarks/engine_saved.py --precision float32 int8 --pattern 1x4

ResNet-50 at 224x224, 90 % sparse, batch 1, random weights. The file is loaded in fresh processes, where the first
output is compared with the compiled model's, to the bit.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from engine_inference import make

import granet

FRESH = """
import sys, time, torch, granet
torch.set_num_threads(int(sys.argv[2]))
from granet.engine import ops
ops.prepare()
start, cpu = time.perf_counter(), time.process_time()
fast = granet.load_compiled(sys.argv[1] + "/fast.granet")
spent, cpu = time.perf_counter() - start, time.process_time() - cpu
x, expected = torch.load(sys.argv[1] + "/expected.pt")
found = fast(x)
print(spent, cpu, int(torch.equal(found, expected)), int("torch._dynamo" in sys.modules))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["int8"], choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--pattern", default="1x4", choices=("1x1", "1x2", "1x4"), help="of the random masks")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    for precision in settings.precision:
        model = make("resnet50", settings.sparsity, "uniform", (1, int(settings.pattern[-1])))
        x = torch.randn(1, 3, 224, 224)
        more = {"calibration": [torch.randn(8, 3, 224, 224)]} if precision == "int8" else {}
        start, cpu = time.perf_counter(), time.process_time()
        fast = granet.compile(model, x, precision=precision, **more)
        compiled = time.perf_counter() - start, time.process_time() - cpu
        report = fast.report()
        if report.chosen != "sparse":
            raise SystemExit(f"the dense model runs: {report.why}")
        dense = 4 * sum(p.numel() for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            fast.save(f"{folder}/fast.granet")
            saved = time.perf_counter() - start
            torch.save((x, fast(x)), f"{folder}/expected.pt")
            size = Path(folder, "fast.granet").stat().st_size
            rows = []
            for _ in range(settings.repeats):
                command = [sys.executable, "-c", FRESH, folder, str(settings.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append([float(number) for number in done.stdout.split()])
        if not all(row[2:] == [1, 0] for row in rows):
            raise SystemExit("a loaded model computes something else, or torch.compile was imported")
        wall, processor = (sorted(1e3 * row[i] for row in rows) for i in (0, 1))
        middle = len(rows) // 2
        print(
            f"{precision}: compiled in {compiled[0]:.1f} s (processor time {compiled[1]:.1f} s), saved in "
            f"{saved:.1f} s; loaded in {wall[0]:.0f} / {wall[middle]:.0f} ms, processor time {processor[0]:.0f} / "
            f"{processor[middle]:.0f} ms (minimum / median of {len(rows)} processes); file {size / 1e6:.1f} MB, "
            f"packed weights {report.nbytes / 1e6:.1f} MB, working memory {report.arena_nbytes / 1e6:.1f} MB, "
            f"dense {dense / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
