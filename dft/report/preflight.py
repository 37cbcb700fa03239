"""`--preflight True`: score a sample of the training data and report whether DFT suits it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dft.arguments.parser import Arguments
from dft.console import say
from dft.data.batches.swapping import SwappedAnswers
from dft.loss.objectives import Objective
from dft.ranks import is_main_process
from dft.report.foretelling import foretell, foretold_objectives
from dft.report.preflight_advice import preflight_report
from dft.report.terminal.preflight import preflight_lines
from dft.training.first_step import FirstStep
from dft.training.measuring.scoring import TokenTable

MAX_PAIRS = 128
"""Maximum number of answers that are scored under another question."""


class ScoringTrainer(Protocol):
    """Interface of the trainer that the preflight uses; implemented by `DFTTrainer`.

    Attributes:
        train_dataset: the prepared training data.
        end_of_turn_ids: token ids that end a turn.
    """

    train_dataset: Any
    end_of_turn_ids: list[int]

    def score(self, dataset: Any, objectives: Sequence[Objective] = ()) -> TokenTable:
        """Score the supervised tokens of a dataset with the current model, with their weights."""

    def first_step(self, dataset: Any, objectives: Mapping[str, Objective], seed: int) -> FirstStep | str:
        """Measure a first step of each objective, or return why that is not possible."""


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
    report = score_sample(trainer, sample, tokenizer, arguments.model.model_name_or_path, training.seed)
    if is_main_process():
        write_preflight(report, Path(training.output_dir))
    say(*preflight_lines(report, training.output_dir))


def score_sample(
    trainer: ScoringTrainer, sample: Any, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
) -> dict[str, Any]:
    """Return the preflight report of a sample of the training data. All ranks must call this.

    Args:
        trainer: the trainer of the run, not yet trained.
        sample: rows of one sequence each, with `files`.
        tokenizer: decodes the tokens that the report names.
        model: name of the model.
        seed: determines which sequences the probes use.
    """
    objectives = foretold_objectives()
    table = trainer.score(sample, list(objectives.values()))
    ends = trainer.end_of_turn_ids
    report = preflight_report(table, sample.files, ends, tokenizer.decode, model)
    pairs = SwappedAnswers(sample, MAX_PAIRS, seed)
    swapped = trainer.score(pairs, list(objectives.values())) if len(pairs) else None
    report["objectives"] = foretell(table, swapped, trainer.first_step(sample, objectives, seed), ends)
    return report
