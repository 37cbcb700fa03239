"""Flags from `--config` files, and the flags that `run_args.yaml` saves."""

import pytest
import yaml

from dft.arguments.config_file import find_config, plain, write_run_args
from dft.arguments.parser import default_flags, own_flags, parse_arguments
from dft.errors import UserError
from tests.arguments.command import words
from tests.launching import ROOT


def test_flags_override_config_files_in_order(tmp_path):
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


def test_one_config_flag_reads_several_files_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nmax_length: 77\ndft_alpha: 0.5\n")
    (tmp_path / "b.yaml").write_text("max_length: 88\ndft_alpha: 0.6\n")
    files = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    arguments = parse_arguments(["--config", *files, "--dft_alpha", "0.2", *words(tmp_path)])
    assert arguments.data.max_length == 88  # the later file
    assert arguments.dft.dft_alpha == 0.2
    assert arguments.training.learning_rate == 1e-3
    arguments = parse_arguments([*words(tmp_path), "--config", *reversed(files)])
    assert arguments.data.max_length == 77 and arguments.dft.dft_alpha == 0.5
    with pytest.raises(UserError, match=r"^--config .*c\.yaml: no such file$"):
        parse_arguments([*words(tmp_path), "--config", files[0], str(tmp_path / "c.yaml")])
    with pytest.raises(UserError, match=r"^--config \(nothing\): no such file$"):
        parse_arguments(["--config", *words(tmp_path)])


def test_a_recipe_is_selected_by_name_and_a_file_of_that_name_has_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("qwen2.5-math/7b-lora-1x24gb") == ROOT / "recipes/qwen2.5-math/7b-lora-1x24gb.yaml"
    arguments = parse_arguments([*words(tmp_path)[2:], "--config", "qwen3/8b-lora-1x24gb"])
    assert arguments.model.model_name_or_path == "Qwen/Qwen3-8B" and arguments.lora.lora_r == 16
    (tmp_path / "qwen3").mkdir()
    (tmp_path / "qwen3/8b-lora-1x24gb").write_text("lora_r: 3\n")
    assert parse_arguments([*words(tmp_path), "--config", "qwen3/8b-lora-1x24gb"]).lora.lora_r == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3/8b-lora-1x25gb", "similar: qwen3/8b-lora-1x24gb, qwen3/8b-lora-1x80gb, qwen3/4b-lora-1x24gb"),
        ("../recipes/qwen3/x", "they begin with gemma3/, "),
        ("zzz", "they begin with gemma3/, "),
    ],
)
def test_a_wrong_recipe_is_reported_with_similar_names(name, hint):
    with pytest.raises(UserError) as error:
        find_config(name)
    assert str(error.value).startswith(f"--config {name}: no such file, and not the name of a recipe ({hint}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
        ("config: other.yaml", "contains 'config'"),
        ("learning_rte: 3", "did you mean --learning_rate"),
    ],
)
def test_an_invalid_config_file_is_one_line(tmp_path, text, message):
    (tmp_path / "flags.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: No", "eval_strategy", "no"),
        ("logging_strategy: no", "logging_strategy", "no"),
        ("fused_head: off", "fused_head", "off"),
        ("fused_head: on", "fused_head", "on"),
        ("report: off", "report", False),
        ("packing: yes", "packing", True),
        ("resume_from_checkpoint: no", "resume_from_checkpoint", "False"),
        ("verify_save: no", "verify_save", "False"),
        ("run_name: 010", "run_name", "010"),
        ("run_name: 12:30:00", "run_name", "12:30:00"),
        ("run_name: '~'", "run_name", "~"),
        ("run_name: ~", "run_name", None),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("data_files: [010, 1_0]", "data_files", ["010", "1_0"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", '{"num_cycles": 2}'),
        ("lr_scheduler_kwargs: {min_lr_rate: 1e-1}", "lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'),
        (
            "lr_scheduler_kwargs: {a: [1.5E3, -.5e2, e1]}",
            "lr_scheduler_kwargs",
            '{"a": [1500.0, -50.0, "e1"]}',
        ),
    ],
)
def test_values_are_taken_as_they_are_written(tmp_path, line, name, value):
    (tmp_path / "flags.yaml").write_text(line)
    config = ["--config", str(tmp_path / "flags.yaml")]
    flags = parse_arguments([*config, *(words(tmp_path) if name != "data_files" else own(tmp_path))]).flags
    assert plain(flags[name]) == value


def own(folder) -> list[str]:
    """Return a command line without data files."""
    return [*words(folder)[:2], *words(folder)[5:]]


@pytest.mark.parametrize("form", ["--{}={}", "yaml"])
@pytest.mark.parametrize(
    "name", ["model_name_or_path", "chat_template", "output_dir", "data_cache_dir", "resume_from_checkpoint"]
)
def test_a_tilde_is_expanded_where_the_shell_does_not(tmp_path, monkeypatch, name, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.yaml").write_text(f"{name}: ~/some\n")
    more = [form.format(name, "~/some")] if form != "yaml" else ["--config=~/flags.yaml"]
    required = ["--data_files", "a.jsonl", "--use_cpu", "True"]
    required += [] if name == "model_name_or_path" else ["--model_name_or_path", "model"]
    assert parse_arguments([*required, *more]).flags[name] == str(tmp_path / "some")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "max_grad_norm: null",
            "max_grad_norm: null is .* default, 1.0, or .*; 'max_grad_norm: 0' switches it off",
        ),
        ("max-grad-norm: ~", "max-grad-norm: ~ is not .*; 'max_grad_norm: 0' switches it off"),
        (
            "learning_rate:",
            "learning_rate: nothing is not a value of this flag; .* default, 5e-05, or give a value$",
        ),
        ("save_strategy: null", "its default, steps, or give a value; 'save_strategy: no' switches it off"),
        ("report: null", "its default, True, or give a value; 'report: False' switches it off"),
        ("metric_for_best_model: null", "metric_for_best_model: null is .* its default, eval_acc, or give"),
        (
            "max_length: []",
            r"max_length: \[\] is not a value of this flag; leave it out for its default, 2048",
        ),
        ("learning_rte: null", "unknown argument --learning_rte; did you mean --learning_rate"),
    ],
)
def test_null_does_not_mean_a_default_that_is_a_value(tmp_path, line, message):
    (tmp_path / "flags.yaml").write_text(line)
    with pytest.raises(UserError, match=message):
        parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")])


