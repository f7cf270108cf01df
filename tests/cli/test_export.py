from pathlib import Path


def test_a_named_model_is_exported_here_and_compared(say):
    code, out, _ = say("export", "resnet20", "--to", "state-dict", "--size", 8)
    assert code == 0 and Path("resnet20.safetensors").stat().st_size > 1e6
    assert out.startswith("resnet20.safetensors: state-dict, float32") and "largest deviation from the model" in out


def test_mistakes_cost_one_line_and_leave_nothing(say):
    for words, message in {
        ("mlp", "--to", "onx"): "--to: 'onx' is not possible; did you mean 'onnx'?",
        ("mlp", "--to", "pt2", "--precision", "int8"): "precision='int8' is not possible for pt2; it can be float32",
        ("mlp", "--to", "pt2", "--output", "no/such.pt2"): "the folder no does not exist",
        ("mpl", "--to", "pt2"): "mlp",
        ("mlp",): "needs --to",
    }.items():
        code, out, error = say("export", *words)
        assert code == 2 and message in error and error.count("\n") == 1 and not out
    assert list(Path().iterdir()) == []
