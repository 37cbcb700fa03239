"""Steps of a training run from the command line: checks, tokenizer, models, trainer, training, restart."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.utils.logging import disable_progress_bar

from dft.arguments.conflicts import check_arguments
from dft.arguments.data import template_date, template_variables
from dft.arguments.objective import build_objective, build_schedule
from dft.arguments.parser import Arguments
from dft.arguments.training import TrainingArguments
from dft.console import say
from dft.data.preparing.prepare import PreparedData
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.tokenizer import load_tokenizer, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.loss.objectives import Objective, first_step_equivalent
from dft.training.checkpoints.folder import newest_checkpoint
from dft.training.checkpoints.hub import HUB_ERRORS
from dft.training.checkpoints.output_lock import lock_output_dir
from dft.training.checkpoints.resume_point import prepare_output_folder
from dft.training.early_stopping import early_reason, make_early_stopping
from dft.training.measuring.artifacts import log_artifacts
from dft.training.measuring.tracker_callbacks import finish_trackers
from dft.training.measuring.tracker_setup import check_mlflow_server, prepare_trackers
from dft.training.memory.out_of_memory import SHARD, convert_memory_errors
from dft.training.model.attention import resolve_attention
from dft.training.model.generation import add_stop_tokens
from dft.training.model.loading import load_base_model, load_model
from dft.training.model.positions import check_positions, position_notes
from dft.training.muon import muon_optimizer
from dft.training.optimizer import check_operators, check_optimizer
from dft.training.parallel.rank_watchdog import watch_ranks
from dft.training.parallel.stopping import Stopped, StopRequest
from dft.training.parameters import resolve_find_unused_parameters
from dft.training.patches import skip_deepspeed_import
from dft.training.run_options import RunOptions
from dft.training.trainer import DFTTrainer


def prepare_run(arguments: Arguments) -> None:
    """Check the arguments, and create and lock the output folder, before the data is prepared.

    Raises:
        UserError: an argument is wrong, the output folder cannot be written to or belongs to a live run, or a
            server does not answer.
    """
    check_arguments(arguments)
    prepare_output_folder(arguments)
    if not arguments.watch.preflight and not arguments.watch.plan:
        lock_output_dir(Path(arguments.training.output_dir))
    if not arguments.data.prepare_only:
        check_optimizer(arguments.training)
        if not arguments.watch.preflight and not arguments.watch.plan:  # neither trains
            check_operators(arguments.training)
            check_mlflow_server(arguments.training.report_to)
        resolve_attention(arguments)  # raises if the attention implementation is not available


def set_up_output(training: TrainingArguments) -> list[str]:
    """Disable progress bars if requested, and set up the trackers. Return notes for the user."""
    if training.disable_tqdm:
        disable_progress_bar()
    return prepare_trackers(training.report_to, training.logging_dir)


def load_encoder(arguments: Arguments) -> tuple[PreTrainedTokenizerBase, ChatEncoder]:
    """Return the tokenizer, and the encoder that renders and tokenizes conversations with it."""
    name, flags = arguments.model.model_name_or_path, arguments.data
    trust_remote_code = arguments.model.trust_remote_code
    tokenizer, notes = load_tokenizer(
        name,
        chat_template=flags.chat_template,
        trust_remote_code=trust_remote_code,
        add_tokens=arguments.model.add_tokens or (),
    )
    stops = stop_token_ids(name, trust_remote_code)
    encoder = ChatEncoder(
        tokenizer,
        stops,
        template_variables(flags),
        template_date(flags),
        flags.use_generation_tags,
        arguments.model.add_tokens or (),
    )
    arguments.notes.extend(notes)
    if encoder.template.writes_date:
        arguments.notes.append(
            f"the chat template writes today's date: it is {flags.chat_template_date} for all conversations"
        )
    return tokenizer, encoder


def load_models(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Return the model to train, and the frozen base model if the objective compares with one.

    Raises:
        UserError: a model cannot be loaded, or does not fit into memory.
    """
    set_seed(arguments.training.seed)  # transformers draws weights that it replaces
    with convert_memory_errors("the model's weights do not fit", SHARD):
        model = load_model(arguments, tokenizer)
        check_positions(model, data.longest, arguments.data.max_length)
        arguments.notes.extend(position_notes(model, data.longest))
        note = add_stop_tokens(model, tokenizer, data.report["end_of_turn_tokens"])
        arguments.notes.extend([note] if note else [])
        needs_base = trained_objective(arguments).kl_weight > 0
        return model, load_base_model(arguments, tokenizer) if needs_base else None


