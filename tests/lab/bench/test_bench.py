import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from granet.cli import main
from granet.engine.inference import compile as compile_sparse
from granet.engine.saved.model import load_compiled
from granet.lab import sources
from granet.lab.bench import command, engines, layers, measuring, page
from granet.lab.bench.results import HEADINGS, Row, SideBySide
from granet.lab.bench.side_by_side import Settings, error_of, side_by_side
from granet.train.recipe import validate
from granet.train.run import Run, execute

QUICK = {"seconds": 0.05, "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    method = {"name": "static", "sparsity": 0.9, "distribution": "uniform"}
    train = {"epochs": 3, "batch_size": 32, "lr": 0.1, "threads": 2, "device": "cpu"}
    model = {"name": "mlp", "pattern": "1x4"}
    values = {"name": "x", "data": {"name": "digits"}, "model": model, "method": method, "train": train}
    run = Run.for_recipe(validate(values, source="test"), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run.path


def test_a_run_is_calibrated_on_its_images_and_tested(run):
    found = command.main(str(run), engines=["torch", "granet"], precision=["float32", "int8"], batch=4, **QUICK)
    rows = {(row.engine, row.precision): row for row in found.rows}
    assert list(rows) == [("torch", "float32"), ("granet", "float32"), ("granet", "int8")]
    assert found.images == 360 // 4 * 4
    reference = rows["torch", "float32"]
    assert reference.error == 0 and reference.accuracy > 0.3
    assert rows["granet", "int8"].error < 0.1
    assert all(abs(row.accuracy - reference.accuracy) < 0.03 for row in found.rows)
    assert "int8 is calibrated on training images" in found.about and "90.0% of 266,200 weights are zero" in found.about
    assert all(row.latency.runs >= 5 and row.rate > 0 and row.nbytes > 0 for row in found.rows)


def test_the_averaged_weights_of_a_run_are_measured_where_it_evaluates_them(tmp_path):
    train = {"epochs": 1, "batch_size": 32, "lr": 0.1, "threads": 1, "device": "cpu", "ema": 0.99}
    method = {"name": "static", "sparsity": 0.9}
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "method": method, "train": train}
    run = Run.for_recipe(validate(values, source="test"), tmp_path)
    execute(run)
    found = sources.read(str(run.path))
    average, weights = dict(found.trainer.ema.named_parameters()), dict(found.trainer.model.named_parameters())
    assert found.about == "the averaged weights of the run"
    for name, p in found.model.named_parameters():
        assert torch.equal(p, average[name])
    assert any(not torch.equal(p, weights[name]) for name, p in average.items())


def test_a_compiled_network_is_saved_or_the_report_says_why_not(run, tmp_path):
    path = tmp_path / "saved.granet"
    found = command.main(str(run), engines=["granet"], precision="int8", images=0, save_compiled=path, **QUICK)
    assert path.exists() == (not found.not_saved)
    if path.exists():
        example = sources.read(str(run)).example
        assert load_compiled(path)(*example).shape == (1, 10)


@pytest.fixture(scope="module")
def layered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(32, 8, 3, 3) < 0.25)
        model[2].weight.mul_(torch.rand(16, 32, 3, 3) < 0.1)
        example = (torch.randn(2, 8, 12, 12),)
        work = engines.Work(model, example, [example], Path())
        return work, layers.measure(work, compile_sparse(model, example).report(), "1x4")


def test_layers_say_what_bounds_them(layered):
    work, found = layered
    assert [layer.name for layer in found.layers] == ["0", "2"]
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    arithmetic, memory = found.peaks
    for layer, inputs in zip(found.layers, (8, 32), strict=True):
        weight = work.model[int(layer.name)].weight
        active, positions = int(weight.count_nonzero()), 2 * 12 * 12
        products = active * positions / (1e6 * layer.ms)  # billions per second
        assert layer.products == pytest.approx(products)
        gigabytes = 4e-9 * (positions * (inputs + len(weight)) + active)
        ideal = {"arithmetic": 1e-9 * active * positions / arithmetic, "memory": gigabytes / memory}
        assert layer.bound == max(ideal, key=ideal.get)
        assert layer.reached == pytest.approx(ideal[layer.bound] / (1e-3 * layer.ms))


def test_layers_with_another_pattern_have_as_many_weights(layered):
    work, found = layered
    assert all(layer.other_ms > 0 and layer.gain == layer.ms / layer.other_ms for layer in found.layers)
    assert found.advice.startswith("With as many weights in the pattern 1x4, the layers would")
    twin = layers.with_pattern(work.model, "1x4")
    for before, after in zip((work.model[0], work.model[2]), (twin[0], twin[2]), strict=True):
        blocks = after.weight.movedim(1, -1).unflatten(-1, (-1, 4)).ne(0)
        assert torch.equal(blocks.all(-1), blocks.any(-1))
        assert abs(int(after.weight.count_nonzero()) - int(before.weight.count_nonzero())) <= 2