def test_null_means_a_default_that_is_nothing(tmp_path):
    names = "max_train_samples weight_decay warmup_steps max_steps eval_strategy packing report_to lora_r"
    (tmp_path / "flags.yaml").write_text("".join(f"{name}: null\n" for name in names.split()))
    training = parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")]).training
    assert training.weight_decay == 0 and training.eval_strategy == "no" and training.report_to == []


def test_an_invalid_choice_is_named_as_it_is_written(tmp_path):
    (tmp_path / "flags.yaml").write_text("eval_strategy: off\n")
    with pytest.raises(UserError, match=r"--eval_strategy.*: invalid choice: 'off' \(choose from 'no', "):
        parse_arguments(["--config", str(tmp_path / "flags.yaml"), *words(tmp_path)])


@pytest.mark.parametrize("name", ["output_dir", "model_name_or_path", "data_files"])
def test_a_variable_of_the_shell_in_a_path_is_an_error(tmp_path, monkeypatch, name):
    """The folder would be created under that name."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "flags.yaml").write_text(f"{name}: ${{SCRATCH}}/x\n")
    required = ["--use_cpu", "True", "--model_name_or_path", "m", "--data_files", "a.jsonl"]
    if f"--{name}" in required:
        position = required.index(f"--{name}")
        del required[position : position + 2]
    with pytest.raises(UserError, match=r"\${SCRATCH}/x: contains a variable, .*; write /scratch/me/x"):
        parse_arguments(["--config", str(tmp_path / "flags.yaml"), *required])
    folder = tmp_path / "$SCRATCH"
    folder.mkdir()
    assert parse_arguments([*words(tmp_path), "--logging_dir", str(folder)]).training.logging_dir
    unset = f"{tmp_path}/$UNSET_VARIABLE"
    assert parse_arguments([*words(tmp_path), "--output_dir", unset]).training.output_dir == unset


def test_dates_are_read_and_enumerations_are_written_as_text(tmp_path):
    (tmp_path / "flags.yaml").write_text(
        "lr_scheduler_kwargs: {a: 2020-01-01}\ndebug: [underflow_overflow]\n"
    )
    arguments = parse_arguments([*words(tmp_path), "--config", str(tmp_path / "flags.yaml")])
    assert arguments.training.lr_scheduler_kwargs == {"a": "2020-01-01"}
    write_run_args(tmp_path, arguments.flags, default_flags(), own_flags(), {})
    assert yaml.safe_load((tmp_path / "run_args.yaml").read_text())["debug"] == ["underflow_overflow"]


def test_run_args_omit_flags_of_a_single_run(tmp_path):
    flags = ["--resume_from_checkpoint", "True", "--overwrite_output_dir", "True"]
    arguments = parse_arguments([*words(tmp_path), *flags])
    write_run_args(tmp_path, arguments.flags, default_flags(), own_flags(), {})
    content = yaml.safe_load((tmp_path / "run_args.yaml").read_text())
    assert not {"resume_from_checkpoint", "overwrite_output_dir"} & content.keys()


def test_run_args_hold_the_flags_without_secrets(tmp_path):
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
    expected = {
        name: value for name, value in arguments.flags.items() if name not in ("hub_token", "local_rank")
    }
    assert {name: replayed.flags[name] for name in expected} == expected
    assert replayed.training.lr_scheduler_kwargs == {"num_cycles": 2}
