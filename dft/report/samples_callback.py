"""The callback that generates, prints and stores samples at each evaluation."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from dft.console import say
from dft.data.preparing.prompts import ReferencePrompt
from dft.report.samples_file import SAMPLES, Row, append_samples
from dft.report.terminal.samples import prompt_lines, sample_lines
from dft.training.checkpoints.run_state import RandomState
from dft.training.measuring.evaluation_sets import is_last_set
from dft.training.measuring.samples import LESS_MEMORY, AnswerGenerator, GeneratedAnswer
from dft.training.measuring.tables import send_table
from dft.training.parallel.stopping import StopControl
from dft.training.run_options import RunOptions

COLUMNS = ("sample", "step", "prompt", "reference", "answer", "tokens", "ended")
"""Columns of the table that trackers get."""


class SampledTrainer(Protocol):
    """Interface of the trainer that samples need; implemented by `DFTTrainer`."""

    args: TrainingArguments
    model: PreTrainedModel
    accelerator: Accelerator
    callback_handler: CallbackHandler
    eval_dataset: Any
    options: RunOptions

    def exclude_time(self, seconds: float) -> None: ...


class SamplesCallback(TrainerCallback):
    """Lets the model continue prompts after each evaluation. Must come before the callback of the report.

    Args:
        trainer: the trainer.
        prompts: the prompts, equal on all ranks.
        generator: generates the answers to them.
        tokenizer: decodes the answers.
        max_tokens: maximum number of tokens of an answer.
    """

    def __init__(
        self,
        trainer: SampledTrainer,
        prompts: Sequence[ReferencePrompt],
        generator: AnswerGenerator,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
    ) -> None:
        self.trainer, self.prompts, self.generator = trainer, prompts, generator
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._stop = StopControl(trainer.options.stop, trainer.accelerator)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        say(*prompt_lines(self.prompts, self.max_tokens))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Generate answers on all ranks, outside the measured training time, without any effect on training.

        With several evaluation sets, this is done once, after the last of them.

        Raises:
            UserError: memory runs out on a rank of a sharded model.
        """
        if not is_last_set(self.trainer.eval_dataset, metrics):
            return
        started, random_state = time.perf_counter(), RandomState.capture()
        plain = self.trainer.accelerator.unwrap_model(model)
        generated = self.generator.generate(plain, self._stop.is_requested)
        random_state.restore()
        if generated.failure is not None:
            say(
                f"warning     no samples of step {state.global_step}: out of memory ({generated.failure}); "
                f"{LESS_MEMORY}"
            )
        elif generated.is_stopped:
            say(f"note        no samples of step {state.global_step}: the run was asked to stop")
        elif state.is_world_process_zero:
            self._record([self._row(answer, state.global_step) for answer in generated.answers], state)
        self.trainer.exclude_time(time.perf_counter() - started)

    def _row(self, answer: GeneratedAnswer, step: int) -> Row:
        prompt = self.prompts[answer.prompt]
        text = self.tokenizer.decode(
            answer.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return {
            "step": step,
            "sample": answer.prompt + 1,
            "file": prompt.file,
            "line": prompt.line,
            "question": prompt.question,
            "prompt": prompt.text,
            "reference": prompt.reference,
            "answer": text,
            "tokens": len(answer.ids),
            "ended": answer.ended,
        }

    def _record(self, rows: list[Row], state: TrainerState) -> None:
        """Print, store and send the samples of an evaluation. Only rank 0 calls it."""
        with tqdm.external_write_mode():
            say(*sample_lines(rows, state.global_step, state.max_steps))
        file = Path(self.trainer.args.output_dir) / SAMPLES
        try:
            append_samples(file, rows)
        except OSError as error:  # a full disk must not stop training
            say(f"warning     the samples of step {state.global_step} were not written: {error}")
        values = [[row[column] for column in COLUMNS] for row in rows]
        send_table(self.trainer.callback_handler, "eval/samples", COLUMNS, values, state.global_step)
