"""transformers' Trainer with checkpoints that are whole or not there, and runs that stop with one."""

import json
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import xxhash
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.console import say
from dft.errors import UserError
from dft.files import write_atomically
from dft.ranks import describe_parallelism, first_failure, rows_per_step
from dft.training.batching import sequence_lengths
from dft.training.checkpoints.disk import move_files, sees_the_same, writing_a_save
from dft.training.checkpoints.folder import (
    UNFINISHED,
    publish,
    rotate,
    seal,
    unfinished,
)
from dft.training.checkpoints.hub import PublishingTrainer
from dft.training.checkpoints.verify import Damaged, Expected, check_files, check_loaded, dtypes_of, probe
from dft.training.model.adapters import has_adapters, write_base_record
from dft.training.parallel.stopping import Stopped
from dft.training.parameters import shapes_digest
from dft.training.run_options import RunOptions

RUN_STATE = "run_state.json"
"""In a checkpoint: what transformers does not keep of the moment at which it was written."""
CARD, PICTURE = "README.md", "report.png"
MADE_HERE = "<!-- model card by train_dft.py -->"
"""In a README.md that the next one may replace."""
UNFINISHED_MODEL = f"{UNFINISHED}model"
"""In the output directory, where the final model is written before it takes the place of an earlier one."""
LOOKED_EVERY = 10
"""Batches of an evaluation after which the ranks agree whether they were asked to stop, for which they
wait for the device."""


@dataclass
class PendingEvents:
    """What was still to be done after the step of a checkpoint, and is done first when a run goes on from it.

    Attributes:
        evaluate, save: were due, and put off because the run was asked to stop.
        end_epoch: the events at the end of an epoch, which come after those at the end of its last step.
    """

    evaluate: bool = False
    save: bool = False
    end_epoch: bool = False


@dataclass
class LastStep:
    """What a line of the log at the end of an epoch says of the step before.

    Attributes:
        logged: the step of the last line of the log.
    """

    grad_norm: float | None = None
    learning_rate: float | None = None
    logged: int = 0


class StoppedEvaluation(Exception):
    """An evaluation that was cut short, on all ranks at once."""


