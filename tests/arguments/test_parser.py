"""Parsing of the command line, and flags that are invalid or contradict each other."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from dft.arguments.conflicts import check_batches
from dft.arguments.objective import build_objective
from dft.arguments.parser import parse_arguments
from dft.errors import UserError
from dft.loss.objectives import Sft
from dft.ranks import launch_fault
from dft.version import __version__
from tests.arguments.command import checked


def test_flags_are_parsed_into_their_groups(tmp_path):
    arguments = checked(
        tmp_path, "--dft_alpha", "0.7", "--max_length", "8192", "--learning_rate", "2e-6",
        "--enable_gradient_checkpointing", "True", "--attn_implementation", "sdpa", "--warmup_ratio", "0.05",
    )  # fmt: skip
    assert arguments.data.data_files == ["a.jsonl", "b.jsonl"] and arguments.data.max_length == 8192
    assert arguments.dft.dft_alpha == 0.7 and arguments.model.attn_implementation == "sdpa"
    assert arguments.training.learning_rate == 2e-6
    assert arguments.training.activation_checkpointing is True
    assert arguments.training.get_warmup_steps(200) == 10


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK"),
    ],
)
def test_leftovers_of_a_launcher_are_rejected(monkeypatch, present, missing):
    """A process would wait for ranks that do not exist, or train apart from the others."""
    for name, value in present.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        parse_arguments()
    assert f"sets {', '.join(present)}, but not {missing}: no launcher started this" in str(raised.value)
    for name in present:
        assert f"-u {name} " in str(raised.value)
    for name in (*present, *missing.split(", ")):
        monkeypatch.setenv(name, "1" if name in ("WORLD_SIZE", "MASTER_PORT") else "0")
    assert launch_fault() is None
    monkeypatch.undo()
    monkeypatch.setenv("MASTER_PORT", "1")  # for a launcher to come
    assert launch_fault() is None


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("WORLD_SIZE", "two", "and WORLD_SIZE='two' is not a number of 1 or more"),
        ("WORLD_SIZE", "", "and WORLD_SIZE='' is not a number of 1 or more"),
        ("RANK", "x", "and RANK='x' is not a number of 0 or more"),
        ("RANK", "3", "and RANK=3 is not below WORLD_SIZE=2"),
        ("LOCAL_RANK", "2", "and LOCAL_RANK=2 is not below WORLD_SIZE=2"),
        ("MASTER_PORT", "abc", "and MASTER_PORT='abc' is not a number of 1 or more"),
    ],
)
def test_values_that_no_launcher_sets_are_rejected(monkeypatch, name, value, fault):
    """A rank that does not exist would wait for the others until a timeout."""
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for variable, text in launched.items():
        monkeypatch.setenv(variable, text)
    assert launch_fault() is None
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{fault}: no launcher started this process"):
        parse_arguments()


def test_leftovers_of_a_launcher_are_one_error_of_the_program():
    """Nothing that runs before the command line is parsed may rely on the environment of a launcher."""
    environment = os.environ | {"WORLD_SIZE": "2"}
    process = subprocess.run(
        [sys.executable, "train_dft.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "error: the environment sets WORLD_SIZE, but not RANK" in process.stderr


def test_leftovers_of_a_launcher_are_reported_whatever_the_rank(monkeypatch):
    """Other local ranks than 0 would wait for half a minute, so that rank 0 reports the error."""
    reporters: list[bool] = []
    monkeypatch.setattr("dft.arguments.parser.set_error_reporter", reporters.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError):
        parse_arguments()
    assert reporters == [True]


def test_a_port_in_use_is_one_error(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        def connect() -> None:
            torch.distributed.TCPStore("127.0.0.1", port, 2, True)

        monkeypatch.setattr("dft.arguments.training.divide_cores", connect)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 is in use, .*--master_port N"):
            checked(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "lomo"], "--optim lomo: updates the weights during the backward pass"),
        (["--optim", "adalomo"], "--optim adalomo: updates the weights during the backward pass"),
        (["--optim", "galore_adamw_layerwise", "--optim_target_modules", "mlp"], "during the backward pass"),
        (["--optim", "galore_adamw", "--optim_target_modules", "mlp"], "pip install galore-torch"),
        (["--dataloader_multiprocessing_context", "fork"], "fork concerns the processes that load batches"),
        (["--dataloader_persistent_workers", "True"], "add --dataloader_num_workers 2, or remove it"),
    ],
)
def test_settings_that_would_fail_after_the_model_is_loaded_are_rejected(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        checked(tmp_path, *words)


def test_defaults(tmp_path):
    arguments = checked(tmp_path)
    assert arguments.dft.dft_alpha == 1.0
    assert arguments.model.trust_remote_code is False and arguments.model.attn_implementation == "auto"
    assert arguments.training.metric_for_best_model == "eval_acc" and arguments.training.greater_is_better
    assert arguments.training.report_to == []


@pytest.mark.parametrize(
    ("metric", "greater"), [("eval_acc", True), ("eval_nll", False), ("objective", False)]
)
def test_greater_is_better_follows_from_the_metric(tmp_path, metric, greater):
    assert checked(tmp_path, "--metric_for_best_model", metric).training.greater_is_better is greater


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "power", "--objective_args", "k=0.5,k=0.7"], "k is given twice"),
        (["--objective_args", "k=0.5"], "the objective dft has no parameter 'k'; .*; 'k' belongs to power"),
        (["--objective_args", "alpha="], "expected NAME=NUMBER, separated by commas, got 'alpha='"),
        (["--dft_alpha_schedule_share", "0.2"], "alpha is constant; add --dft_alpha_schedule"),
    ],
)
def test_contradicting_loss_flags_are_rejected(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        checked(tmp_path, *words)


@pytest.mark.parametrize(
    ("flags", "is_noted"),
    [
        (["--dft_alpha", "0.7", "--end_of_turn_weight", "0.3"], True),
        (["--dft_alpha", "0.7", "--end_of_turn_weight", "0.31"], False),
        (["--objective", "sft", "--end_of_turn_weight", "1"], True),
        (["--objective", "power", "--end_of_turn_weight", "0.1"], False),
        (["--objective", "talr", "--objective_args", "floor=0.3", "--end_of_turn_weight", "0.3"], True),
        (["--objective", "talr", "--end_of_turn_weight", "0.3"], False),
        (["--objective", "iw_sft", "--base_scores", "True", "--end_of_turn_weight", "0.1"], True),
        (["--objective", "psft", "--base_scores", "True", "--end_of_turn_weight", "0.1"], False),
    ],
)
def test_an_end_of_turn_weight_without_effect_is_noted(tmp_path, flags, is_noted):
    notes = checked(tmp_path, *flags).notes
    assert any("has no effect: every token already has a weight of at" in note for note in notes) == is_noted


@pytest.mark.parametrize(
    ("flags", "is_noted"),
    [
        (["--add_tokens", "<a>"], True),
        (["--add_tokens", "<a>", "--objective", "asft"], True),
        (["--add_tokens", "<a>", "--dft_alpha", "0.9"], False),
        (["--add_tokens", "<a>", "--dft_alpha_schedule", "linear"], False),
        (["--add_tokens", "<a>", "--objective", "deft"], False),
        (["--add_tokens", "<a>", "--objective", "threshold"], True),
        (["--add_tokens", "<a>", "--objective", "power"], True),
        (["--add_tokens", "<a>", "--objective", "power", "--objective_args", "k=0.1"], False),
        (["--add_tokens", "<a>", "--objective", "talr"], True),
        (["--add_tokens", "<a>", "--objective", "sft"], False),
        (["--add_tokens", "<a>", "--plan", "True"], False),
        ([], False),
    ],
)
def test_new_tokens_that_dft_hardly_trains_as_targets_are_noted(tmp_path, flags, is_noted):
    notes = checked(tmp_path, *flags).notes
    assert any("the model hardly learns to write them" in note for note in notes) == is_noted


def test_new_tokens_that_the_filter_by_base_p_leaves_out_are_noted(tmp_path):
    flags = ["--add_tokens", "<a>", "--base_scores", "True", "--drop_tokens_below_base_p"]
    for bound, count in (("0.01", 1), ("0", 0)):
        notes = checked(tmp_path, *flags, bound).notes
        assert sum("the model does not learn to write them" in note for note in notes) == count


@pytest.mark.parametrize(
    ("flags", "is_noted"),
    [
        (["--report", "False"], True),
        (["--report", "True"], False),
        (["--report", "False", "--objective", "psft"], False),
        (["--report", "False", "--drop_tokens_below_base_p", "0.1"], False),
        (["--report", "False", "--base_scores", "only"], False),
    ],
)
def test_base_scores_that_nothing_uses_are_noted(tmp_path, flags, is_noted):
    notes = checked(tmp_path, "--base_scores", "True", *flags).notes
    assert any("nothing in this run uses the scores" in note for note in notes) == is_noted


def test_a_folder_of_adapters_is_rejected_as_model(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    for more in ([], ["--lora_r", "4"], ["--plan", "True"]):
        with pytest.raises(UserError, match="holds adapters, not a model; merge them"):
            checked(tmp_path, "--model_name_or_path", str(tmp_path / "lora"), *more)
    checked(tmp_path, "--model_name_or_path", str(tmp_path / "lora"), "--preflight", "True")


def test_a_preflight_under_fsdp_is_refused(tmp_path):
    with pytest.raises(UserError, match="--preflight True with --fsdp is not supported.*--deepspeed zero3"):
        checked(tmp_path, "--preflight", "True", "--fsdp", "True")


def test_a_preflight_with_shared_sequences_is_refused(tmp_path):
    flags = ["--preflight", "True", "--sequence_parallel_size", "2"]
    with pytest.raises(UserError, match="scores whole sequences; remove --sequence_parallel_size 2"):
        checked(tmp_path, *flags)


def test_two_flags_for_sft_do_not_contradict(tmp_path):
    arguments = checked(tmp_path, "--use_simple_dft", "False", "--objective", "sft")
    assert build_objective(arguments.dft) == Sft()


def test_use_simple_dft_false_is_sft(tmp_path):
    arguments = checked(tmp_path, "--use_simple_dft", "False", "--dft_alpha", "0.7")
    assert arguments.dft.dft_alpha == 0 and any("plain SFT" in note for note in arguments.notes)


def test_evaluation_files_replace_the_validation_split(tmp_path):
    arguments = checked(tmp_path, "--eval_data_files", "c.jsonl", "--validation_split_percentage", "2")
    assert arguments.data.validation_split_percentage == 0
    assert sum("--validation_split_percentage 2 has no effect" in note for note in arguments.notes) == 1


@pytest.mark.parametrize("second", [("--max_length", "9"), ("--max-length", "9"), ("--max-length=9",)])
def test_a_flag_with_two_values_is_noted_however_it_is_written(tmp_path, second):
    arguments = checked(tmp_path, "--max_length", "8", *second)
    assert arguments.data.max_length == 9
    assert "given more than once, so the last one counts: --max_length 9" in arguments.notes


@pytest.mark.parametrize(
    ("every", "save", "noted"),
    [("2", "4", False), ("3", "4", True), ("0.1", "0.3", False), ("0.2", "0.3", True), ("0.1", "4", False)],
)
def test_saves_at_steps_without_evaluation_are_noted(tmp_path, every, save, noted):
    flags = ["--eval_data_files", "c", "--eval_strategy", "steps", "--eval_steps", every]
    notes = checked(tmp_path, *flags, "--save_steps", save).notes
    assert any("the best checkpoint is searched only among steps" in note for note in notes) is noted


@pytest.mark.parametrize("loads", ["True", "False"])
def test_early_stopping_without_the_best_model_is_noted(tmp_path, loads):
    flags = ["--eval_data_files", "c", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    more = ["--early_stopping_patience", "3", "--load_best_model_at_end", loads]
    notes = checked(tmp_path, *flags, *more).notes
    assert any("is that of its last step; --load_best_model_at_end" in note for note in notes) is (
        loads == "False"
    )


@pytest.mark.parametrize("flag", ["--eval_data_files", "--validation_split_percentage"])
def test_evaluation_data_without_an_evaluation_are_noted(tmp_path, flag):
    note = f"{flag}: no evaluation uses these data; add --eval_strategy steps or epoch"
    assert note in checked(tmp_path, flag, "2").notes
    for more in (["--eval_strategy", "epoch"], ["--eval_on_start", "True"], ["--preflight", "True"]):
        assert note not in checked(tmp_path, flag, "2", *more).notes


def test_the_best_checkpoint_is_that_of_the_first_evaluation_set(tmp_path):
    sets = ["--eval_data_files", "math=c", "code=d", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    arguments = checked(tmp_path, *sets)
    assert arguments.training.metric_for_best_model == "eval_math_acc"
    assert any("--metric_for_best_model is eval_math_acc, of the first" in note for note in arguments.notes)
    other = checked(tmp_path, *sets, "--metric_for_best_model", "eval_code_nll").training
    assert other.metric_for_best_model == "eval_code_nll" and other.greater_is_better is False


def test_flags_without_effect_are_noted_only_if_set(tmp_path):
    assert not any("no effect" in note for note in checked(tmp_path).notes)
    notes = checked(tmp_path, "--save_safetensors", "True", "--reduce_logging", "True").notes
    assert sum("no effect" in note for note in notes) == 2


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--preflight", "True"], "--preflight True ignores --deepspeed {file}: "),
        (
            ["--prepare_only", "True", "--bf16", "True"],
            "--prepare_only True ignores --deepspeed {file}, --bf16 True: ",
        ),
    ],
    ids=["preflight", "prepare_only"],
)
def test_ignored_flags_are_reported(tmp_path, flags, note):
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    arguments = checked(tmp_path, "--deepspeed", str(file), *flags)
    assert not arguments.training.deepspeed and not arguments.training.bf16
    assert sum(line.startswith(note.format(file=file)) for line in arguments.notes) == 1


def test_the_length_of_samples_without_samples_is_noted(tmp_path):
    note = "--generate_samples_max_tokens 64 has no effect without --generate_samples"
    assert note in checked(tmp_path, "--generate_samples_max_tokens", "64").notes
    evaluation = ("--validation_split_percentage", "2", "--eval_on_start", "True")
    flags = ("--generate_samples_max_tokens", "64", "--generate_samples", "2")
    assert note not in checked(tmp_path, *flags, *evaluation).notes


def test_preflight_samples_without_a_preflight_are_noted(tmp_path):
    note = "--preflight_samples 64 has no effect without --preflight True"
    assert note in checked(tmp_path, "--preflight_samples", "64").notes
    assert note not in checked(tmp_path, "--preflight_samples", "64", "--preflight", "True").notes


@pytest.mark.parametrize("kind", ["--preflight", "--prepare_only"])
def test_no_note_if_no_flag_is_ignored(tmp_path, kind):
    assert not any("ignores" in line for line in checked(tmp_path, kind, "True").notes)


WRONG = [
    ("--dft_alpha 1.5", "--dft_alpha 1.5: alpha must lie in [0, 1]"),
    ("--dft_alpha nan", "--dft_alpha nan: alpha must lie in [0, 1]"),
    ("--dft_alpha much", "invalid float value: 'much'"),
    ("--max_length 1", "--max_length 1: must be at least 2, because a target token needs a token before it"),
    ("--max_length 0", "--max_length 0: must be at least 2"),
    ("--validation_split_percentage 100", "--validation_split_percentage 100: must be less than 100"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: must be greater than 0"),
    ("--gradient_accumulation_steps -2", "--gradient_accumulation_steps -2: must be greater than 0"),
    ("--num_train_epochs 0", "--num_train_epochs 0: must be greater than 0"),
    ("--learning_rate -1", "--learning_rate -1: must be at least 0"),
    ("--learning_rate inf", "--learning_rate inf: must be a finite number"),
    ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be less than 1"),
    ("--warmup_ratio 0.1 --warmup_steps 10", "both set the warmup"),
    ("--max_train_samples 0", "--max_train_samples 0: must be greater than 0"),
    ("--truncation middle", "invalid choice: 'middle'"),
    ("--on_bad_data ignore", "invalid choice: 'ignore'"),
    ("--data_weights 1 2 3", "--data_weights 1 2 3: 3 weights for 2 entries of --data_files"),
    ("--data_weights 1 0", "--data_weights 1 0: each value must be greater than 0"),
    ("--data_weights 1 nan", "--data_weights 1 nan: each value must be a finite number"),
    ("--chat_template_kwargs {", "--chat_template_kwargs {: not valid JSON"),
    ("--chat_template_kwargs [1]", "--chat_template_kwargs [1]: expected a JSON object such as"),
    ('--chat_template_kwargs {"a":1,"a":2}', '{"a":1,"a":2}: not valid JSON (the key \'a\' appears twice'),
    ('--chat_template_kwargs {"b":{"a":1,"a":1}}', "(the key 'a' appears twice in one object)"),
    ('--chat_template_kwargs {"a":NaN}', "not valid JSON (NaN is not a finite number)"),
    ('--chat_template_kwargs {"a":[-Infinity]}', "not valid JSON (-Infinity is not a finite number)"),
    ('--chat_template_kwargs {"a":1e999}', "not valid JSON (1e999 is not a finite number)"),
    ('--chat_template_kwargs {"tools":1}', "'tools' is set from each row; remove it"),
    ("--eval_strategy steps", "--eval_strategy steps needs --eval_data_files"),
    ("--eval_on_start True", "--eval_on_start True needs --eval_data_files"),
    ("--save_strategy best", "--save_strategy best needs --eval_data_files"),
    (
        "--eval_data_files a=c b=d --eval_strategy epoch --metric_for_best_model eval_x_acc",
        "--metric_for_best_model eval_x_acc: unknown, or not a measure of quality; choose one of eval_a_loss",
    ),
    (
        "--eval_data_files a=c b=d --eval_strategy epoch --metric_for_best_model eval_nll",
        "eval_b_p_end_of_turn",
    ),
    ("--eval_data_files a=c a=d", "2 evaluation sets have the name 'a'"),
    ("--early_stopping_patience 2", "--early_stopping_patience 2 needs --eval_data_files"),
    ("--early_stopping_patience 0", "--early_stopping_patience 0: must be greater than 0"),
    (
        "--early_stopping_threshold 0.1",
        "--early_stopping_threshold 0.1 has no effect without --early_stopping",
    ),
    (
        "--early_stopping_patience 2 --validation_split_percentage 2",
        "--early_stopping_patience 2 counts evaluations during training, and there are none; add --eval_stra",
    ),
    ("--generate_samples -1", "--generate_samples -1: must be at least 0"),
    ("--generate_samples 1001", "--generate_samples 1001: must be at most 1,000"),
    ("--generate_samples_max_tokens 0", "--generate_samples_max_tokens 0: must be greater than 0"),
    (
        "--generate_samples 4",
        "--generate_samples 4 continues prompts of the evaluation data, and there is none; add --eval_data_f",
    ),
    (
        "--generate_samples 4 --validation_split_percentage 2",
        "--generate_samples 4 generates at each evaluation, and there is none; add --eval_strategy steps",
    ),
    ("--eval_strategy sometimes", "sometimes"),
    ("--torch_dtype float8", "float8"),
    (
        "--metric_for_best_model eval_bleu",
        "eval_bleu: unknown, or not a measure of quality",
    ),
    (
        "--preflight True --prepare_only True",
        "needs the model, which --prepare_only True does not load",
    ),
    ("--preflight True --resume_from_checkpoint x", "scores --model_name_or_path, not --resume_from"),
    ("--preflight True --preflight_samples 0", "--preflight_samples 0: must be greater than 0"),
    ("--preflight True --deepspeed {", "--deepspeed {: not valid JSON"),
    ("--metric_for_best_model entropy", "not a measure of quality; choose one of eval_loss, eval_nll, "),
    ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: DFT weights"),
    ("--average_tokens_across_devices False", "--average_tokens_across_devices False would divide"),
    ("--fp16 True --torch_dtype float16", "the gradients of float16 weights cannot be unscaled"),
    ("--fp16 True --bf16 True", "At most one of fp16 and bf16"),
    ("--learning_rte 3", "unknown argument --learning_rte; did you mean --learning_rate?"),
    ("--wholly_unknown", "unknown argument --wholly_unknown"),
    ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    ("--hub_token=SECRET", "--hub_token: every user of this machine can read a token on the command line"),
    ("--deepspeed ds_config/zero3.json", "DeepSpeed needs a launcher"),
    (
        "--deepspeed nowhere.json",
        "--deepspeed nowhere.json: no such file, and not the name of a shipped configuration (zero1, zero2,",
    ),
    ("--lr_scheduler_kwargs notjson", "--lr_scheduler_kwargs notjson: expected a JSON object"),
    ('--lr_scheduler_kwargs {"foo":1}', "unexpected keyword argument 'foo'"),
    ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
    ("--optim adamw_8bit", "--optim adamw_8bit: needs the package bitsandbytes, which is missing; pip"),
    ("--optim_args foo", "--optim adamw_torch_fused: "),
    ("--adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--dataloader_num_workers 2 --dataloader_prefetch_factor 0", "--dataloader_prefetch_factor 0: must be"),
    ('--accelerator_config {"split_batches":true}', "--accelerator_config: split_batches"),
    ("--output_dir=", "--output_dir '': name the folder"),
    (
        "--group_by_length True --train_sampling_strategy sequential",
        "contradict each other; remove one",
    ),
    ("--save_steps 0", "--save_steps 0: must be greater than 0 with --save_strategy steps"),
    ("--report_to nonsense", "--report_to nonsense: unknown tracker; choose from"),
    ("--report_to clearml", "--report_to clearml: its package is not installed"),
    ("--output_dir /proc/nowhere", "--output_dir /proc/nowhere: cannot be written"),
    ("--resume_from_checkpoint True", "--resume_from_checkpoint True: there is no complete checkpoint in"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere: no such folder"),
    (
        "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps --validation_split_percentage 5",
        'add --lr_scheduler_kwargs \'{"mode": "max"}\'',
    ),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[flags for flags, _ in WRONG])
def test_an_invalid_flag_is_one_line(tmp_path, flags, message):
    with pytest.raises(UserError) as caught:
        checked(tmp_path, *flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


FSDP = [
    ([], "--fsdp True shards a model over several ranks, and this run has only one; start it with torchrun"),
    (["--fsdp_config", '{"version": 1}'], "version 1 of FSDP is not supported"),
    (
        ["--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}'],
        "cannot be loaded with from_pretrained",
    ),
]


@pytest.mark.parametrize(("flags", "message"), FSDP, ids=["alone", "version", "sharded"])
def test_unsupported_fsdp_settings_are_rejected(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("dft.arguments.parallelism.can_shard", lambda: bool(flags))
    with pytest.raises(UserError, match=message):
        checked(tmp_path, "--fsdp", "True", *flags)
    assert not checked(tmp_path, "--fsdp", "False").training.fsdp


def test_dropping_all_batches_is_rejected(tmp_path):
    arguments = checked(tmp_path, "--dataloader_drop_last", "True", "--per_device_train_batch_size", "8")
    check_batches(arguments, 8)
    with pytest.raises(UserError, match="7 sequences do not fill one batch of 8"):
        check_batches(arguments, 7)


def test_a_missing_required_flag_is_named():
    with pytest.raises(UserError, match="--data_files"):
        parse_arguments(["--model_name_or_path", "model"])


def test_a_plan_notes_that_it_ignores_the_checkpoint(tmp_path):
    (tmp_path / "out").mkdir()
    flags = ["--plan", "True", "--resume_from_checkpoint", "auto"]
    assert any(
        "--plan True ignores --resume_from_checkpoint auto" in note
        for note in checked(tmp_path, *flags).notes
    )
    assert not any("ignores" in note for note in checked(tmp_path, "--plan", "True").notes)


def test_a_folder_whose_name_cannot_be_encoded_is_rejected(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    words = ["--model_name_or_path", "m", "--data_files", "a.jsonl", "--use_cpu", "True"]
    with pytest.raises(UserError) as caught:
        parse_arguments([*words, "--output_dir", str(folder)])
    assert str(caught.value) == (
        f"--output_dir {folder}: the name is not valid utf-8, so the tokenizer could not be read or saved "
        "there; rename it, or set PYTHONUTF8=1 if the name is UTF-8"
    )


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"train_dft.py {__version__}\n"
