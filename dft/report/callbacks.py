"""The callbacks of a run that report what it does: to trackers, to files and on the console."""

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from dft.arguments.parser import Arguments
from dft.data.preparing.prepare import PreparedData
from dft.data.templates.encoder import ChatEncoder
from dft.report.base_scores_callback import BaseScoresCallback, ComparedTrainer
from dft.report.log_file import LogFileCallback
from dft.report.report_callback import ReportCallback, ReportedTrainer
from dft.report.samples_callback import SampledTrainer
from dft.report.samples_file import SamplesFileCallback
from dft.report.samples_setup import make_samples_callback
from dft.training.measuring.trackers import RunRecordCallback


class ObservedTrainer(ReportedTrainer, SampledTrainer, ComparedTrainer, Protocol):
    """Interface of the trainer that the callbacks need; implemented by `DFTTrainer`."""

    def add_callback(self, callback: TrainerCallback) -> None: ...


def add_reports(
    arguments: Arguments,
    trainer: ObservedTrainer,
    encoder: ChatEncoder,
    data: PreparedData,
    record: dict[str, Any],
) -> ReportCallback | None:
    """Add the callbacks for trackers, log, samples and report.html. Return the last, None without a report.

    Args:
        arguments: the parsed flags.
        trainer: the trainer.
        encoder: renders the prompts of samples; its tokenizer decodes tokens.
        data: the prepared data.
        record: see `dft.report.run_record.run_record`.

    Raises:
        UserError: the evaluation data has no prompt for `--generate_samples`.
    """
    trainer.add_callback(RunRecordCallback(record, trainer.callback_handler))
    trainer.add_callback(LogFileCallback(Path(arguments.training.output_dir)))
    trainer.add_callback(SamplesFileCallback(Path(arguments.training.output_dir)))
    if arguments.watch.generate_samples:
        trainer.add_callback(make_samples_callback(arguments, trainer, encoder, data))
    if not arguments.watch.report:
        return None
    if arguments.dft.base_scores:
        trainer.add_callback(_base_scores_callback(arguments, trainer, encoder, data, record))
    report = ReportCallback(trainer, record, encoder.tokenizer)
    trainer.add_callback(report)
    return report


def _base_scores_callback(
    arguments: Arguments,
    trainer: ComparedTrainer,
    encoder: ChatEncoder,
    data: PreparedData,
    record: dict[str, Any],
) -> BaseScoresCallback:
    """Return the callback that compares the tokens of the evaluation sets, or of the training data."""
    sets = {name: dataset for name, dataset in data.datasets.items() if name != "train"} or data.datasets
    return BaseScoresCallback(trainer, record, sets, arguments.dft.fused_head, encoder.tokenizer)
