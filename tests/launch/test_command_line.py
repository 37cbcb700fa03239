"""The command lines of the documentation, and the errors for invalid ones."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dft.errors import EXIT_USER_ERROR
from tests.launching import ROOT, eval_records, history, launch, train_records

COMMAND = """
    --torch_dtype bfloat16 --trust_remote_code True --max_length 8192 --preprocessing_num_workers 8
    --validation_split_percentage 2.0 --enable_gradient_checkpointing True --dft_alpha 0.7 --bf16 True
    --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate
    2e-6 --lr_scheduler_type cosine --weight_decay 0.01 --gradient_accumulation_steps 16 --eval_strategy
    steps --eval_steps 200 --save_strategy steps --save_steps 200 --save_total_limit 3 --save_only_model
    True --report_to swanlab --logging_steps 10 --warmup_ratio 0.05 --remove_unused_columns False
    --ddp_find_unused_parameters False
"""
"""Paths are added below. --attn_implementation flash_attention_2 is left out because it needs a GPU."""
MORE = """
    --debug_data_processing True --reduce_logging True --log_metrics_steps 10 --dataloader_num_workers 8
    --save_safetensors True --disable_tqdm False --max_eval_samples 1000 --use_simple_dft True
"""
SHORTER = """
    --learning_rate 3e-3 --eval_steps 2 --save_steps 2 --logging_steps 2 --save_total_limit 2
    --greater_is_better False --per_device_train_batch_size 4 --gradient_accumulation_steps 4
    --per_device_eval_batch_size 8 --dataloader_num_workers 2 --preprocessing_num_workers 2
