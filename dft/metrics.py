"""The table of metrics: meaning, unit, whether higher or lower is better, and where each is shown.

The console, the report, the trackers and docs/metrics.md read this table. To add a metric, add a row here and
the line in `dft/training/measuring/meter.py` that computes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any

HIGHER, LOWER = "higher", "lower"
EVAL = "eval_"
"""Prefix of the metrics of evaluations."""


class Source(Enum):
    """Source of a metric."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    BOTH = "training and evaluation"


class Show(Flag):
    """Places where a metric is shown, in addition to trainer_state.json and the trackers."""

    CONSOLE = auto()
    """A column of the console output. `--console_metrics` chooses others."""
    CURVES = auto()
    """A curve in the first section of report.html."""
    MORE_CURVES = auto()
    """A curve in the section of report.html with further curves."""
    MACHINE = auto()
    """A curve and a number in the section of report.html about throughput."""
    PICTURE = auto()
    """A panel of report.png."""
    COMPARISON = auto()
    """A curve in the page that compares several runs."""


@dataclass(frozen=True)
class Metric:
    """A metric and its properties.

    Attributes:
        name: its key in the log; evaluations log it with the prefix `eval_`.
        meaning: one or two sentences.
        unit: unit of its values; empty for shares, probabilities and other plain numbers.
        better: "higher" or "lower"; None if the metric does not measure quality.
        source: whether training, evaluation or both log it.
        show: where it is shown.
        short: heading of its console column. Default: its name.
        width: number of characters of its values on the console.
        selects: the direction in which `--metric_for_best_model` may select by a metric that has no `better`.
        of_alpha: its scale depends on alpha, so it cannot be compared between runs with different alpha.
        spikes: may rise by orders of magnitude for a single step; it is then drawn on a logarithmic scale.
        bins: for a histogram over [0, 1], the number of its equal parts; 0 for a number.
    """

    name: str
    meaning: str
    unit: str = ""
    better: str | None = None
    source: Source = Source.BOTH
    show: Show = Show.MORE_CURVES
    short: str = ""
    width: int = 6
    selects: str | None = None
    of_alpha: bool = False
    spikes: bool = False
    bins: int = 0

    @property
    def heading(self) -> str:
        """Heading of its console column."""
        return self.short or self.name


MAIN = Show.CONSOLE | Show.CURVES | Show.PICTURE | Show.COMPARISON

METRICS = (
    Metric(
        "loss",
        "The DFT loss, mean of w * nll. Not a measure of quality: it is small both for tokens the model "
        "considers hopeless and for tokens it has mastered, and with alpha 1 it is largest at p = 1/e. It "
        "may rise while the model improves. Weights of the data are part of w here, in objective and in "
        "effective_tokens; in all other metrics each supervised token counts once.",
        unit="nats",
        show=MAIN,
        selects=LOWER,
        of_alpha=True,
        spikes=True,
    ),
    Metric(
        "nll",
        "Plain cross-entropy, which SFT minimizes. With alpha near 1 it may rise on held-out data while acc "
        "rises: DFT gives up tokens that the model considers hopeless.",
        unit="nats",
        better=LOWER,
        show=MAIN,
        spikes=True,
    ),
    Metric(
        "avg_p_correct",
        "Mean probability of the correct token, which DFT with alpha 1 maximizes. Expect it to rise.",
        better=HIGHER,
        show=MAIN,
        short="p",
    ),
    Metric(
        "acc",
        "Share of the tokens for which the correct token is the most probable one. Expect it to rise.",
        better=HIGHER,
        show=MAIN,
    ),
    Metric(
        "grad_norm",
        "Norm of the gradient before clipping. DFT's weights are at most 1, so it is smaller and steadier "
        "than under SFT.",
        source=Source.TRAINING,
        show=MAIN,
        spikes=True,
    ),
    Metric(
        "learning_rate",
        "Learning rate of the logged step.",
        source=Source.TRAINING,
        show=MAIN,
        short="lr",
        width=7,
    ),
    Metric(
        "objective",
        "What training minimizes; under DFT alpha * (1 - p) + (1 - alpha) * nll. Expect it to fall.",
        unit="nats",
        better=LOWER,
        show=Show.MORE_CURVES | Show.COMPARISON,
        of_alpha=True,
        spikes=True,
    ),
    Metric(
        "entropy",
        "Mean entropy of the model's distribution at the supervised tokens. DFT makes the model more "
        "confident, so expect it to fall, faster than under SFT. Lower means more confident, not better.",
        unit="nats",
        show=Show.MORE_CURVES | Show.PICTURE | Show.COMPARISON,
    ),
    Metric(
        "effective_tokens",
        "Mean weight of a token: DFT learns as much as SFT would from this share of the tokens. With alpha 1 "
        "it equals avg_p_correct, with alpha 0 it is 1.",
        short="eff_tokens",
        of_alpha=True,
    ),
    Metric(
        "p_end_of_turn",
        "Mean probability of the end-of-turn tokens. If it starts near 0 and stays there, the model does not "
        "learn to stop: set --end_of_turn_weight 0.1 or more, or --dft_alpha 0.9 or less.",
        better=HIGHER,
        show=Show.MORE_CURVES | Show.COMPARISON,
        short="p_end",
    ),
    Metric(
        "kl",
        "Mean divergence KL(model || base) at the supervised tokens: how far the model has moved from the "
        "base model. Only of objectives with a kl_weight; kl_weight times kl is part of loss and objective.",
        unit="nats",
    ),
    Metric(
        "aux_loss",
        "Load-balancing loss of the router of a mixture of experts: how evenly the experts are used. Not "
        "part of loss.",
    ),
    Metric(
        "dft_alpha",
        "Value of alpha at the logged step. Only of objectives that have an alpha.",
        source=Source.TRAINING,
        show=Show(0),
        short="alpha",
    ),
    Metric(
        "tokens_per_second",
        "Throughput in tokens that are not padding, over all ranks. Time spent on evaluating and saving does "
        "not count.",
        unit="tokens/s",
        better=HIGHER,
        source=Source.TRAINING,
        show=Show.CONSOLE | Show.MACHINE,
        short="tok/s",
        width=5,
    ),
    Metric(
        "padding_share",
        "Share of padding in the computed tokens. --packing and --group_by_length keep it small.",
        better=LOWER,
        source=Source.TRAINING,
        show=Show.MACHINE,
        short="padding",
    ),
    Metric(
        "mfu",
        "Model FLOPs utilization: the share of the device's peak arithmetic throughput that training uses. "
        "Only where that peak is known.",
        better=HIGHER,
        source=Source.TRAINING,
        show=Show.MACHINE,
    ),
    Metric(
        "peak_memory_gib",
        "Peak memory of the fullest rank.",
        unit="GiB",
        better=LOWER,
        source=Source.TRAINING,
        show=Show.MACHINE,
        short="mem_GiB",
    ),
    Metric(
        "supervised_tokens",
        "Number of supervised tokens the metrics are means over.",
        unit="tokens",
        show=Show(0),
        short="tokens",
    ),
    Metric(
        "seconds_left",
        "Estimated time until the last step, at the pace of the run so far, evaluations and saves included.",
        unit="s",
        source=Source.TRAINING,
        show=Show.CONSOLE,
        short="left",
        width=8,
    ),
    Metric(
        "p_histogram",
        "Number of supervised tokens by their probability p, in equal parts of [0, 1]; p = 1 counts in the "
        "last. DFT moves tokens to p near 1 and gives up some near p = 0; SFT raises all of them.",
        unit="tokens",
        source=Source.EVALUATION,
        show=Show.CURVES | Show.PICTURE | Show.COMPARISON,
        bins=20,
    ),
)
"""All metrics, in the order in which tables show them."""

