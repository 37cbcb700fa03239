r"""Fine-tune a causal language model with Dynamic Fine-Tuning (DFT, arXiv 2508.05629).

    deepspeed train_dft.py --deepspeed ds_config/zero3.json --bf16 True --model_name_or_path MODEL \
        --data_files train.jsonl --validation_split_percentage 2 --eval_strategy steps --output_dir runs/first
    python train_dft.py --model_name_or_path MODEL --data_files train.jsonl --output_dir runs/first
    python train_dft.py --help

scripts/train.sh holds a complete command to edit; the README explains the flags.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.utils.logging import disable_progress_bar

from dft.arguments.batch_search import check_same_batch
from dft.arguments.conflicts import check_arguments, check_batches, find_notes
from dft.arguments.data import prepare_options, template_date, template_variables
from dft.arguments.objective import build_objective, build_schedule
from dft.arguments.parser import Arguments, parse_arguments
from dft.console import say
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.tokenizer import load_tokenizer, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.ranks import exit_rank, is_launched, is_main_process
from dft.report.model_card import model_card
from dft.report.preflight_advice import preflight_report
from dft.report.report_callback import ReportCallback
from dft.report.run_record import run_record
from dft.report.terminal.data import data_summary, show_sequences
from dft.report.terminal.plan import plan_lines
from dft.report.terminal.preflight import preflight_lines
from dft.report.terminal.start_and_end import (
    final_lines,
    new_notes,
    start_lines,
    stopped_lines,
    write_resolved_arguments,
)
from dft.training.batching import describe_batching
from dft.training.checkpoints.disk_space import check_space
from dft.training.checkpoints.folder import clear_away, newest_checkpoint
from dft.training.checkpoints.hub import HUB_ERRORS
from dft.training.checkpoints.resume_point import check_output
from dft.training.measuring.console import tag_warnings
from dft.training.measuring.tracker_setup import finish_trackers, prepare_trackers
from dft.training.measuring.trackers import RunRecordCallback
from dft.training.memory.out_of_memory import SHARD, OutOfMemory, telling_what_did_not_fit
from dft.training.model.attention import resolve_attention
from dft.training.model.generation import add_stop_tokens
from dft.training.model.loading import load_base_model, load_meta_model, load_model
from dft.training.model.positions import check_positions, position_notes
from dft.training.optimizer import check_optimizer
from dft.training.parallel.rank_watchdog import watch_ranks
from dft.training.parallel.stopping import STOPPED, Stopped, StopRequest
from dft.training.parameters import resolve_find_unused_parameters
from dft.training.run_options import RunOptions
from dft.training.trainer import DFTTrainer


def main() -> None:
    report_user_errors()
    stop = StopRequest()
    stop.listen()
    tag_warnings()
    arguments = parse_arguments()
    check_arguments(arguments)
    check_output(arguments)
    arguments.notes.extend(find_notes(arguments))
    if not arguments.data.prepare_only:
        check_optimizer(arguments.training)
        resolve_attention(arguments)  # fails before an hour of tokenizing, not after
    if arguments.training.disable_tqdm:
        disable_progress_bar()
    arguments.notes.extend(prepare_trackers(arguments.training.report_to, arguments.training.logging_dir))

    tokenizer, notes = load_tokenizer(
        arguments.model.model_name_or_path,
        chat_template=arguments.data.chat_template,
        trust_remote_code=arguments.model.trust_remote_code,
    )
    arguments.notes.extend(notes)
    for line in new_notes(arguments):
        say(line)
    stops = stop_token_ids(arguments.model.model_name_or_path, arguments.model.trust_remote_code)
    wanted = arguments.data
    encoder = ChatEncoder(tokenizer, stops, template_variables(wanted), template_date(wanted))
    if encoder.template.writes_date:
        say(f"the chat template writes today's date: it is {wanted.chat_template_date} for all conversations")
    data = prepare_data(arguments, encoder)
    if arguments.data.debug_data_processing:
        say(show_sequences(data.datasets["train"].unpacked(), tokenizer))
    if arguments.data.prepare_only:
        write_resolved_arguments(arguments)
        say(f"prepared: {data.path}")
        return

    check_batches(arguments, len(data.datasets["train"]))
    if arguments.watch.plan:
        for line in plan_lines(arguments, load_meta_model(arguments), data.report):
            say(line)
        return
    set_seed(arguments.training.seed)  # the rows of new tokens are drawn at random
    with telling_what_did_not_fit("the model's weights do not fit", SHARD):
        model = load_model(arguments, tokenizer)
    check_positions(model, data.longest, arguments.data.max_length)
    arguments.notes.extend(position_notes(model, data.longest))
    arguments.training.ddp_find_unused_parameters = resolve_find_unused_parameters(model, arguments.training)
    note = add_stop_tokens(model, tokenizer, data.report["end_of_turn_tokens"])
    arguments.notes.extend([note] if note else [])
    with telling_what_did_not_fit("the model's weights do not fit", SHARD):
        base = load_base_model(arguments, tokenizer) if build_objective(arguments.dft).kl_weight else None
        record: dict[str, Any] = {}  # filled below: it describes the arguments as the trainer resolves them
        trainer = make_trainer(arguments, model, data, tokenizer, base, run_options(arguments, stop, record))
    check_same_batch(arguments.training)
    if arguments.watch.preflight:
        preflight(arguments, trainer, tokenizer)
        exit_rank()
        return
    check_space(model, arguments.training, len(data.datasets["train"]))
    if is_main_process():
        record.update(run_record(arguments, model, data.report))
    trainer.add_callback(RunRecordCallback(record, trainer.callback_handler))
    report = ReportCallback(trainer, record, tokenizer)
    if arguments.watch.report:
        trainer.add_callback(report)
    clear_away(arguments.training)
    write_resolved_arguments(arguments, model)
    for line in (
        *start_lines(arguments, model, data.report, describe_batching(trainer.data_collator)),
        *new_notes(arguments),
    ):
        say(line)
    try:
        train(arguments, trainer, report)
    except Stopped as stopped:
        for line in stopped_lines(stopped):
            say(line)
        exit_rank(STOPPED)
    except OutOfMemory as error:
        if not error.smaller or is_launched():
            raise
        start_again(Path(arguments.training.output_dir), str(error))
    adapters = arguments.lora.lora_r is not None
    for line in final_lines(trainer.state, arguments.training, arguments.watch.report, adapters):
        say(line)
    exit_rank()


def train(arguments: Arguments, trainer: DFTTrainer, report: ReportCallback) -> None:
    """Trains and saves; however that ends, the report and the trackers say how."""
    status, failure = "stopped by an error", "an error"
    try:
        with watch_ranks(arguments.training.ddp_timeout) as trainer.options.heartbeat.watchdog:
            trainer.train(resume_from_checkpoint=arguments.training.resume_from_checkpoint)
            trainer.save_model()
            trainer.save_state()
        status = "finished" if trainer.state.global_step >= trainer.state.max_steps else "finished early"
        failure = None
    except Stopped as stopped:
        status, failure = str(stopped), None
        raise
    except UserError as error:  # a step that is not finite, a full disk
        status, failure = f"stopped: {error}", str(error)
        raise
    finally:
        trainer.options.stop.end_training()
        if arguments.watch.report:
            report.close(status)
        finish_trackers(arguments.training.report_to, failure)
        report_user_errors()  # wandb puts a hook of its own in front


def start_again(output_dir: Path, reason: str) -> NoReturn:
    """The same command once more, in this process. What it tells apart is in the output directory."""
    say(f"warning     {reason}; starting again")
    goes_on = newest_checkpoint(output_dir)[0] is not None
    more = ["--resume_from_checkpoint", "auto", "--overwrite_output_dir", "False"] if goes_on else []
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*sys.orig_argv, *more])


def run_options(arguments: Arguments, stop: StopRequest, record: dict[str, Any]) -> RunOptions:
    """Return the options of the run. `record` is that of the model card, see `dft.report.record`."""
    return RunOptions(
        stop=stop,
        requested_batch=arguments.training.requested_batch,
        card=partial(written_card, record) if is_main_process() else None,
        verify_save=arguments.watch.verify_save,
        trust_remote_code=arguments.model.trust_remote_code,
        trust_checkpoint=arguments.training.trust_checkpoint,
        console_metrics=tuple(arguments.watch.console_metrics),
    )


def written_card(record: dict[str, Any], state: TrainerState, pictured: bool) -> str:
    """Return the model card of a save."""
    return model_card(record, state.log_history, state.global_step, state.max_steps, pictured)


def make_trainer(
    arguments: Arguments,
    model: PreTrainedModel,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel | None,
    options: RunOptions,
) -> DFTTrainer:
    """The trainer; what transformers refuses of its arguments is the user's to mend."""
    try:
        return DFTTrainer(
            model,
            arguments.training,
            objective=build_objective(arguments.dft),
            alpha_schedule=build_schedule(arguments.dft),
            end_of_turn_weight=arguments.dft.end_of_turn_weight,
            base_model=base,
            fused_head=arguments.dft.fused_head,
            end_of_turn_ids=tokenizer.convert_tokens_to_ids(list(data.report["end_of_turn_tokens"])),
            log_per_file=arguments.watch.log_per_file,
            on_nonfinite=arguments.watch.on_nonfinite,
            train_dataset=data.datasets["train"],
            eval_dataset=data.datasets.get("eval"),
            processing_class=tokenizer,
            options=options,
        )
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    except HUB_ERRORS as error:
        if not arguments.training.push_to_hub:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push_to_hub True: no repository can be made on the hub: {reason}; log in (hf auth login, or "
            "HF_TOKEN), or push the model when it is trained"
        ) from None


