"""Exports, traces and copies of an accelerated model are those of the dense one."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from fuzz_training import same
from torch.utils.flop_counter import FlopCounterMode

import granet

pytestmark = [
    # torch's own: traces warn that torch.jit is to be replaced
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def operators(graph):
    return " ".join(str(node.target) for node in graph.nodes if node.op.startswith("call"))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_writes_torchs_own_operators(twins, strict):
    exported = torch.export.export(twins.fast, (twins.x,), strict=strict)
    assert "linear" in operators(exported.graph) and "granet" not in operators(exported.graph)
    file = io.BytesIO()
    torch.export.save(exported, file)
    same(exported.module()(twins.x), twins.dense(twins.x), "output of the exported model")
    twins.agree()  # and the model is accelerated as before


def test_traces_hold_torchs_own_operators(twins):
    traced = torch.jit.trace(twins.fast, (twins.x,), check_trace=False)
    assert "granet" not in str(traced.inlined_graph) and "linear" in str(traced.inlined_graph)
    made = torch.fx.experimental.proxy_tensor.make_fx(twins.fast)(twins.x)
    assert "granet" not in operators(made.graph) and "addmm" in operators(made.graph)
    with FlopCounterMode(display=False) as counter:
        twins.fast(twins.x)
    assert counter.get_total_flops() == 2 * 8 * (16 * 12 + 12 * 4)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_export_holds_torchs_own_operators(twins, dynamo):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the packages onnx and onnxscript")
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(twins.fast, (twins.x,), file, dynamo=dynamo)
    written = onnx.load_from_string(file.getvalue())
    assert [node.op_type for node in written.graph.node if node.op_type != "Cast"] == ["Gemm", "Tanh", "Gemm"]
    assert {node.domain for node in written.graph.node} == {""}


def test_torch_jit_script_works_after_remove(twins):
    twins.plan.remove()
    same(torch.jit.script(twins.fast)(twins.x), twins.dense(twins.x), "output of the script")


def test_torch_compile_runs_the_kernels_outside_of_its_graph(twins):
    compiled = torch.compile(twins.fast, backend="aot_eager")
    found = torch.autograd.grad(compiled(twins.x).square().sum(), list(twins.fast.parameters()))
    assert twins.sparse_calls == 2
    expected = torch.autograd.grad(twins.dense(twins.x).square().sum(), list(twins.dense.parameters()))
    for (name, _), a, b in zip(twins.fast.named_parameters(), found, expected, strict=True):
        same(a, b, name, twins.sparsifier.masks.get(name))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call plan\.remove\(\) first"):
        torch.compile(twins.fast, backend="eager", fullgraph=True)(twins.x)


def test_copies_can_be_accelerated_themselves(twins):
    for copied in (copy.deepcopy(twins.fast), pickle.loads(pickle.dumps(twins.fast))):
        sparsifier = granet.Sparsifier(copied, granet.Static(sparsity=0.6))
        assert [row.chosen for row in granet.accelerate(sparsifier, twins.x).report().layers] == ["sparse", "sparse"]
        assert copied.state_dict().keys() == twins.dense.state_dict().keys()


def test_a_saved_model_loads_where_granet_is_not_installed(twins, tmp_path):
    torch.save(twins.fast, tmp_path / "model.pt")
    program = f"""
import sys
sys.modules["granet"] = None  # importing it fails
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert model(torch.ones(2, 16)).shape == (2, 4)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
