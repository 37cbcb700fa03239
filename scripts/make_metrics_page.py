"""Write docs/metrics.md from the table in dft/metrics.py.

    python scripts/make_metrics_page.py

tests/scripts/test_make_metrics_page.py fails if the page is not current.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.metrics import METRICS, Metric, Show, Source

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
PLACES = {
    Show.CONSOLE: "console",
    Show.CURVES | Show.MORE_CURVES | Show.MACHINE: "report",
    Show.PICTURE: "report.png",
    Show.COMPARISON: "comparison",
}
HEAD = """# Metrics

<!-- Written by scripts/make_metrics_page.py from dft/metrics.py. Do not edit. -->

Metrics of the model are means over the supervised tokens of all micro-batches and ranks: since the last
logged step, or of the whole evaluation. How to read them: [training.md](training.md),
[how_dft_works.md](how_dft_works.md).

- *Logged by*: evaluations log a metric as `eval_NAME`, or as `eval_SET_NAME` for each of several evaluation
  sets (`--eval_data_files SET=FILE ...`).
- *Better*: the direction that is an improvement; "neither" if the metric is no measure of quality.
- *Shown in*: the default columns of the console (`--console_metrics NAME ...` chooses others), `report.html`,
  its picture `report.png`, and the page that compares runs (`scripts/report.py`). `trainer_state.json` and
  the trackers have all metrics; trackers name them `train/NAME` and `eval/NAME`.
- *Console*: the heading of the column. Numbers there are shortened to its width: `31.2k` is 31,200, `1.9e-5`
  is 0.000019, and a metric that is missing is `-`.

| metric | unit | better | logged by | shown in | console | meaning |
|---|---|---|---|---|---|---|
"""
TAIL = """
`--metric_for_best_model` selects checkpoints by any metric that has a better direction and is logged by
evaluations. It also accepts `loss`: it then selects the lowest, and a note says that this is no measure of
quality. Metrics whose scale depends on alpha ({of_alpha})
cannot be compared between runs with different alpha.

transformers adds `epoch`, `eval_runtime`, `eval_samples_per_second`, `eval_steps_per_second`, and at the end
`train_runtime`, `train_samples_per_second`, `train_steps_per_second`, `train_loss` and `total_flos`. With
`--log_per_file True` evaluations also log `eval_FILE/nll` and `eval_FILE/avg_p_correct` for each data file.
"""


def main() -> None:
    PAGE.write_text(metrics_page(), encoding="utf-8")
    print(PAGE)


def metrics_page() -> str:
    """Return the text of docs/metrics.md."""
    rows = "".join(f"| {' | '.join(cells(metric))} |\n" for metric in METRICS)
    of_alpha = ", ".join(f"`{metric.name}`" for metric in METRICS if metric.of_alpha)
    return HEAD + rows + TAIL.format(of_alpha=of_alpha)


def cells(metric: Metric) -> list[str]:
    """Return the cells of a row of the table."""
    both = metric.source is Source.BOTH
    return [
        f"`{metric.name}`",
        metric.unit or "–",
        metric.better or "neither",
        "both" if both else metric.source.value,
        ", ".join(name for places, name in PLACES.items() if places & metric.show) or "–",
        "–" if metric.bins else f"`{metric.heading}`",
        metric.meaning.replace("|", "\\|"),
    ]


if __name__ == "__main__":
    main()