"""


@pytest.fixture(scope="module")
def long_run(example):
    """Run the longest command line on the small example, with fewer steps between logs and saves."""
    output = example.folder / "command"
    words = [
        "--model_name_or_path", str(example.model), "--data_files", str(example.train), str(example.other),
        "--eval_data_files", str(example.eval), "--deepspeed", str(ROOT / "ds_config/zero3.json"),
        "--output_dir", str(output), "--logging_dir", str(example.folder / "tracker"),
        *COMMAND.split(), *MORE.split(), *SHORTER.split(),
    ]  # fmt: skip
    finished = launch(words, folder=example.folder, launcher="deepspeed")
    assert finished.code == 0, finished.output
    return output, finished.output


def test_the_long_command_line_trains(example, long_run):
    output, printed = long_run
    assert "300 conversations" in printed and "step 10/10" in printed  # 297 + 3, 32 at a time
    evaluations = eval_records(output)
    assert evaluations[-1]["eval_nll"] < 0.8 * evaluations[0]["eval_nll"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    report = json.loads((output / "report.json").read_text())
    assert report["log"] == history(output) and report["status"] == "finished"
    assert report["given"]["dft_alpha"] == 0.7 and report["environment"]["parallelism"] == "DeepSpeed ZeRO-3"
    assert len(report["tokens"]) == 2 and all(view["conversations"] for view in report["tokens"])
    assert "DeepSpeed ZeRO-3" in (output / "report.html").read_text() and (output / "report.png").exists()


def test_the_short_command_line_trains_on_a_split_of_its_data(example, forks):
    output = example.folder / "short"
    words = [
        "--model_name_or_path", str(example.model), "--data_files", str(example.train), str(example.other),
        "--deepspeed", str(ROOT / "ds_config/zero3.json"), "--output_dir", str(output),
        "--logging_dir", str(example.folder / "tracker"), *COMMAND.split(),
        "--max_train_samples", "64", "--logging_steps", "1", "--preprocessing_num_workers", "2",
    ]  # fmt: skip
    codes, printed = forks.run(words, ranks=2)
    assert codes == [0, 0], printed
    report = json.loads((output / "data_report.json").read_text())
    assert report["train"]["sequences"] == 64 and report["eval"]["sequences"] == 6  # 2 % of 300
    assert [record["step"] for record in train_records(output)] == [1, 2]
    assert eval_records(output)[-1]["step"] == 2 and (output / "checkpoint-2").is_dir()


def test_flags_without_effect_are_reported_once(long_run):
    _, printed = long_run
    for words in (
        "--save_safetensors True has no effect",
        "--reduce_logging True has no effect",
        "--log_metrics_steps 10 has no effect",
        "--validation_split_percentage 2 has no effect",
        "no accelerator found: running on CPU",
        "swanlab: no login and no SWANLAB_MODE, so it runs offline",
    ):
        assert printed.count(words) == 1, words


def test_warmup_ratio_is_mapped_to_warmup_steps(long_run):
    output, printed = long_run
    assert "10 optimizer steps (1 for warm-up), cosine" in printed
    assert train_records(output)[0]["learning_rate"] == pytest.approx(3e-3, rel=0.05)


def test_the_tracker_writes_to_logging_dir(example, long_run):
    assert [path for path in (example.folder / "tracker").rglob("*") if path.is_file()]


def test_the_best_checkpoint_is_not_rotated_away(long_run):
    """With --greater_is_better False the best checkpoint is the first, and also the oldest."""
    output, printed = long_run
    accuracies = [record["eval_acc"] for record in eval_records(output)]
    assert accuracies[0] == min(accuracies) < accuracies[-1]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-2"]
    weights = load_file(output / "checkpoint-2" / "model.safetensors")
    assert all(weight.numel() > 0 for weight in weights.values())
    assert not list(output.glob("checkpoint-*/global_step*"))  # --save_only_model
    assert f"{output}/checkpoint-2 (eval_acc {accuracies[0]:.4g})" in printed


@pytest.mark.slow
def test_run_args_reproduces_the_run(example, long_run):
    output, _ = long_run
    replayed = example.folder / "replayed"
    saved = yaml.safe_load((output / "run_args.yaml").read_text())
    assert saved["learning_rate"] == 3e-3 and saved["data_files"] == [str(example.train), str(example.other)]
    words = ["--config", str(output / "run_args.yaml"), "--output_dir", str(replayed), "--report_to", "none"]
    words += ["--report", "False"]
    finished = launch(words, folder=example.folder, launcher="deepspeed")
    assert finished.code == 0, finished.output
    losses = [[record["loss"] for record in train_records(folder)] for folder in (output, replayed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_prepare_only_writes_the_data_and_no_model(example, forks):
    output = example.folder / "prepared"
    broken = example.folder / "tokenizer-only"
    shutil.copytree(example.model, broken)
    (broken / "model.safetensors").unlink()
    # The flags of the later job with GPUs, on a machine without them.
    words = example.words(
        output, model_name_or_path=broken, prepare_only=True, save_safetensors=True, bf16=True, tf32=True,
        attn_implementation="flash_attention_2", deepspeed=ROOT / "ds_config/zero3.json",
    )  # fmt: skip
    codes, printed = forks.run(words)
    assert codes == [0], printed
    report = json.loads((output / "data_report.json").read_text())
    assert report["train"]["conversations"] == 297 and report["eval"]["conversations"] == 33
    assert sorted(path.name for path in output.iterdir()) == [
        ".run.lock", "data_report.json", "run_args.yaml",
    ]  # fmt: skip
    assert printed.count("--save_safetensors True has no effect") == 1


@pytest.mark.slow
def test_bad_data_is_one_message_and_every_rank_exits(example):
    data = example.folder / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": 3}\n')
    words = example.words(example.folder / "bad", data_files=data, deepspeed=ROOT / "ds_config/zero3.json")
    finished = launch(words, folder=example.folder, launcher="deepspeed", timeout=90)
    assert finished.code != 0
    assert finished.output.count("error: 2 conversations cannot be used:") == 1
    assert f"{data}:1: no assistant turn" in finished.output and f"{data}:2: " in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_name_or_path": "/nowhere/model"}, "error: --model_name_or_path /nowhere/model: "),
        ({"per_device_train_batchsize": 3}, "did you mean --per_device_train_batch_size?"),
        ({"attn_implementation": "flash_attention_2"}, "needs a CUDA GPU"),
    ],
)
def test_an_invalid_flag_is_one_line(example, forks, flags, message):
    codes, printed = forks.run(example.words(example.folder / "wrong", **flags))
    assert codes == [EXIT_USER_ERROR] and message in printed
    errors = [line for line in printed.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in printed


def test_help_prints_nothing_else(tmp_path):
    finished = launch(["--help"], folder=tmp_path, timeout=90)  # its output includes standard error
    assert finished.code == 0
    # A slow machine prints that it is still importing.
    lines = [line for line in finished.output.splitlines() if not line.startswith("start       importing")]
    assert lines[0].startswith("usage: train_dft.py [-h] --model_name_or_path")
    flags = {line.split()[0].rstrip(",") for line in lines if line.startswith("  -")}
    assert {"--data_files", "--objective", "--preflight", "--learning_rate", "--config"} <= flags
    headings = {line for line in lines if line and not line.startswith(" ")} - {lines[0]}
    assert headings == {"options:", "model:", "data:", "DFT:", "LoRA:", "monitoring:",
                        "training (transformers.TrainingArguments):"}  # fmt: skip
    assert "WARNING" not in finished.output and "INFO" not in finished.output


@pytest.mark.slow  # test_trackers.py has a run with several trackers
def test_wandb_without_a_login_runs_offline_and_reports_it(example):
    output = example.folder / "wandb-run"
    words = example.words(
        output,
        max_steps=2,
        report_to="wandb",
        logging_dir=example.folder / "wandb-logs",
        eval_strategy="steps",
    )
    finished = launch(words, folder=example.folder, timeout=120)
    assert finished.code == 0, finished.output
    assert finished.output.count("wandb: no login and no WANDB_MODE, so it runs offline") == 1
    assert list((example.folder / "wandb-logs").rglob("*.wandb"))
