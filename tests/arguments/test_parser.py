"""Flags in, four dataclasses out; every mistake is one message that names the value and the remedy."""

import json
import os

import pytest
import yaml
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dft.arguments.config_file import write_run_args
from dft.arguments.conflicts import check_arguments, check_batches, find_notes
from dft.arguments.objective import build_objective
from dft.arguments.parser import default_flags, own_flags, parse_arguments
from dft.errors import UserError
from dft.loss.objectives import Sft
from dft.training.checkpoints.resume_point import check_output, resolve_resume
from dft.training.optimizer import check_optimizer


def words(folder, *more: str) -> list[str]:
    return [
        "--model_name_or_path", "model", "--data_files", "a.jsonl", "b.jsonl",
        "--output_dir", str(folder / "out"), "--use_cpu", "True", *more,
    ]  # fmt: skip


def checked(folder, *more: str):
    arguments = parse_arguments(words(folder, *more))
    check_arguments(arguments)
    check_output(arguments)
    arguments.training.resume_from_checkpoint, notes = resolve_resume(arguments)
    arguments.notes.extend([*notes, *find_notes(arguments)])
    if not arguments.data.prepare_only:
        check_optimizer(arguments.training)
    return arguments


def test_the_four_groups_get_their_flags(tmp_path):
    arguments = checked(
        tmp_path, "--dft_alpha", "0.7", "--max_length", "8192", "--learning_rate", "2e-6",
        "--enable_gradient_checkpointing", "True", "--attn_implementation", "sdpa", "--warmup_ratio", "0.05",
    )  # fmt: skip
    assert arguments.data.data_files == ["a.jsonl", "b.jsonl"] and arguments.data.max_length == 8192
    assert arguments.dft.dft_alpha == 0.7 and arguments.model.attn_implementation == "sdpa"
    assert arguments.training.learning_rate == 2e-6
    assert arguments.training.activation_checkpointing is True
    assert arguments.training.get_warmup_steps(200) == 10


def test_defaults_are_safe_and_follow_the_paper(tmp_path):
    arguments = checked(tmp_path)
    assert arguments.dft.dft_alpha == 1.0
    assert arguments.model.trust_remote_code is False and arguments.model.attn_implementation == "auto"
    assert arguments.training.metric_for_best_model == "eval_acc" and arguments.training.greater_is_better
    assert arguments.training.report_to == []


@pytest.mark.parametrize(
    ("metric", "greater"), [("eval_acc", True), ("eval_nll", False), ("objective", False)]
)
def test_whether_greater_is_better_follows_from_the_metric(tmp_path, metric, greater):
    assert checked(tmp_path, "--metric_for_best_model", metric).training.greater_is_better is greater


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--objective", "power", "--objective_args", "k=0.5,k=0.7"], "k is given twice"),
        (["--dft_alpha_schedule_share", "0.2"], "alpha is constant; add --dft_alpha_schedule"),
    ],
)
def test_weights_that_contradict_one_another_are_refused(tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        checked(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dft_alpha", "0.7", "--end_of_turn_weight", "0.3"], True),
        (["--dft_alpha", "0.7", "--end_of_turn_weight", "0.31"], False),
        (["--objective", "sft", "--end_of_turn_weight", "1"], True),
        (["--objective", "power", "--end_of_turn_weight", "0.1"], False),
    ],
)
def test_a_floor_that_lifts_nothing_is_told(tmp_path, words, told):
    notes = checked(tmp_path, *words).notes
    assert any("has no effect: every token already has a weight of at" in note for note in notes) == told


