"""Command-line flags for output, checks and inspection runs."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from dft.bounds import Bounds
from dft.errors import UserError
from dft.metrics import CONSOLE, metrics_named

MAX_PLANNED = 10**6
"""Maximum number of devices, and of GiB per device, to plan for."""
MAX_SAMPLES = 1000
"""Maximum number of prompts that are continued at each evaluation."""

NONFINITE_POLICIES = ("stop", "skip")
"""Values of `--on_nonfinite`."""


@dataclass
class WatchArguments:
    """Flags for a run's output, and for runs that exit without training."""

    _argument_group_name: ClassVar[str] = "monitoring"

    report: bool = field(
        default=True,
        metadata={"help": "Write report.html and report.png after each evaluation and at the end."},
    )
    console_metrics: list[str] = field(
        default_factory=lambda: list(CONSOLE),
        metadata={
            "help": "Metrics to print on the console after step and epoch; docs/metrics.md lists them.",
            "metavar": "NAME",
        },
    )
    log_per_file: bool = field(
        default=False,
        metadata={"help": "Also report nll and avg_p_correct of each evaluation file."},
    )
    log_artifacts: bool = field(
        default=False,
        metadata={
            "help": "After training, log the final model, report.html and the data report as artifacts to "
            "wandb, mlflow and trackio. The report holds conversations."
        },
    )
    generate_samples: Annotated[int, Bounds(minimum=0, maximum=MAX_SAMPLES)] = field(
        default=0,
        metadata={
            "help": "Number of prompts of the evaluation data that the model continues at each evaluation, "
            "with the most likely token each time. The answers are printed in short, written to "
            "samples.jsonl, and shown in the report and in trackers beside the reference."
        },
    )
    generate_samples_max_tokens: Annotated[int, Bounds(above=0, maximum=10**6)] = field(
        default=128,
        metadata={"help": "Number of tokens after which an answer of --generate_samples is cut off."},
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do if a loss or gradient is not finite: stop the run and name the step, rank "
            "and conversations, or skip the update.",
            "choices": list(NONFINITE_POLICIES),
        },
    )
    verify_save: str = field(
        default="True",
        metadata={
            "help": "Verify a saved model before it replaces an earlier one. True: read the files of "
            "checkpoints, and load the final model and compare its logits. all: load and compare every "
            "checkpoint. False: verify nothing.",
            "choices": ["True", "False", "all"],
        },
    )
    preflight: bool = field(
        default=False,
        metadata={
            "help": "Score a sample of the training data with the untouched model, report whether DFT suits "
            "the data, and exit."
        },
    )
    preflight_samples: Annotated[int, Bounds(above=0)] = field(
        default=512,
        metadata={"help": "Maximum number of sequences of each data file that --preflight scores."},
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Estimate the memory of the run without loading weights, and exit."},
    )
    plan_world_size: Annotated[int | None, Bounds(above=0, maximum=MAX_PLANNED)] = field(
        default=None,
        metadata={"help": "Number of devices to plan for. Default: those of this run."},
    )
    plan_device_memory: Annotated[float | None, Bounds(above=0, maximum=MAX_PLANNED)] = field(
        default=None,
        metadata={"help": "Memory of each device to plan for in GiB. Default: that of this machine."},
    )

    def __post_init__(self) -> None:
        try:
            metrics_named(self.console_metrics)
        except ValueError as error:
            raise UserError(f"--console_metrics {' '.join(self.console_metrics)}: {error}") from None
