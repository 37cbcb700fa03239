"""The steps of a run after its command line is parsed: tokenizer, data, model, trainer, training, saving."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dft.arguments.batch_search import check_same_batch
from dft.arguments.conflicts import check_batches, find_notes
from dft.arguments.data import prepare_options
from dft.arguments.parser import Arguments
from dft.console import say
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.errors import EXIT_STOPPED, OutputClosed, output_is_closed
from dft.ranks import exit_rank, is_launched, is_main_process
from dft.report.base_scores import score_data
from dft.report.callbacks import add_reports
from dft.report.model_card import saved_model_card
from dft.report.preflight import run_preflight
from dft.report.report_callback import ReportCallback
from dft.report.run_record import run_record
from dft.report.terminal.data import data_summary, show_sequences
from dft.report.terminal.plan import plan_lines
from dft.report.terminal.start_and_end import (
    adapter_loader,
    final_lines,
    new_notes,
    start_lines,
    stopped_lines,
    write_resolved_arguments,
)
from dft.training.batching import describe_batching
from dft.training.checkpoints.disk_space import check_space
from dft.training.checkpoints.folder import clear_away
from dft.training.checkpoints.resume_point import resolve_resume
from dft.training.early_stopping import early_reason
from dft.training.memory.out_of_memory import OutOfMemory
from dft.training.memory.shared_memory import check_shared_memory
from dft.training.model.loading import load_meta_model
from dft.training.parallel.stopping import Stopped, StopRequest
from dft.training.run import (
    load_encoder,
    load_models,
    make_trainer,
    prepare_run,
    restart,
    run_options,
    set_up_output,
    train_and_save,
)
from dft.training.trainer import DFTTrainer


def fine_tune(arguments: Arguments, stop: StopRequest) -> None:
    """Carry out a run, or the part of one that --prepare_only, --plan or --preflight asks for.

    Args:
        arguments: the parsed flags.
        stop: signals that ask the run to stop.
    """
    prepare_run(arguments)
    arguments.training.resume_from_checkpoint, notes = resolve_resume(arguments)
    arguments.notes.extend([*notes, *find_notes(arguments), *set_up_output(arguments.training)])
    tokenizer, encoder = load_encoder(arguments)
    say(*new_notes(arguments))
    data = prepare_data(arguments, encoder)
    if arguments.data.prepare_only:
        write_resolved_arguments(arguments)
        say(f"prepared: {data.path}")
        return
    check_batches(arguments, len(data.datasets["train"]))
    if arguments.watch.plan:
        return show_plan(arguments, tokenizer, data)
    longest = arguments.data.max_length if arguments.data.packing else data.longest
    check_shared_memory(arguments.training, longest)
    models = load_models(arguments, tokenizer, data)
    data = score_data(arguments, models[0], tokenizer, data)
    if arguments.dft.base_scores == "only":
        return exit_rank()
    record: dict[str, Any] = {}  # describes the arguments as resolved by the trainer, so it is filled later
    card = partial(saved_model_card, record) if is_main_process() else None
    trainer = make_trainer(arguments, models, data, tokenizer, run_options(arguments, stop, card))
    check_same_batch(arguments.training)
    if arguments.watch.preflight:
        run_preflight(arguments, trainer, tokenizer)
        exit_rank()
        return
    check_space(models[0], arguments.training, len(data.datasets["train"]))
    if is_main_process():
        record.update(run_record(arguments, models[0], data.report))
    report = add_reports(arguments, trainer, encoder, data, record)
    clear_away(arguments.training)
    write_resolved_arguments(arguments, models[0])
    batching = describe_batching(trainer.data_collator)
    say(*start_lines(arguments, models[0], data.report, batching), *new_notes(arguments))
    train(arguments, trainer, report)
    early = early_reason(trainer.state, trainer.options.early_stopping)
    loader = adapter_loader(arguments)
    say(*final_lines(trainer.state, arguments.training, arguments.watch.report, loader, early))
    exit_rank()


def prepare_data(arguments: Arguments, encoder: ChatEncoder) -> PreparedData:
    """Return the prepared data. Print its report, and write it unless this is an inspection run."""
    flags, training = arguments.data, arguments.training
    data = prepare(
        flags.data_files,
        flags.eval_data_files,
        encoder,
        prepare_options(flags, arguments.data_seed),
        cache_dir=Path(flags.data_cache_dir).expanduser(),
        workers=flags.preprocessing_num_workers,
    )
    is_inspection = arguments.watch.preflight or arguments.watch.plan  # the folder may contain a run
    if is_main_process() and not is_inspection:
        data.write_report(Path(training.output_dir))
    say(*data_summary(data.report, None if is_inspection else training.output_dir))
    if flags.debug_data_processing:
        say(show_sequences(data.datasets["train"].unpacked(), encoder.tokenizer))
    return data


def show_plan(arguments: Arguments, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
    """Print the size and memory of a run, and the closest settings that fit. Loads no weights."""
    model = load_meta_model(arguments, tokenizer)
    say(*plan_lines(arguments, model, data.report, data), *new_notes(arguments))


def train(arguments: Arguments, trainer: DFTTrainer, report: ReportCallback | None) -> None:
    """Train and save. Exit if a signal stops the run; restart with a smaller batch if one was recorded."""
    try:
        train_and_save(arguments, trainer, report.close if report else lambda status: None)
    except Stopped as stopped:
        say(*stopped_lines(stopped))
        exit_rank(EXIT_STOPPED)
    except BrokenPipeError:
        if not output_is_closed():
            raise
        raise OutputClosed(
            "the program that read the output has ended, which ends the run too; write the output to a file "
            "(> log 2>&1), and continue from the newest checkpoint with --resume_from_checkpoint auto"
        ) from None
    except OutOfMemory as error:
        if not error.smaller or is_launched():
            raise
        restart(Path(arguments.training.output_dir), str(error))
