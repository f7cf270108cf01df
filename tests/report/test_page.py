import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from granet.report.page import read_run, summary_tables, write_report
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[Path]:
    """Two real runs, GraNet and its dense twin, of three epochs."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for method in ("granet", "dense"):
        values = recipes.load("digits", method=method).model_dump()
        values["train"]["epochs"], values["train"]["warmup"] = 3, "1ep"
        run = Run.for_recipe(validate(values, source="test"), folder)
        execute(run)
        paths.append(run.path)
    return paths


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Path:
    return write_report([read_run(path) for path in finished], tmp_path_factory.mktemp("page") / "report.html")


def printed(paths) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for title, table in summary_tables([read_run(path) for path in paths]):
            console.print(title, table)
    return capture.get()


def test_a_run_is_read_whole(finished):
    run = read_run(finished[0])
    assert run.summary["method"] == "granet"
    assert [record["epoch"] for record in run.evals] == [1, 2, 3]
    assert run.updates and run.train
    assert len(run.records) == len((finished[0] / "metrics.jsonl").read_text().splitlines())
    assert "granet" in run.recipe and run.environment["torch"]


def test_the_table_has_the_numbers_of_the_summary(finished):
    sparse, dense = (json.loads((path / "summary.json").read_text()) for path in finished)
    line = next(line for line in printed(finished).splitlines() if sparse["name"] in line)
    assert f"{100 * sparse['best']['test_accuracy']:.2f} %" in line
    assert f"{100 * sparse['sparsity']:.2f} %" in line
    assert f"{sparse['parameters']['active']:,}" in line
    assert f"{sparse['flops']['inference'] / dense['flops']['inference']:.3f}" in line


def test_an_unfinished_run_is_shown_as_such(copied, tmp_path):
    (copied / "summary.json").unlink()
    assert "copy (unfinished)" in printed([copied])
    assert "copy (unfinished)" in write_report([read_run(copied)], tmp_path / "page.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_directories(finished, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "again")
    table = printed([finished[0], again])
    assert "again" in table and finished[0].name in table


def test_no_best_yet_is_shown_as_a_dash(copied):
    summary = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(summary | {"best": None}))
    assert re.search(r" - +\d+\.\d\d %", printed([copied]))


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
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "page.html")


def test_what_a_run_says_cannot_become_script(copied, tmp_path):
    for file in ("recipe.yaml", "summary.json", "metrics.jsonl"):
        text = (copied / file).read_text()
        (copied / file).write_text(re.sub(r"digits-granet|features\.0\.weight", "</script><b>bold", text))
    assert "</script><b>bold" not in write_report([read_run(copied)], tmp_path / "page.html").read_text()


def test_the_page_names_no_address_to_load(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page.read_text().split('<script type="module">')[0])
    assert "default-src 'none'" in page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_chart_and_loads_nothing(page, tmp_path, scheme):
    # without its security policy, a request would be made; the browser then counts it
    probe = "addEventListener('load', () => setTimeout(() => { document.body.dataset.requests = JSON.stringify("
    probe += "performance.getEntriesByType('resource').map(entry => entry.name)); }, 5000));"
    text = re.sub("<meta http-equiv=.*?>", f"<script>{probe}</script>", page.read_text(), count=1)
    open_page = tmp_path / "open.html"
    open_page.write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--window-size=1240,2000"]
    command += ["--force-dark-mode"] if scheme == "dark" else []
    result = subprocess.run([*command, open_page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    dom = re.sub(r"<script.*?</script>", "", result.stdout, flags=re.S)
    charts = re.findall(r"<figure.*?</figure>", dom, flags=re.S)
    titles = [re.search(r"<h2>(.*?)</h2>", chart)[1] for chart in charts]
    assert len(titles) == 8 and {"Accuracy", "Loss", "Sparsity", "Churn"} < set(titles)
    for title, chart in zip(titles, charts, strict=True):
        marks = re.findall(r'<g class="mark-(?:line|rect)[^"]*".*?</g>', chart, flags=re.S)
        assert any(' d="M' in mark for mark in marks), f"{title} is empty"
    assert not re.findall(r"CONSOLE.*(?:Uncaught|ERROR|Refused)", result.stderr)
    assert 'data-drawn="8"' in result.stdout
    assert 'data-requests="[]"' in result.stdout
