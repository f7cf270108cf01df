import pytest

from granet.report.rundata import labels, read_run


def test_a_run_is_read_whole(finished):
    run = read_run(finished[0])
    assert run.summary["method"] == "granet"
    assert [record["epoch"] for record in run.evals] == [1, 2, 3]
    assert run.updates and run.train
    assert len(run.records) == len((finished[0] / "metrics.jsonl").read_text().splitlines())
    assert "granet" in run.recipe and run.environment["torch"]


def test_a_half_written_last_line_is_left_out(copied):
    whole = read_run(copied).records
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 9')
    assert read_run(copied).records == whole


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b'{"kind": "train"}', b'{"kind": "eval", "step": "x", "epoch": 1}', b"\xff"]
)
def test_a_damaged_line_is_named(copied, line):
    content = (copied / "metrics.jsonl").read_bytes()
    (copied / "metrics.jsonl").write_bytes(line + b"\n" + content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is damaged"):
        read_run(copied)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_a_damaged_summary_is_named(copied, content):
    (copied / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_run(copied)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not the directory of a run: it has no recipe\.yaml"):
        read_run(tmp_path)


def test_runs_have_labels_that_tell_them_apart(finished, copied):
    one, other, again = read_run(finished[0]), read_run(finished[1]), read_run(copied)
    assert list(labels([one, other])) == [one.name, other.name]
    assert list(labels([one, again])) == [finished[0].name, "copy"]
    assert list(labels([one, one])) == [str(finished[0])]