def test_the_advice():
    def layer(ms, other):
        return layers.Layer("conv", (8, 8, 3, 3), 0.1, "x", ms, 0.5, 10.0, "arithmetic", 0.2, other)

    found = layers.Layers("int8", (100.0, 10.0), (layer(2.0, 1.0), layer(1.0, None)), "1x4")
    assert "would take 2.00 instead of 3.00 ms (1.50x); conv gains most, 2.00x" in found.advice
    assert [row[-2:] for row in found.cells()] == [["1x4 ms", "gain"], ["1.000", "2.00x"], ["", ""]]
    assert "would not be faster" in replace(found, layers=(layer(1.0, 1.5),)).advice
    plain = replace(found, pattern="")
    assert plain.advice == "" and len(plain.cells()[0]) == 8


def test_a_page_with_bars(layered, tmp_path):
    pytest.importorskip("altair", reason="needs the extra granet[train]")
    found = SideBySide("x", "about", "machine", tuple(rows(3.0, 2.0, 1.0)), images=50, layers=layered[1])
    text = page.write(found, tmp_path / "x.html").read_text()
    for title in ("Latency", "Throughput", "Size of the weights", "Accuracy", "Layers"):
        assert title in text
    assert "granet int8" in text and found.verdict in text and layered[1].advice in text
    assert "layers of granet in float32" in str(found) and "Layers of granet in float32" in found.markdown()
    assert json.loads(found.json())["layers"]["layers"][0]["name"] == "0"
    with pytest.raises(ValueError, match="a page is an HTML file"):
        page.check(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="there is no such folder"):
        page.check(tmp_path / "none" / "x.html")


BRANCHING = """
import torch

class Branching(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1 if float(x.sum()) > 0 else super().forward(x)

def model():
    return Branching(8, 4), torch.randn(2, 8)
"""


def test_what_was_measured_is_printed_before_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("branching.py").write_text(BRANCHING)
    words = ["branching.py:model", "--engines", "granet", "--precision", "float32", "--seconds", "0.05"]
    assert main(["bench", *words, "--save-compiled", "saved.granet"]) == 2
    out, err = capsys.readouterr()
    assert "torch" in out and "min ms" in out
    assert "granet: error: nothing was saved to saved.granet: granet in float32: " in err
    assert not Path("saved.granet").exists()


def test_the_engines_that_are_installed_agree(run):
    for package in (*engines.FORMATS["onnx"].packages,):
        pytest.importorskip(package, reason="needs the extra granet[export]")
    found = command.main(str(run), precision="int8", batch=2, images=50, streams=2, **QUICK)
    rows = {(row.engine, row.precision): row for row in found.rows}
    assert {("torch", "float32"), ("onnxruntime", "int8"), ("granet", "int8")} <= rows.keys()
    assert ("openvino", "int8") in rows or any(engine == "openvino" for engine, *_ in found.left_out)
    assert rows["onnxruntime", "int8"].nbytes < rows["torch", "float32"].nbytes / 2


def test_what_is_missing_or_off_is_named_and_the_others_go_on(run, monkeypatch):
    def off(work, precision):
        return engines.Prepared(lambda threads: lambda arguments: [work.model(*arguments) + 1], 1)

    def fails(work, precision):
        raise RuntimeError("no such operator\nat line 1")

    monkeypatch.setitem(engines.ENGINES, "off", engines.Engine("off", ("float32",), off))
    monkeypatch.setitem(engines.ENGINES, "fails", engines.Engine("fails", ("int8",), fails))
    monkeypatch.setitem(
        engines.ENGINES, "absent", engines.Engine("absent", ("int8",), fails, ("no_such_package",), "pip install it")
    )
    settings = Settings(["off", "fails", "absent", "torch"], images=0, **QUICK)
    found, _ = side_by_side(sources.read(str(run)), settings)
    assert {row.engine for row in found.rows} == {"torch"}
    reasons = {engine: reason for engine, _, reason in found.left_out if engine != "torch"}
    assert reasons["fails"] == "RuntimeError: no such operator"
    assert reasons["absent"] == "needs no_such_package: pip install it"
    assert reasons["off"].startswith("its outputs are off by") and "0.001 is allowed" in reasons["off"]
    assert "left out: fails in int8: RuntimeError: no such operator" in str(found)


def test_an_engine_that_the_user_names_must_be_installed(monkeypatch):
    absent = engines.Engine("absent", ("int8",), None, ("no_such_package",), "pip install it")
    monkeypatch.setitem(engines.ENGINES, "absent", absent)
    with pytest.raises(ModuleNotFoundError, match="engine absent needs no_such_package: pip install it"):
        command.main("no such model", engines=["absent"], **QUICK)


def test_errors_of_outputs():
    a, b = [torch.tensor([1.0, -2.0])], [torch.tensor([1.0, -1.0])]
    assert error_of(a, b, "float32") == 0.5
    assert error_of(a, b, "int8") == pytest.approx((1 / 5) ** 0.5)
    assert error_of(a, [torch.zeros(3)], "int8") == float("inf")


