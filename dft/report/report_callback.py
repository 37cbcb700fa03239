"""The callback that writes `report.json` and its page while a model is trained."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dft.console import say
from dft.data.templates.token_decoder import TokenDecoder
from dft.errors import UserError
from dft.files import write_atomically
from dft.report.saved_report import RUN_REPORT, RUNNING, load_report
from dft.training.batching import dataset_files
from dft.training.measuring.evaluation_sets import is_first_set, is_last_set
from dft.training.measuring.scoring import ScoredSequence


class ReportedTrainer(Protocol):
    """Interface of the trainer that the report uses; implemented by `DFTTrainer`.

    Attributes:
        examples: scored sequences of the last evaluation.
        end_of_turn_ids: token ids that end a turn.
    """

    args: TrainingArguments
    state: TrainerState
    eval_dataset: Any
    examples: list[ScoredSequence]
    end_of_turn_ids: list[int]

    def exclude_time(self, seconds: float) -> None: ...

    def is_world_process_zero(self) -> bool: ...


class ReportCallback(TrainerCallback):
    """Writes `report.json` and its page after each evaluation, and again on `close`.

    Args:
        trainer: the trainer to report on.
        record: `dft.report.run_record.run_record`.
        tokenizer: decodes the tokens of the shown conversations.
    """

    def __init__(
        self, trainer: ReportedTrainer, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.trainer, self.record, self.tokenizer = trainer, record, tokenizer
        self.folder = Path(trainer.args.output_dir)
        self.views: list[dict[str, Any]] = []  # the scored conversations of the first and the last evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write `report.json`, so that the report in the folder is that of this run from the start.

        If the run is resumed, it keeps the conversations of the first evaluation.
        """
        if not state.is_world_process_zero:
            return
        earlier = self.folder / RUN_REPORT
        if state.global_step and earlier.is_file():
            try:
                self.views = load_report(self.folder)["tokens"][:1]
            except (UserError, OSError) as error:
                say(f"warning     the report starts over at step {state.global_step}: {error}")
        try:
            self._write_json(state, RUNNING)
        except OSError as error:  # a full disk must not stop training
            say(f"warning     the report of step {state.global_step} was not written: {error}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the report on rank 0, outside the measured training time.

        It shows conversations of the first evaluation set, and is written after the last.
        """
        started, sets = time.perf_counter(), self.trainer.eval_dataset
        if state.is_world_process_zero and is_first_set(sets, metrics):
            view = {
                "step": state.global_step,
                "conversations": [self._conversation(example) for example in self.trainer.examples],
            }
            self.views = [*self.views[:1], view]
        if state.is_world_process_zero and is_last_set(sets, metrics):
            self._write(state, RUNNING)
        self.trainer.exclude_time(time.perf_counter() - started)

    def close(self, status: str) -> None:
        """Write the final report. Must be called after the model is saved: the page lists the saved files."""
        if self.trainer.is_world_process_zero():
            self._write(self.trainer.state, status)

    def _write(self, state: TrainerState, status: str) -> None:
        from dft.report.pages.run import write_report_page  # imports matplotlib, which is slow

        try:
            write_report_page(self._write_json(state, status), self.folder)
        except OSError as error:  # a full disk must not stop training
            say(f"warning     the report of step {state.global_step} was not written: {error}")

    def _write_json(self, state: TrainerState, status: str) -> dict[str, Any]:
        """Write `report.json` and return its content."""
        report = {
            "base_scores": None,
            **self.record,
            "status": status,
            "updated": datetime.now().isoformat(timespec="seconds"),
            "steps": {"done": state.global_step, "total": state.max_steps},
            "log": state.log_history,
            "tokens": self.views,
        }
        write_atomically(self.folder / RUN_REPORT, [json.dumps(report, ensure_ascii=False)])
        return report

    def _conversation(self, scored: ScoredSequence) -> dict[str, Any]:
        files = dataset_files(self.trainer.eval_dataset)
        texts = token_texts(self.tokenizer, scored.ids)
        ends = set(self.trainer.end_of_turn_ids)
        return {
            "file": files[scored.file] if 0 <= scored.file < len(files) else "",
            "line": scored.line,
            "shortened": scored.shortened,
            "tokens": [
                [text, p, token_id in ends]
                for text, p, token_id in zip(texts, scored.p_correct, scored.ids, strict=True)
            ],
        }


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """Return the text of each token.

    If several tokens form one character, the last one has its text and the others are empty.
    """
    decoder = TokenDecoder(tokenizer)
    texts = [decoder.push(token_id) or "" for token_id in token_ids]
    if decoder.pending:
        texts[-1] = decoder.flush()
    return texts