def test_adapters_are_no_model_to_train(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    for more in ([], ["--lora_r", "4"], ["--plan", "True"]):
        with pytest.raises(UserError, match="holds adapters, not a model; merge them"):
            checked(tmp_path, "--model_name_or_path", str(tmp_path / "lora"), *more)
    checked(tmp_path, "--model_name_or_path", str(tmp_path / "lora"), "--preflight", "True")


def test_plain_sft_may_be_said_twice(tmp_path):
    arguments = checked(tmp_path, "--use_simple_dft", "False", "--objective", "sft")
    assert build_objective(arguments.dft) == Sft()


def test_use_simple_dft_false_is_sft(tmp_path):
    arguments = checked(tmp_path, "--use_simple_dft", "False", "--dft_alpha", "0.7")
    assert arguments.dft.dft_alpha == 0 and any("plain SFT" in note for note in arguments.notes)


def test_evaluation_files_win_over_a_split_and_say_so(tmp_path):
    arguments = checked(tmp_path, "--eval_data_files", "c.jsonl", "--validation_split_percentage", "2")
    assert arguments.data.validation_split_percentage == 0
    assert sum("--validation_split_percentage 2 has no effect" in note for note in arguments.notes) == 1


@pytest.mark.parametrize(("every", "noted"), [("2", False), ("3", True)])
def test_saves_that_no_evaluation_meets_are_noted(tmp_path, every, noted):
    flags = ["--eval_data_files", "c", "--eval_strategy", "steps", "--eval_steps", every, "--save_steps", "4"]
    notes = checked(tmp_path, *flags).notes
    assert any("the best checkpoint is searched only among steps" in note for note in notes) is noted


def test_flags_without_effect_are_noted_only_when_given(tmp_path):
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
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **AUTO}))
    arguments = checked(tmp_path, "--deepspeed", str(file), *flags)
    assert not arguments.training.deepspeed and not arguments.training.bf16
    assert sum(line.startswith(note.format(file=file)) for line in arguments.notes) == 1


def test_preflight_samples_without_a_preflight_are_noted(tmp_path):
    note = "--preflight_samples 64 has no effect without --preflight True"
    assert note in checked(tmp_path, "--preflight_samples", "64").notes
    assert note not in checked(tmp_path, "--preflight_samples", "64", "--preflight", "True").notes


@pytest.mark.parametrize("kind", ["--preflight", "--prepare_only"])
def test_runs_that_ignore_no_flag_have_no_note_about_it(tmp_path, kind):
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
        "--deepspeed nowhere.json: no such file; configurations for",
    ),
    ("--lr_scheduler_kwargs notjson", "--lr_scheduler_kwargs notjson: expected a JSON object"),
    ('--lr_scheduler_kwargs {"foo":1}', "unexpected keyword argument 'foo'"),
    ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
    ("--optim adamw_8bit", "--optim adamw_8bit: You need to install `bitsandbytes`"),
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
def test_a_mistake_is_one_message(tmp_path, flags, message):
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
def test_what_fsdp_cannot_do_is_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("dft.arguments.parallelism.can_shard", lambda: bool(flags))
    with pytest.raises(UserError, match=message):
        checked(tmp_path, "--fsdp", "True", *flags)
    assert not checked(tmp_path, "--fsdp", "False").training.fsdp


def test_dropping_every_batch_is_refused(tmp_path):
    arguments = checked(tmp_path, "--dataloader_drop_last", "True", "--per_device_train_batch_size", "8")
    check_batches(arguments, 8)
    with pytest.raises(UserError, match="7 sequences do not fill one batch of 8"):
        check_batches(arguments, 7)


def test_a_missing_required_flag_is_named():
    with pytest.raises(UserError, match="--data_files"):
        parse_arguments(["--model_name_or_path", "model"])


# ---- files of flags ----


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nmax_length: 77\ndft_alpha: 0.5\n")
    (tmp_path / "b.yaml").write_text("max_length: 88\ndata_files: [c.jsonl]\n")
    arguments = parse_arguments(
        ["--dft_alpha", "0.2", *words(tmp_path)[:2], *words(tmp_path)[5:],
         "--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    )  # fmt: skip
    assert arguments.dft.dft_alpha == 0.2  # though it stands before --config
    assert arguments.data.max_length == 88  # the later file
    assert arguments.training.learning_rate == 1e-3
    assert arguments.data.data_files == ["c.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
        ("config: other.yaml", "contains 'config'"),
        ("learning_rte: 3", "did you mean --learning_rate"),
    ],
)
def test_a_broken_file_of_flags_is_one_message(tmp_path, text, message):
    (tmp_path / "flags.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")])


