"""What a run was: the record that trackers keep, and `report.json`, from which its page is made."""

import json
import platform
import subprocess
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_model_param_count

from dft.arguments.config_file import SECRETS, plain
from dft.arguments.objective import objective_of
from dft.arguments.parser import Arguments, default_flags
from dft.console import say
from dft.errors import UserError
from dft.files import write_atomically
from dft.loss.schedule import alpha_of
from dft.report.saved import REPORT, load_report
from dft.report.terminal.start_and_end import derived
from dft.training.batching import dataset_files
from dft.training.measuring.scoring import ScoredSequence
from dft.training.trainer import DFTTrainer

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "deepspeed")
LONGEST_LETTER = 8
"""Tokens after which one that is still no whole letter is given up."""
ROOT = Path(__file__).parent.parent.parent


def run_record(arguments: Arguments, model: PreTrainedModel, data: dict[str, Any]) -> dict[str, Any]:
    """What is known before the first step, as JSON can hold it.

    Args:
        data: `PreparedData.report`.
    """
    training, chosen = arguments.training, derived(arguments, model)
    objective = objective_of(arguments.dft)
    return {
        "name": training.run_name or Path(training.output_dir).name,
        "method": objective.title,
        "alpha": alpha_of(objective),
        "weight": objective.formula(),
        "model": {
            "name": arguments.model.model_name_or_path,
            "parameters": get_model_param_count(model),
            "weights": chosen["weights"],
            "attention": chosen["attention"],
        },
        "arguments": resolved_arguments(arguments),
        "given": given_arguments(arguments),
        "environment": environment(chosen, training.device),
        "data": data,
    }


def resolved_arguments(arguments: Arguments) -> dict[str, Any]:
    """Every flag with the value it came to."""
    groups = (arguments.model, arguments.data, arguments.dft, arguments.lora, arguments.watch)
    values = {name: value for group in groups for name, value in vars(group).items()}
    return _printable({**values, **arguments.training.to_sanitized_dict()})


def given_arguments(arguments: Arguments) -> dict[str, Any]:
    """The flags that are not at their default, as they were given."""
    defaults = default_flags()
    return _printable({name: value for name, value in arguments.given.items() if value != defaults[name]})


def _printable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in values.items() if name not in SECRETS}


def environment(chosen: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Versions, the machine, and the commit of this code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "git_commit": git_commit(ROOT),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": f"{device.type} ({name})",
        "ranks": chosen["ranks"],
        "parallelism": chosen["parallelism"],
        "computes_in": chosen["computes_in"],
    }


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out, with a `+` behind it if files differ; None outside of a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # there is no git, no repository, or one on a disk that does not answer


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True, timeout=30
    ).stdout


class ReportCallback(TrainerCallback):
    """Writes `report.json`, and the page made of it, at each evaluation; `close` does so at the end."""

    def __init__(
        self, trainer: DFTTrainer, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.trainer, self.record, self.tokenizer = trainer, record, tokenizer
        self.folder = Path(trainer.args.output_dir)
        self.views: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run keeps what the model said before it was trained."""
        earlier = self.folder / REPORT
        if not (state.is_world_process_zero and state.global_step and earlier.is_file()):
            return
        try:
            self.views = load_report(self.folder)["tokens"][:1]
        except (UserError, OSError) as error:
            say(f"warning     the report begins anew at step {state.global_step}: {error}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        started = time.perf_counter()
        if state.is_world_process_zero:
            view = {
                "step": state.global_step,
                "conversations": [self._conversation(one) for one in self.trainer.examples],
            }
            self.views = [*self.views[:1], view]
            self._write(state, "running")
        self.trainer.exclude_time(time.perf_counter() - started)

    def close(self, status: str) -> None:
        """Writes the last report, when all else that is to lie beside it does."""
        if self.trainer.is_world_process_zero():
            self._write(self.trainer.state, status)

    def _write(self, state: TrainerState, status: str) -> None:
        from dft.report.pages.run import write_report_page  # brings matplotlib, slow to import

        report = {
            **self.record,
            "status": status,
            "updated": datetime.now().isoformat(timespec="seconds"),
            "steps": {"done": state.global_step, "total": state.max_steps},
            "log": state.log_history,
            "tokens": self.views,
        }
        try:
            write_atomically(self.folder / REPORT, [json.dumps(report, ensure_ascii=False)])
            write_report_page(report, self.folder)
        except OSError as error:  # a full disk is no reason to lose the training
            say(f"warning     no report of step {state.global_step}: {error}")

    def _conversation(self, scored: ScoredSequence) -> dict[str, Any]:
        files = dataset_files(self.trainer.eval_dataset)
        texts = token_texts(self.tokenizer, scored.ids)
        ends = set(self.trainer.end_of_turn_ids)
        return {
            "file": files[scored.file] if 0 <= scored.file < len(files) else "",
            "line": scored.line,
            "shortened": scored.shortened,
            "tokens": [
                [text, p, index in ends]
                for text, p, index in zip(texts, scored.p_correct, scored.ids, strict=True)
            ],
        }


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token as text. A letter of several tokens stands with the last of them, the others are empty."""
    texts: list[str] = []
    before: list[int] = []  # the last tokens that were whole: some tokenizers drop the space of a first one
    pending: list[int] = []
    for place, index in enumerate(ids):
        pending.append(index)
        known = len(_decoded(tokenizer, before)) if before else 0
        text = _decoded(tokenizer, before + pending)[known:]
        if text.endswith("\ufffd") and len(pending) < LONGEST_LETTER and place < len(ids) - 1:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
