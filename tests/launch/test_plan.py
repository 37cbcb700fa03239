"""`--plan True` through the command line."""

import re
import shutil

import pytest

from dft.errors import EXIT_USER_ERROR
from tests.launching import ROOT


@pytest.fixture(scope="module")
def shapes_alone(example):
    """A folder with the configuration and tokenizer of the example model, without weights."""
    folder = example.folder / "shapes"
    shutil.copytree(example.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_plan_needs_no_weights_and_writes_nothing(example, forks, shapes_alone):
    output = example.folder / "planned"
    flags = {"model_name_or_path": shapes_alone, "use_cpu": True, "plan": True, "num_train_epochs": 2}
    flags |= {"per_device_train_batch_size": 16, "plan_world_size": 2}
    codes, printed = forks.run(example.words(output, **flags), 1)
    assert codes == [0], printed
    count = float(re.search(r"plan +([\d.]+) M parameters", printed)[1])
    assert 0.4 < count < 0.8 and "2 x cpu, DDP" in printed
    rows = int(re.search(r"train +([\d,]+) conversations", printed)[1].replace(",", ""))
    steps = 2 * -(-rows // 32)
    assert f"{steps} optimizer steps of 32 rows" in printed
    assert re.search(r"fits +yes", printed)
    assert not list(output.iterdir())

    codes, printed = forks.run(example.words(output, **flags, plan_device_memory=0.02), 1)
    assert codes == [0] and re.search(r"fits +no: 20 MiB per device", printed), printed
    batch, accumulation, needed = re.search(
        r"--per_device_train_batch_size (\d+) --gradient_accumulation_steps (\d+): about (\d+) MiB", printed
    ).groups()
    assert int(batch) * int(accumulation) == 16 and int(needed) <= 0.92 * 20


def test_the_pass_of_base_scores_is_planned(example, forks, shapes_alone):
    flags = {"model_name_or_path": shapes_alone, "use_cpu": True, "plan": True, "base_scores": True}
    words = example.words(example.folder / "planned-scores", **flags)
    codes, printed = forks.run(words, 1)
    assert codes == [0] and re.search(r"fits +yes", printed), printed
    tokens = [
        int(
            re.search(rf"{split} +[\d,]+ conversations, [\d,]+ sequences, ([\d,]+) tokens", printed)[
                1
            ].replace(",", "")
        )
        for split in ("train", "eval")
    ]
    text = " ".join(printed.split())
    assert f"one forward pass over {sum(tokens):,} tokens before training, {tokens[1]:,} of them" in text
    share = int(re.search(r"(\d+) % of those of an epoch of training", text)[1])
    assert share == pytest.approx(100 / 3 * sum(tokens) / tokens[0], abs=1)
    needed = int(re.search(r"about (\d+) MiB per device at its peak", text)[1])

    codes, printed = forks.run([*words, "--plan_device_memory", str(needed / 2 / 1024)], 1)
    assert codes == [0] and re.search(r"fits +no", printed), printed
    assert "It does not fit: use a smaller --per_device_eval_batch_size" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"plan": True, "preflight": True}, "--plan True and --preflight True both end without training"),
        ({"plan_world_size": 8}, "--plan_world_size 8 has no effect without --plan True"),
        ({"plan": True, "plan_device_memory": 0}, "--plan_device_memory 0: must be greater than 0"),
        ({"plan": True, "plan_world_size": 10**9}, "--plan_world_size 1000000000: must be at most 1,000,000"),
        (
            {"plan": True, "plan_world_size": 3, "sequence_parallel_size": 2},
            "--sequence_parallel_size 2: 3 rank(s) cannot be divided into groups of 2",
        ),
        (
            {"plan": True, "dataloader_drop_last": True, "per_device_train_batch_size": 10**5},
            "--dataloader_drop_last True: ",
        ),
    ],
)
def test_invalid_plan_flags_are_rejected(example, forks, flags, message):
    output = example.folder / "not-planned"
    codes, printed = forks.run(example.words(output, use_cpu=True, **flags), 1)
    assert codes == [EXIT_USER_ERROR] and f"error: {message}" in printed, printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fsdp": True}, "8 x cpu, FSDP 2"),
        ({"sequence_parallel_size": 4}, "8 x cpu, DDP, 4 ranks per sequence"),
    ],
    ids=["fsdp", "sequences shared"],
)
def test_one_process_can_plan_for_more_ranks(example, forks, shapes_alone, flags, message):
    output = example.folder / "planned-away"
    flags = {"model_name_or_path": shapes_alone, "use_cpu": True, "plan": True, "plan_world_size": 8, **flags}
    codes, printed = forks.run(example.words(output, **flags), 1)
    assert codes == [0] and message in printed and re.search(r"fits +yes", printed), printed


@pytest.mark.parametrize("more", [{}, {"lora_r": 4}], ids=["all weights", "adapters"])
def test_a_plan_under_zero3_loads_shapes_only(example, forks, shapes_alone, more):
    output = example.folder / "planned-zero3"
    flags = {"model_name_or_path": shapes_alone, "use_cpu": True, "plan": True, "plan_world_size": 8, **more}
    codes, printed = forks.run(example.words(output, deepspeed=ROOT / "ds_config/zero3.json", **flags), 2)
    assert codes == [0, 0], printed
    assert "8 x cpu, DeepSpeed ZeRO-3" in printed and re.search(r"fits +yes", printed)
