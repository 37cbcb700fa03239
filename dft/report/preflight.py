"""`--preflight True`: score a sample of the training data and report whether DFT suits it."""

from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dft.arguments.parser import Arguments
from dft.console import say
from dft.ranks import is_main_process
from dft.report.preflight_advice import preflight_report
from dft.report.terminal.preflight import preflight_lines
from dft.training.measuring.scoring import TokenTable


class ScoringTrainer(Protocol):
    """Interface of the trainer that the preflight uses; implemented by `DFTTrainer`.

    Attributes:
        train_dataset: the prepared training data.
        end_of_turn_ids: token ids that end a turn.
    """

    train_dataset: Any
    end_of_turn_ids: list[int]

    def score(self, dataset: Any) -> TokenTable:
        """Score the supervised tokens of a dataset with the current model."""


def run_preflight(arguments: Arguments, trainer: ScoringTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Score a sample of the training data with the model before training, then write and print the report.

    Args:
        arguments: the parsed flags.
        trainer: the trainer of the run, not yet trained.
        tokenizer: decodes the tokens that the report names.
    """
    from dft.report.pages.preflight import write_preflight  # imports matplotlib, which is slow

    training = arguments.training
    sample = trainer.train_dataset.sample(arguments.watch.preflight_samples, training.seed)
    table, name = trainer.score(sample), arguments.model.model_name_or_path
    report = preflight_report(table, sample.files, trainer.end_of_turn_ids, tokenizer.decode, name)
    if is_main_process():
        write_preflight(report, Path(training.output_dir))
    say(*preflight_lines(report, training.output_dir))