class SavingTrainer(PublishingTrainer):
    """How checkpoints are written, and how a run stops when it is asked to. Knows nothing of the loss."""

    def __init__(self, *args: Any, options: RunOptions | None = None, **kwargs: Any) -> None:
        self.options = options or RunOptions()
        super().__init__(*args, **kwargs)
        self._left = PendingEvents()
        self._last = LastStep()
        self._seen_step = 0  # whose events at its end have begun
        self._is_end_of_epoch = False
        self._shapes = ""
        self._due = PendingEvents()  # of the step whose end is being seen to
        self._shares_disk: bool | None = None  # with rank 0, the output directory's
        self._full_at: int | None = None  # the step of the last checkpoint to go on from
        self._known_order: dict[str, Any] | None = None
        self._evaluated_batches = 0

    # ---- what a subclass adds ----

    def _state_to_keep(self) -> dict[str, Any]:
        """What else has to be in a checkpoint, as JSON holds it. A collective."""
        return {}

    def _method(self) -> str:
        """What is learned, in words that are the same as long as it is."""
        return ""

    # ---- writing ----

    def _save_checkpoint(
        self, model: nn.Module, trial: Any, left: PendingEvents | None = None, full: bool = False
    ) -> None:
        """Writes a checkpoint under another name and gives it its own when all of it is on disk.

        Only then older ones are removed. A save that fails leaves them all, and no half of its own.

        Args:
            left: what is still to be done after this step.
            full: also under --save_only_model True.
        """
        self._beat()
        args, state = self.args, self.state
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        staging, is_full = unfinished(folder), full or not args.save_only_model
        if trial is None:
            self.store_flos()
        with writing_a_save(run, staging):
            if not run.is_dir():
                raise UserError(
                    f"--output_dir {run}: it is gone, so step {state.global_step} cannot be saved; was a "
                    "disk unmounted, or the folder removed?"
                )
            self._clear(staging)
            self.save_model(str(staging), _internal_call=True)
            self._verify(staging, folder, in_full=self.options.verify_save == "all")
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best == folder or best.exists()):
                state.best_model_checkpoint = str(best)
            if is_full:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
                self._save_run_state(staging, left or self._left_after_step())
            if args.should_save:
                self._note_callbacks()
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            self._publish(folder, is_full)
        self._full_at = state.global_step if is_full else self._full_at
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self._owns_disk(run):
            rotate(run, args.save_total_limit, state.best_model_checkpoint)

    def _save_finished_step(self) -> None:
        """A checkpoint of the last step that was finished, where the next one failed half-way."""
        if self.state.global_step and self._full_at != self.state.global_step:
            self._take_back_step()
            self._save_checkpoint(self.model_wrapped, None, left=self._due, full=True)

    def _take_back_step(self) -> None:
        """Forgets what is there of a step that was not finished."""
        self.model.zero_grad()

    def _publish(self, folder: Path, is_full: bool) -> None:
        facts = {
            "step": self.state.global_step,
            "resumable": is_full,
            "ranks": self.args.world_size,
            "rows_per_step": rows_per_step(self.args),
            "parallelism": describe_parallelism(self.args),
            "order": self._order(),
            "model": self._shapes,
            "method": self._method(),
        }
        if self._owns_disk(folder.parent):
            seal(unfinished(folder), facts)
            publish(folder)
        self.accelerator.wait_for_everyone()

    def _owns_disk(self, folder: Path) -> bool:
        """Whether this rank is the one that clears and renames on the disk of a folder: rank 0, and the first
        rank of each machine that has a disk of its own there. A collective when it is first asked."""
        if self._shares_disk is None:
            self._shares_disk = sees_the_same(folder, self.accelerator)
        if self.is_world_process_zero():
            return True
        return self.accelerator.is_local_main_process and not self._shares_disk

    def _order(self) -> dict[str, Any]:
        """What the order of the data depends on; of the data themselves the number and lengths of rows."""
        if self._known_order is None:
            args, dataset = self.args, self.train_dataset
            known = dataset is not None and not isinstance(dataset, IterableDataset)
            lengths = np.ascontiguousarray(sequence_lengths(dataset) if known else [], dtype=np.int64)
            self._known_order = {
                "rows": len(lengths),
                "lengths": xxhash.xxh3_64_hexdigest(lengths.tobytes()),
                "seed": args.seed,
                "data_seed": args.data_seed,
                "train_sampling_strategy": args.train_sampling_strategy,
                "dataloader_drop_last": args.dataloader_drop_last,
            }
        return self._known_order

    def _note_callbacks(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, kept = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(kept)
                else:
                    self.state.stateful_callbacks[name] = kept

    def _save_run_state(self, folder: Path, left: PendingEvents) -> None:
        losses = self.accelerator.gather(self._tr_loss.detach()[None]).tolist()
        kept = {
            "left": asdict(left),
            "last": asdict(self._last),
            "losses": losses,
            "total_loss": self._total_loss_scalar,
            **self._state_to_keep(),
        }
        if self.is_world_process_zero():
            write_atomically(folder / RUN_STATE, [json.dumps(kept)])

    def _left_after_step(self) -> PendingEvents:
        state = self.state
        ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        return PendingEvents(end_epoch=ends and not self._is_end_of_epoch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model. What lies there already is replaced file by file when the new one is complete."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        staging = folder / UNFINISHED_MODEL
        with writing_a_save(folder, staging):
            self._clear(staging)
            super().save_model(str(staging), _internal_call=True)
            self._verify(staging, folder, in_full=True)
            if self.args.should_save:
                self._spare_readme(staging, folder)
                self._written = [path.name for path in staging.iterdir()]
                move_files(staging, folder)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._publish_model("Model save")

    def _verify(self, written: Path, place: Path, in_full: bool) -> None:
        """Looks at a model that was just written. A collective.

        Args:
            place: where it is to take its place.
            in_full: loads it again and compares logits; else its files are read.

        Raises:
            UserError: it is not what was trained.
        """
        self._beat()
        self.accelerator.wait_for_everyone()
        if self.options.verify_save == "False":
            return
        logits, vocab = None, self.model.config.get_text_config().vocab_size
        if in_full:
            model = self.model_wrapped
            model = model._orig_mod if is_compiled_module(model) else model
            logits = probe(model, vocab, self.args.device)
        fault = None
        if self.is_world_process_zero():  # the others get no weights, also under --save_on_each_node True
            quantized = vars(self.model.config).get("quantization_config")
            expected = Expected(dtypes_of(self.model), self.processing_class, logits, quantized)
            try:
                check_files(written, expected)
                if in_full:
                    check_loaded(written, expected, self.args, self.options.trust_remote_code)
            except Damaged as found:
                fault = str(found)
        fault = first_failure(fault)
        if fault is not None:
            raise UserError(
                f"--verify_save {self.options.verify_save}: the model that was just saved is not the one "
                f"that was trained: {fault}; it lies in {written}, and what {place} held before is as it "
                "was. Please "
                "report this; --verify_save False saves without looking"
            )

    def _clear(self, staging: Path) -> None:
        """Makes an empty folder of it, whatever an earlier save left there."""
        staging.parent.mkdir(parents=True, exist_ok=True)
        if self._owns_disk(staging.parent) and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        staging.mkdir(parents=True, exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # Trainer's pickle of its arguments, which nothing reads, and in which a token of the hub would stand.
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink()
            if has_adapters(self.model):
                write_base_record(folder, self.model, self._shapes)
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        if self.options.card is None:
            return
        picture = Path(self.args.output_dir) / PICTURE
        if picture.is_file() and folder != picture.parent:
            shutil.copy(picture, folder)
        write_atomically(folder / CARD, [self.options.card(self.state, picture.is_file()), MADE_HERE, "\n"])

    def _spare_readme(self, staging: Path, folder: Path) -> None:
        """Leaves a README.md of somebody else where it is."""
        there, new = folder / CARD, staging / CARD
        if new.is_file() and there.is_file() and MADE_HERE not in there.read_text(errors="replace"):
            new.unlink()
            say(f"note        {there} is not of this program and stays as it is, without a model card")

    # ---- what takes place at the end of a step ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._shapes = shapes_digest(self.model)  # before FSDP flattens its weights
        self._last, self._seen_step, self._full_at, self._known_order = LastStep(), 0, None, None
        self._due = PendingEvents()
        if self.options.stop is not None:
            self.options.stop.begin_training()
        return super()._inner_training_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        step = self.state.global_step
        self._is_end_of_epoch, self._seen_step = self._seen_step == step, step
        norm = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm  # it was waited for already
        self._last.grad_norm, self._last.learning_rate = norm, learning_rate
        if self.control.should_log:
            self._last.logged = step
        due = PendingEvents(
            self.control.should_evaluate, self.control.should_save, self._left_after_step().end_epoch
        )
        self._due, asked = due, self._is_asked_to_stop()
        if asked:  # an evaluation may take longer than there is time
            self.control.should_evaluate = self.control.should_save = False
        place = (trial, epoch, ignore_keys_for_eval, start_time)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *place, learning_rate=learning_rate)
        except StoppedEvaluation:
            asked = True
        else:
            if self._full_at == step and not asked and self._is_asked_to_stop():
                self._stop(step)
        if asked:
            self._save_checkpoint(model, trial, left=due, full=True)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._stop(step)
        self._due = PendingEvents()

    def _evaluate(
        self, trial: Any, ignored: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Trainer's, but --eval_on_start (which alone skips the scheduler) is for the start of a run only."""
        if not skip_scheduler:
            return super()._evaluate(trial, ignored)
        if self.state.global_step:
            return {}
        try:
            return super()._evaluate(trial, ignored, skip_scheduler)
        except StoppedEvaluation:
            raise Stopped(self._signal, 0, None) from None

    def _stop(self, step: int) -> NoReturn:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        raise Stopped(self._signal, step, str(folder))

    def _is_asked_to_stop(self) -> bool:
        """Whether any rank was. A collective, for all of them have to stop after the same step."""
        if self.options.stop is None:
            return False
        number = self.options.stop.number
        if self.args.world_size > 1:
            number = self.accelerator.gather(torch.tensor([number], device=self.args.device)).max().item()
        self._signal = signal.Signals(number).name if number else ""
        return bool(number)

    def _look_for_stop(self) -> None:
        """For every batch of an evaluation. A collective now and then."""
        self._beat()
        if self.is_in_train:
            self._evaluated_batches += 1
            if self._evaluated_batches % LOOKED_EVERY == 0 and self._is_asked_to_stop():
                raise StoppedEvaluation

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._beat()
        return super().training_step(*args, **kwargs)

    def _beat(self) -> None:
        self.options.heartbeat.beat()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own mean of the loss, in its last line, is one over the steps since the run went on."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)