def test_dates_in_a_file_are_read_and_enumerations_are_written_as_words(tmp_path):
    (tmp_path / "flags.yaml").write_text(
        "lr_scheduler_kwargs: {a: 2020-01-01}\ndebug: [underflow_overflow]\n"
    )
    arguments = parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")])
    assert arguments.training.lr_scheduler_kwargs == {"a": "2020-01-01"}
    write_run_args(tmp_path, arguments.flags, default_flags(), own_flags(), {})
    assert yaml.safe_load((tmp_path / "run_args.yaml").read_text())["debug"] == ["underflow_overflow"]


def test_run_args_leave_out_what_belongs_to_one_run(tmp_path):
    flags = ["--resume_from_checkpoint", "True", "--overwrite_output_dir", "True"]
    arguments = parse_arguments([*words(tmp_path), *flags])
    write_run_args(tmp_path, arguments.flags, default_flags(), own_flags(), {})
    content = yaml.safe_load((tmp_path / "run_args.yaml").read_text())
    assert not {"resume_from_checkpoint", "overwrite_output_dir"} & content.keys()


def test_run_args_hold_what_was_given_and_no_secret(tmp_path):
    (tmp_path / "token.yaml").write_text("hub_token: SECRET")
    more = ["--config", str(tmp_path / "token.yaml"), "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    more += ["--learning_rate", "3e-5", "--run_name=-dashed", "--local_rank", "1"]
    arguments = parse_arguments([*words(tmp_path), *more])
    write_run_args(tmp_path, arguments.flags, default_flags(), own_flags(), {"ranks": 2})
    text = (tmp_path / "run_args.yaml").read_text()
    assert "SECRET" not in text and "local_rank" not in text and "#   ranks: 2" in text
    content = yaml.safe_load(text)
    assert content["learning_rate"] == 3e-5 and content["dft_alpha"] == 1.0
    assert "weight_decay" not in content and "include_for_metrics" not in content
    replayed = parse_arguments(["--config", str(tmp_path / "run_args.yaml")])
    given = {
        name: value for name, value in arguments.flags.items() if name not in ("hub_token", "local_rank")
    }
    assert {name: replayed.flags[name] for name in given} == given
    assert replayed.training.lr_scheduler_kwargs == {"num_cycles": 2}


# ---- DeepSpeed and output folders ----


AUTO = {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}


def deepspeed_file(folder, **content) -> list[str]:
    (folder / "ds.json").write_text(json.dumps(content))
    return ["--deepspeed", str(folder / "ds.json")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}},
            "contradicts the flags: - ds train_micro_batch_size_per_gpu=3",
        ),
        ({"zero_optimization": {"stage": 2}}, "has no gradient_clipping, so flags of this run would have no"),
        (
            {"zero_optimization": {"stage": 2}, **AUTO, "tensor_parallel": {"autotp_size": 2}},
            "tensor parallelism is not supported",
        ),
        ({"zero_optimization": {"stage": 3}, **AUTO}, "stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_a_deepspeed_file_that_contradicts_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("WORLD_SIZE", "1")
    # A refusal needs no process group.
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    with pytest.raises(UserError, match=message):
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    unset_hf_deepspeed_config()  # from_pretrained of the tests to come would shard their models


def test_an_optimizer_that_deepspeed_has_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("dft.arguments.training.init_cpu_deepspeed", lambda: None)
    content = {"optimizer": {"type": "Foo", "params": {}}, "zero_optimization": {"stage": 2}, **AUTO}
    with pytest.raises(UserError, match="DeepSpeed has no optimizer 'Foo'"):
        checked(tmp_path, *deepspeed_file(tmp_path, **content))
    unset_hf_deepspeed_config()


def test_a_deepspeed_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        checked(tmp_path, "--deepspeed", str(tmp_path / "ds.json"))


def test_an_output_directory_with_checkpoints_is_not_overwritten(tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds 1 checkpoint\(s\) of an earlier run"):
        checked(tmp_path)
    assert checked(tmp_path, "--overwrite_output_dir", "True").training.overwrite_output_dir


def test_an_output_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        checked(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_directory_is_refused(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        checked(tmp_path)