def preflight(arguments: Arguments, trainer: DFTTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Scores a sample of the training data with the model as it is, and says what follows."""
    from dft.report.pages.preflight import write_preflight  # brings matplotlib, slow to import

    training, watch = arguments.training, arguments.watch
    sample = trainer.train_dataset.sample(watch.preflight_samples, training.seed)
    table, name = trainer.score(sample), arguments.model.model_name_or_path
    report = preflight_report(table, sample.files, trainer.end_of_turn_ids, tokenizer.decode, name)
    if is_main_process():
        write_preflight(report, Path(training.output_dir))
    for line in preflight_lines(report, training.output_dir):
        say(line)


def prepare_data(arguments: Arguments, encoder: ChatEncoder) -> PreparedData:
    """The prepared data, with its report written into the output directory."""
    wanted, training = arguments.data, arguments.training
    data = prepare(
        wanted.data_files,
        wanted.eval_data_files,
        encoder,
        prepare_options(wanted, arguments.data_seed),
        cache_dir=Path(wanted.data_cache_dir).expanduser(),
        workers=wanted.preprocessing_num_workers,
    )
    keeps = not (arguments.watch.preflight or arguments.watch.plan)  # which may look into the folder of a run
    if is_main_process() and keeps:
        data.write_report(Path(training.output_dir))
    for line in data_summary(data.report, training.output_dir if keeps else None):
        say(line)
    return data


if __name__ == "__main__":
    main()
