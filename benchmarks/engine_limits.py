"""What this processor gives one core, and how much of it each kernel of a sparse network takes.

    OMP_NUM_THREADS=1 python benchmarks/engine_limits.py --model resnet50 --sparsity 0.9

The peaks come from a C++ program of a page, compiled on the spot: multiply-adds on registers, multiply-adds whose one
operand is a vector read from a working set of a given size (aligned, and one float off), and copying memory. Each
layer's rate counts multiply-adds on non-zeros; its bytes are the activations and weights it must touch once.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from engine_inference import MODELS, make, processor

from granet import native
from granet.engine import ops
from granet.engine.capture import trace
from granet.engine.search import fastest_program, step_times

PEAKS = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef float U __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
constexpr int SUMS = 12;
static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
__attribute__((noinline)) static V registers(long rounds, V a, V b) {
  V s[SUMS];
  for (V& v : s) v = a;
  for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 32
    for (int j = 0; j < SUMS; ++j) s[j] = s[j] * a + b;
  for (int j = 1; j < SUMS; ++j) s[0] += s[j];
  return s[0];
}
__attribute__((noinline)) static V loads(const float* x, long vectors, long rounds, V a) {
  V s[SUMS];
  for (V& v : s) v = a;
  for (long r = 0; r < rounds; ++r)
    for (const float *p = x, *end = x + vectors * WIDTH; p < end; p += SUMS * WIDTH)
#pragma GCC unroll 32
      for (int j = 0; j < SUMS; ++j) s[j] += a * *(const U*)(p + j * WIDTH);
  for (int j = 1; j < SUMS; ++j) s[0] += s[j];
  return s[0];
}
int main(int argc, char**) {
  V a = V{} + 1.0f / argc - 1e-7f, sink{};
  double best = 1e9;
  for (int i = 0; i < 8; ++i) {
    double t = now();
    sink += registers(4000000, a, a);
    t = now() - t;
    if (t < best) best = t;
  }
  std::printf("registers %.1f\n", 4e6 * SUMS * WIDTH * 2 / best * 1e-9);
  const long most = 64L << 20;
  float* m = (float*)std::aligned_alloc(4096, 2 * most + 4096);
  std::memset(m, 0, 2 * most + 4096);
  const char* names[] = {"first level", "second level", "third level", "memory"};
  const long sizes[] = {16L << 10, 384L << 10, 4L << 20, most};
  for (int level = 0; level < 4; ++level)
    for (int off = 0; off < 2; ++off) {
      const long vectors = sizes[level] / (4 * WIDTH) / SUMS * SUMS, rounds = 1 + (1L << 27) / sizes[level];
      best = 1e9;
      for (int i = 0; i < 6; ++i) {
        double t = now();
        sink += loads(m + off, vectors, rounds, a);
        t = now() - t;
        if (t < best) best = t;
      }
      std::printf("%s, %s %.1f\n", names[level], off ? "unaligned" : "aligned",
                  2.0 * vectors * WIDTH * rounds / best * 1e-9);
    }
  best = 1e9;
  for (int i = 0; i < 6; ++i) {
    double t = now();
    std::memcpy(m, (char*)m + most, most);
    t = now() - t;
    if (t < best) best = t;
  }
  std::printf("copying, GB/s read and written %.1f\n", 2.0 * most / best * 1e-9);
  return sink[0] == 12345.0f;
}
"""
ISA_FLAGS = {16: native.ISA_FLAGS["kernels_avx512.cpp"], 8: native.ISA_FLAGS["kernels_avx2.cpp"], 4: ()}


def peaks() -> dict[str, float]:
    """GFLOP/s (and for copying GB/s) of one core, by name, with vectors as wide as the kernels'."""
    width = ops.cpu()[0]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "peaks.cpp", Path(folder) / "peaks"
        source.write_text(PEAKS)
        flags = ["-O3", "-std=gnu++20", "-ffp-contract=fast", f"-DWIDTH={width}", *ISA_FLAGS[width]]
        subprocess.run([native.compiler(), *flags, str(source), "-o", str(program)], check=True)
        said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in said.splitlines())}


def layers(name: str, sparsity: float, batch: int) -> list[tuple[str, int, float, float, float]]:
    """Of every kind of layer: its name, how many there are, milliseconds, GFLOP on non-zeros, and MB touched once."""
    model, x = make(name, sparsity, "uniform"), torch.randn(batch, *MODELS[name][1])
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        ((part, args),) = trace(model, x)
        for segment in part.stages(args)[0].segments:
            program, _, _ = fastest_program(segment, chains=(False,))
            inputs = [torch.randn(s.out.shape) for s in segment.steps if not s.inputs]
            times = torch.tensor([step_times(program, inputs) for _ in range(5)]).min(dim=0).values
            taken = set()
            for layer, steps in program.layer_steps.items():
                spec, out = layer.spec, layer.out
                kernel, positions = "x".join(map(str, spec.kernel)), out.size[0] * out.size[1] * batch
                key = f"{kernel} to {out.size[0]}x{out.size[1]}"
                key += (", strided" if spec.stride != (1, 1) else "") + (", residual" if len(layer.inputs) > 1 else "")
                key += ", dense" if layer.density > 0.9 else ""
                weights = layer.weight.count_nonzero().item()
                inside = sum(v.channels * v.size[0] * v.size[1] * batch for v in layer.inputs)
                moved = 4 * (inside + out.channels * positions) + 8 * weights
                entry = found.setdefault(key, [0, 0.0, 0.0, 0.0])
                spent = sum(times[s].item() for s in steps)
                for i, number in enumerate((1, spent, 2e-9 * weights * positions, 1e-6 * moved)):
                    entry[i] += number
                taken.update(steps)
            rest = [t.item() for i, t in enumerate(times) if i not in taken]
            entry = found.setdefault("packing, pooling, sums", [0, 0.0, 0.0, 0.0])
            entry[0] += len(rest)
            entry[1] += sum(rest)
    return [(key, int(count), *numbers) for key, (count, *numbers) in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=MODELS)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    found = peaks()
    print(f"{processor()}, vectors of {ops.cpu()[0]} floats, one core\n\n| what | GFLOP/s |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.1f} |")
    ceiling = found["first level, aligned"]
    print(f"\n{settings.model}, {settings.sparsity:.0%} uniform, batch {settings.batch}\n")
    print("| layers | count | ms | GFLOP/s on non-zeros | of the first level's | GB/s at least |")
    print("|---|---|---|---|---|---|")
    for key, count, spent, work, moved in layers(settings.model, settings.sparsity, settings.batch):
        rate = 1e3 * work / spent
        share = f"{rate:.1f} | {rate / ceiling:.0%} | {moved / spent:.1f}" if work else "- | - | -"
        print(f"| {key} | {count} | {spent:.2f} | {share} |")


if __name__ == "__main__":
    main()
