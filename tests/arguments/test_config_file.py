"""Flags from `--config` files, and the flags that `run_args.yaml` saves."""

import pytest
import yaml

from dft.arguments.config_file import write_run_args
from dft.arguments.parser import default_flags, own_flags, parse_arguments
from dft.errors import UserError
from tests.arguments.command import words


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
