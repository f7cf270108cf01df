import pytest

from granet.cli import main


@pytest.fixture
def say(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder; gives its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def say(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return say
