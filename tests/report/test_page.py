import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from granet.report.page import summary_tables, write_page, write_report
from granet.report.rundata import read_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Path:
    return write_report([read_run(path) for path in finished], tmp_path_factory.mktemp("page") / "report.html")


def printed(paths) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for title, table in summary_tables([read_run(path) for path in paths]):
            console.print(title, table)
    return capture.get()


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


def test_a_report_of_no_runs_is_refused(tmp_path):
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


def test_the_notes_are_about_columns_that_the_page_has(page, tmp_path):
    assert "“best” is the checkpoint" in page.read_text()
    contents = {"title": "x", "headings": ["finding", "figures"], "rows": [(["a", "b"], "#123456")], "colours": {}}
    text = write_page(tmp_path / "other.html", drawn=(), prose=["figures"], **contents).read_text()
    assert "“best”" not in text and "FLOPs" not in text.split("<script")[0]
    assert '<td data-heading="figures" class="prose">b</td>' in text


def test_headings_are_explained(page):
    head = page.read_text().split("<thead>")[1].split("</thead>")[0]
    assert head.count("<th ") == head.count(" title=") == 10


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 700])
def test_nothing_is_wider_than_the_window(finished, tmp_path, width):
    runs = [read_run(path) for path in finished]
    for run in runs:
        run.summary["name"] = f"{run.name}-{'with-a-long-name' * 6}"
    page = write_report(runs, tmp_path / "page.html")
    probe = "addEventListener('load', () => setTimeout(() => { const root = document.documentElement;"
    probe += "const wide = [...document.querySelectorAll('body *')].filter(one => one.scrollWidth > one.clientWidth + 1"
    probe += " && one.clientWidth && !['PRE', 'SELECT'].includes(one.tagName) && !one.closest('svg'));"
    probe += "document.body.dataset.wide = wide.map(one => one.tagName) + (root.scrollWidth > innerWidth) }, 3000));"
    text = page.read_text().replace("<details", "<details open")
    (tmp_path / "open.html").write_text(text.replace("<style>", f"<script>{probe}</script><style>", 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=15000", f"--window-size={width},2000", (tmp_path / "open.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search('data-wide="(.*?)"', dom)[1] == "false"


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
    assert len(titles) == 11 and {"Accuracy", "Loss", "Learning rate", "Sparsity", "Churn"} < set(titles)
    assert charts[-1].count("<canvas") == 1 and charts[-1].count("<option") == 5  # masks: one run, its layers
    for title, chart in zip(titles[:-1], charts[:-1], strict=True):
        marks = re.findall(r'<g class="mark-(?:line|rect|symbol)[^"]*".*?</g>', chart, flags=re.S)
        assert any(' d="M' in mark for mark in marks), f"{title} is empty"
    assert not re.findall(r"CONSOLE.*(?:Uncaught|ERROR|Refused)", result.stderr)
    assert 'data-drawn="10"' in result.stdout
    assert 'data-requests="[]"' in result.stdout