BY_NAME = {metric.name: metric for metric in METRICS}
SCALARS = tuple(metric for metric in METRICS if not metric.bins)
"""Metrics whose values are numbers."""


def shown_in(place: Show) -> tuple[Metric, ...]:
    """Return the scalar metrics shown in a given place, in the order of the table."""
    return tuple(metric for metric in SCALARS if place in metric.show)


LOSS, NLL, AVG_P, ACC = (BY_NAME[name] for name in ("loss", "nll", "avg_p_correct", "acc"))
ENTROPY, GRAD_NORM, LEARNING_RATE = (BY_NAME[name] for name in ("entropy", "grad_norm", "learning_rate"))

CURVES = shown_in(Show.CURVES)
FURTHER_CURVES = shown_in(Show.MORE_CURVES)
MACHINE = shown_in(Show.MACHINE)
OVERVIEW = shown_in(Show.PICTURE)
COMPARED = shown_in(Show.COMPARISON)
CONSOLE = tuple(metric.name for metric in shown_in(Show.CONSOLE))
QUALITY = tuple(metric for metric in (*CURVES, *FURTHER_CURVES) if metric.source == Source.BOTH)
"""Metrics of the model itself, which training and evaluation both log."""

HISTOGRAM, BINS = BY_NAME["p_histogram"].name, BY_NAME["p_histogram"].bins


def selection(name: str) -> str | None:
    """Return the direction in which `--metric_for_best_model` selects: "higher", "lower" or None for neither.

    Args:
        name: name of the metric, without the prefix `eval_`. It may begin with the name of an evaluation set.
    """
    parsed = parse_name(name)
    return None if parsed is None else parsed[1].better or parsed[1].selects


def parse_name(key: str) -> tuple[str, Metric] | None:
    """Return the evaluation set and the metric of a key such as `math_acc`, the name of `eval_math_acc`.

    The set is "" for the only one, which has no name. Returns None if the key ends in the name of no metric.
    """
    for metric in sorted(METRICS, key=lambda metric: -len(metric.name)):  # aux_loss before loss
        if key == metric.name:
            return "", metric
        if key.endswith(f"_{metric.name}"):
            return key.removesuffix(f"_{metric.name}"), metric
    return None


def evaluation_prefixes(log: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the prefix of the metrics of each evaluation set in a log, in the order in which they appear.

    That is `eval_` for the only set, and `eval_<name>_` for each of those with names.
    """
    prefixes: dict[str, None] = {}
    for record in log:
        for key in record:
            if key.startswith(EVAL) and "/" not in key and (parsed := parse_name(key.removeprefix(EVAL))):
                prefixes[f"{EVAL}{parsed[0]}_" if parsed[0] else EVAL] = None
    return list(prefixes)


def selectable() -> list[str]:
    """Return the names of the metrics that a checkpoint can be selected by."""
    return [metric.name for metric in QUALITY if selection(metric.name)]


def metrics_named(names: Sequence[str]) -> tuple[Metric, ...]:
    """Look up scalar metrics by name.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    scalars = {metric.name: metric for metric in SCALARS}
    unknown = [name for name in names if name not in scalars]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(unknown)}; choose from {', '.join(scalars)}")
    return tuple(scalars[name] for name in names)