def run_options(
    arguments: Arguments, stop: StopRequest, card: Callable[[TrainerState, int, bool], str] | None
) -> RunOptions:
    """Return the options of a run.

    Args:
        arguments: the parsed flags.
        stop: signals that ask the run to stop.
        card: returns the text of the model card; None to not write one.
    """
    return RunOptions(
        stop=stop,
        requested_batch=arguments.training.requested_batch,
        card=card,
        verify_save=arguments.watch.verify_save,
        trust_remote_code=arguments.model.trust_remote_code,
        trust_checkpoint=arguments.training.trust_checkpoint,
        ema_decay=arguments.training.ema_decay,
        console_metrics=tuple(arguments.watch.console_metrics),
        early_stopping=make_early_stopping(arguments.training),
        log_artifacts=arguments.watch.log_artifacts,
        new_tokens=tuple(arguments.new_tokens),
    )


def trained_objective(arguments: Arguments) -> Objective:
    """Return the objective of the trainer. A preflight only scores: it has no base scores or base model."""
    objective = build_objective(arguments.dft)
    return first_step_equivalent(objective) if arguments.watch.preflight else objective


def make_trainer(
    arguments: Arguments,
    models: tuple[PreTrainedModel, PreTrainedModel | None],
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    options: RunOptions,
) -> DFTTrainer:
    """Return the trainer of a run.

    Args:
        arguments: the parsed flags.
        models: the model to train, and the base model or None, see `load_models`.
        data: the prepared data.
        tokenizer: the tokenizer, which is saved with the model.
        options: settings of the run.

    Raises:
        UserError: transformers rejects an argument, the hub cannot be reached, or memory runs out.
    """
    training, (model, base_model) = arguments.training, models
    skip_deepspeed_import()
    training.ddp_find_unused_parameters = resolve_find_unused_parameters(model, training)
    try:
        with convert_memory_errors("the model's weights do not fit", SHARD):
            return DFTTrainer(
                model,
                training,
                objective=trained_objective(arguments),
                alpha_schedule=build_schedule(arguments.dft),
                end_of_turn_weight=arguments.dft.end_of_turn_weight,
                base_model=base_model,
                fused_head=arguments.dft.fused_head,
                end_of_turn_ids=tokenizer.convert_tokens_to_ids(list(data.report["end_of_turn_tokens"])),
                log_per_file=arguments.watch.log_per_file,
                on_nonfinite=arguments.watch.on_nonfinite,
                optimizer_cls_and_kwargs=muon_optimizer(training),
                train_dataset=data.datasets["train"],
                eval_dataset=data.evaluation,
                processing_class=tokenizer,
                options=options,
            )
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    except HUB_ERRORS as error:
        if not training.push_to_hub:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push_to_hub True: the repository on the hub cannot be created: {reason}; log in (hf auth "
            "login, or HF_TOKEN), or push the model after training"
        ) from None


def train_and_save(arguments: Arguments, trainer: DFTTrainer, close_report: Callable[[str], None]) -> None:
    """Train and save the model. Always closes the report and the trackers.

    Args:
        arguments: the parsed flags.
        trainer: the trainer.
        close_report: writes the last report, given the status of the run as text.

    Raises:
        Stopped: a signal stopped the run.
        UserError: the run cannot continue, for example after a non-finite loss or on a full disk.
        OutOfMemory: memory ran out.
    """
    status = "stopped by an error"
    failure: str | None = "an error"
    is_complete = False
    try:
        with watch_ranks(arguments.training.ddp_timeout) as trainer.options.heartbeat.watchdog:
            trainer.train(resume_from_checkpoint=arguments.training.resume_from_checkpoint)
            trainer.save_model()
            trainer.save_state()
        status, failure = finished_status(trainer.state, trainer.options), None
        is_complete = True
    except Stopped as stopped:
        status, failure = str(stopped), None
        raise
    except UserError as error:
        status, failure = f"stopped: {error}", str(error)
        raise
    finally:
        if trainer.options.stop is not None:
            trainer.options.stop.end_training()
        close_report(status)
        try:
            if is_complete and arguments.watch.log_artifacts:
                log_artifacts(trainer.args, trainer.options.model_files, trainer.callback_handler.callbacks)
        finally:
            callbacks = trainer.callback_handler.callbacks
            finish_trackers(arguments.training.report_to, failure, callbacks, is_complete)
        report_user_errors()  # wandb replaces sys.excepthook


def finished_status(state: TrainerState, options: RunOptions) -> str:
    """Return the status of a run that ended without an error, for its report."""
    if state.global_step >= state.max_steps:
        return "finished"
    reason = early_reason(state, options.early_stopping)
    return f"finished early: {reason}" if reason else "finished early"


def restart(output_dir: Path, reason: str) -> NoReturn:
    """Run the same command again in this process. It reads the smaller batch from the output directory."""
    say(f"warning     {reason}; starting again")
    has_checkpoint = newest_checkpoint(output_dir)[0] is not None
    flags = ["--resume_from_checkpoint", "auto", "--overwrite_output_dir", "False"] if has_checkpoint else []
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*sys.orig_argv, *flags])
