import pytest

from granet.export.staging import checked_path, size, staged
from granet.files import FileError


def test_files_are_moved_at_the_end(tmp_path):
    with staged(tmp_path / "x.xml") as file:
        file.write_text("a")
        file.with_suffix(".bin").write_text("bcd")
        assert list(tmp_path.glob("*.*ml")) == []
        assert size(file.parent) == 4
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.xml": "a", "x.bin": "bcd"}


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "x.onnx").write_text("old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "x.onnx") as file:
        file.write_text("new")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.onnx": "old"}


def test_paths(tmp_path):
    assert checked_path(str(tmp_path / "x.onnx"), ".onnx") == tmp_path / "x.onnx"
    with pytest.raises(ValueError, match=r"must end with \.onnx"):
        checked_path(tmp_path / "x.pt", ".onnx")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        checked_path(tmp_path / "missing" / "x.onnx", ".onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileError, match="is a folder already"):
        checked_path(tmp_path / "folder.onnx", ".onnx")