def test_several_inputs_and_torch_compile(tmp_path, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 16), nn.Linear(4, 16)

        def forward(self, a, b):
            return torch.relu(self.left(a)) * self.right(b)

    source = sources.Source("two", Two().eval(), (torch.randn(3, 8), torch.randn(3, 4)), None, "random")
    found, prepared = side_by_side(source, Settings(("torch", "granet"), ("float32",), 1, seconds=0.02))
    assert [row.engine for row in found.rows] == ["torch", "granet"] and "inputs 3x8 and 3x4" in found.about
    assert list(prepared) == ["float32"]


def test_streams_run_at_the_same_time():
    counts = [0, 0, 0]

    def call(i):
        counts[i] += 1

    rate = measuring.throughput([lambda i=i: call(i) for i in range(3)], examples=10, seconds=0.05)
    assert min(counts) > 1
    assert 0 < rate < 10 * sum(counts) / 0.05
    with pytest.raises(ZeroDivisionError):
        measuring.throughput([lambda: 1 / 0, lambda: None], examples=1, seconds=0.01)


def test_percentiles():
    found = measuring.Latency.from_seconds([i / 1000 for i in range(1, 101)])
    assert (found.least, found.runs) == (1, 100)
    assert (found.p50, found.p90, found.p99) == pytest.approx((50.5, 90.1, 99.01))


def rows(*times):
    kinds = [("torch", "float32", False), ("onnxruntime", "int8", False), ("granet", "int8", True)]
    for (engine, precision, sparse), time in zip(kinds, times, strict=True):
        yield Row(engine, precision, sparse, measuring.Latency(time, time, time, time, 9), 1e3, 10**6, 0.01, 0.9)


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (1.0, "The sparse network wins: granet in int8 is 2.00 times as fast as the fastest dense engine, onnxruntime"),
        (2.01, "does not win: granet in int8 and the fastest dense engine, onnxruntime in int8, are equally fast"),
        (4.0, "does not win: granet in int8 has 0.50 times the speed of the fastest dense engine, onnxruntime in int8"),
    ],
)
def test_the_verdict(ours, says):
    found = SideBySide("x", "about", "machine", tuple(rows(3.0, 2.0, ours)))
    assert says in found.verdict
    assert [found.ratio(row) for row in found.rows] == [2 / 3, 1.0, 2 / ours]
    assert found.values()["rows"][2]["ratio"] == 2 / ours
    dense = replace(found, rows=(*found.rows[:2], replace(found.rows[2], sparse=False)))
    assert "granet found no kernels that gain" in dense.verdict
    assert "not measured on granet's kernels" in replace(found, rows=found.rows[:2]).verdict


def test_text_markdown_and_json():
    reason = "needs " + "a long reason, " * 20
    found = SideBySide(
        "x", "about", "machine", tuple(rows(30.123456, 2.0, 1000.4)), (("openvino", "int8", reason),), 50
    )
    assert max(map(len, str(found).splitlines())) <= 100
    assert "  ".join(("onnxruntime", "int8     ")) in str(found) and "30.123" in str(found) and "1000.4" in str(found)
    assert found.cells()[0] == HEADINGS
    plain = replace(found, rows=tuple(replace(row, accuracy=None) for row in found.rows))
    assert "accuracy" not in plain.cells()[0]
    table = found.markdown().splitlines()
    assert table[2].count("|") == len(HEADINGS) + 1 and table[3].startswith("|---")
    values = json.loads(found.json())
    assert values["rows"][0]["latency"]["least"] == 30.123456
    assert values["left_out"] == [{"engine": "openvino", "precision": "int8", "reason": reason}]
    assert values["fastest_dense"] == "onnxruntime in int8"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engines": ["onnx"]}, "unknown engine 'onnx'.*did you mean 'onnxruntime'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"threads": 0}, "threads=0"),
        ({"streams": 0}, "streams=0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"images": -1}, "images=-1"),
        ({"cpu_time": True, "threads": 2}, "add --threads 1"),
        ({"training": True, "precision": "int8"}, "for inference"),
        ({"training": True, "layers": True}, "for inference"),
        ({"against": "1by4"}, "1by4"),
        ({"save_compiled": Path("none/x.granet")}, "there is no such folder"),
        ({"save_compiled": Path("x.granet"), "training": True}, "training is measured"),
        ({"save_compiled": Path("x.granet"), "precision": ["int8", "float32"]}, "a file has one precision"),
        ({"save_compiled": Path("x.granet"), "engines": ["torch"]}, "granet is not among the engines"),
    ],
)
def test_what_is_not_possible(options, says):
    with pytest.raises(ValueError, match=says):
        command.main("resnet20", **options)


def test_training_of_a_named_model():
    report = command.main("resnet20", sparsity=0.95, batch=8, size=8, training=True)
    assert report.dense_ms > 0
    assert report.fast_ms > 0
    assert "training step" in str(report)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux, which lists what the processor has")
def test_bfloat16_is_known_as_the_system_lists_it():
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512" in flags:
        assert engines.has_bfloat16() == ("avx512_bf16" in flags or "amx_bf16" in flags)
