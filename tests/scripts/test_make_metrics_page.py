"""docs/metrics.md is generated from the table of metrics."""

from dft.metrics import METRICS
from scripts.make_metrics_page import PAGE, metrics_page


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "run python scripts/make_metrics_page.py"


def test_every_metric_has_one_row():
    rows = [line for line in metrics_page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    assert all(len(row.replace("\\|", "").split("|")) == 9 for row in rows)
