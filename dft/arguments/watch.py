"""Command-line flags for reports, checks and runs that only inspect."""

from dataclasses import dataclass, field
from typing import ClassVar

from dft.errors import UserError
from dft.metrics import CONSOLE, metrics_named


@dataclass
class WatchArguments:
    """What is said of a run, and what it does when something is wrong."""

    _argument_group_name: ClassVar[str] = "watching"

    report: bool = field(
        default=True,
        metadata={"help": "Write report.html and report.png at each evaluation and at the end."},
    )
    console_metrics: list[str] = field(
        default_factory=lambda: list(CONSOLE),
        metadata={
            "help": "Metrics to show on the console after step and epoch; see docs/metrics.md.",
            "metavar": "NAME",
        },
    )
    log_per_file: bool = field(
        default=False, metadata={"help": "Evaluation gives nll and avg_p_correct of each data file, too."}
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "When a loss or gradient is not finite: stop with the step, the rank and the "
            "conversations, or skip the update.",
            "choices": ["stop", "skip"],
        },
    )
    verify_save: str = field(
        default="True",
        metadata={
            "help": "Look at a saved model before it takes its place: True reads the files of every "
            "checkpoint, and loads the final model and compares its logits; all loads every one; or False.",
            "choices": ["True", "False", "all"],
        },
    )
    preflight: bool = field(
        default=False,
        metadata={
            "help": "Score a sample of the training data with the untouched model, say whether DFT fits, and "
            "end without training."
        },
    )
    preflight_samples: int = field(
        default=512, metadata={"help": "Sequences of each data file that --preflight scores, at most."}
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Say how much memory the run will take, without loading weights, and end."},
    )
    plan_world_size: int | None = field(
        default=None, metadata={"help": "Devices to plan for. Default: those of this run."}
    )
    plan_device_memory: float | None = field(
        default=None, metadata={"help": "GiB of each device to plan for. Default: what this machine has."}
    )

    def __post_init__(self) -> None:
        try:
            metrics_named(self.console_metrics)
        except ValueError as error:
            raise UserError(f"--console_metrics {' '.join(self.console_metrics)}: {error}") from None
