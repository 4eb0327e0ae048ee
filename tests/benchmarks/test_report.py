from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import document, html
from benchmarks.cli import main
from benchmarks.report import AHEAD, Printer, print_workload, times
from benchmarks.results import Failed
from tests.benchmarks.runs import row, run, workload

# Found, not imported: that would cost every run that only collects this module half a second.
pytestmark = pytest.mark.skipif(
    find_spec("matplotlib") is None or find_spec("jinja2") is None,
    reason="plots and the HTML report come with the extra 'bench'",
)

ROWS = (
    row("persistence", 100.0, 110.0, 120.0, role="engine"),
    row("LMDB", 50.0, 55.0, 60.0),
    row("a dict", 1000.0, 1100.0, 1200.0, durability="nothing"),
    row("bare write", 5000.0, 5100.0, 5200.0, role="limit"),
    row("RocksDB", failure=Failed(kind="unavailable", reason="no <rocksdict> here")),
)
RUN = run(workload(*ROWS), workload(ROWS[0], name="visible"))


def test_the_table_has_every_row_and_marks_those_that_are_ahead() -> None:
    out = io.StringIO()
    print_workload(Printer(out), RUN.workloads[0])
    lines = out.getvalue().splitlines()
    assert [line for line in lines if AHEAD in line and "a dict" in line]
    assert sum(AHEAD in line for line in lines) == 1
    assert [line for line in lines if "LMDB" in line and "2.00 ×" in line]
    assert "RocksDB unavailable: no <rocksdict> here" in out.getvalue()
    assert "FAIL  rate of persistence ≥ 2 × LMDB: 1.50 ×" in out.getvalue()


@pytest.mark.parametrize(
    ("factor", "text"), [(12.3456, "12.35 ×"), (0.1, "0.10 ×"), (0.00112, "0.0011 ×"), (None, "")]
)
def test_a_lost_factor_is_not_rounded_to_nothing(factor: float | None, text: str) -> None:
    assert times(factor) == text


@pytest.fixture(scope="module")
def page() -> str:
    return html.render(RUN)


def test_the_html_report_needs_nothing_but_itself(page: str) -> None:
    assert page.count("<svg") == 1 + 2 * len(RUN.workloads)  # an overview; bars, distributions
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)|url\(([^#)][^)]*)\)""", page)
    assert fetched == []
    assert "<script" not in page


def test_the_html_report_shows_the_machine_and_the_lost_rows_and_escapes_both(
    page: str,
) -> None:
    assert "one &lt;b&gt;of&lt;/b&gt; many" in page
    assert "no &lt;rocksdict&gt; here" in page
    assert '<tr class="peer lost"><td class="text">a dict</td>' in page
    assert '<tr class="limit"><td class="text">bare write</td>' in page


def test_the_same_results_give_the_same_report(page: str) -> None:
    assert html.render(RUN) == page


def test_the_document_gets_a_new_middle_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text(f"# Before\n\n{document.BEGIN}\nold\n{document.END}\n\nAfter\n")
    results = tmp_path / "run.json"
    results.write_text(RUN.as_json(), encoding="utf-8")
    assert main(["document", str(results), str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Before\n")
    assert text.endswith(f"{document.END}\n\nAfter\n")
    assert "old" not in text
    assert "| update | 110 /s | LMDB: 55 | 2.00 × | a dict: 1,100 | **0.10 ×** | 4.5 ms |" in text
    for name in re.findall(r"\]\((performance/[^)]+)\)", text):
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<svg")
    assert main(["document", str(results), str(path)]) == 0
    assert path.read_text(encoding="utf-8") == text


def test_a_document_without_a_place_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "performance.md"
    path.write_text(f"{document.END}\n{document.BEGIN}\n")
    results = tmp_path / "run.json"
    results.write_text(RUN.as_json(), encoding="utf-8")
    assert main(["document", str(results), str(path)]) == 2
    assert "in this order" in capsys.readouterr().err
    assert path.read_text() == f"{document.END}\n{document.BEGIN}\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["performance.md", "run.json"]


def test_the_command_line_compares_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(RUN.as_json(), encoding="utf-8")
    slow = row("persistence", 10.0, 11.0, 12.0, role="engine")
    new.write_text(run(workload(slow, *ROWS[1:])).as_json(), encoding="utf-8")
    assert main(["compare", str(old), str(old)]) == 0
    assert "2 figures compared, 0 worse." in capsys.readouterr().out
    assert main(["compare", str(old), str(new)]) == 1
    assert "worse: update, rate of persistence: 110 before, 11 now" in capsys.readouterr().out


def test_a_file_that_holds_no_results_ends_a_run_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "old.json"
    wrong.write_text("{}")
    assert main(["run", "--tiny", "--directory", str(tmp_path), "--compare", str(wrong)]) == 2
    shown = capsys.readouterr()
    assert "holds no results of version 1" in shown.err
    assert shown.out == ""
