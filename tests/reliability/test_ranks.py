"""Dead and hung ranks are named and end the run; runs resume with a different number of ranks."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_USER_ERROR
from tests.forking import Run
from tests.launching import ROOT, eval_records, train_records
from tests.reliability.selecting import mostly_slow
from tests.reliability.test_resume import OF_THE_MACHINE

TRAINED = "train step"


def words(example, output: Path, kind: str, **flags) -> list[str]:
    zero = {"deepspeed": ROOT / f"ds_config/{kind}.json"} if kind.startswith("zero") else {}
    settings = {
        "use_cpu": True, "save_strategy": "steps", "num_train_epochs": 40, "save_steps": 1000,
        "per_device_train_batch_size": 16, **zero, **flags,
    }  # fmt: skip
    return example.words(output, **settings)


def once_trained(run: Run) -> None:
    until = time.monotonic() + 60
    while TRAINED not in run.output:
        assert time.monotonic() < until, run.output
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kind", "lost"), mostly_slow([("zero3", 0), ("zero3", 1), ("ddp", 1)], [("zero3", 1)])
)
def test_a_dead_rank_is_named_and_the_others_exit(example, forks, kind, lost):
    run = forks.start(words(example, example.folder / f"died-{kind}-{lost}", kind), 2)
    once_trained(run)
    run.kill(signal.SIGKILL, lost)
    codes = run.codes()  # far sooner than the collective would time out, after --ddp_timeout 1800
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    assert run.output.count("error:") == 1 and "Traceback" not in run.output, run.output
    assert f"error: rank {lost} (process {run.processes[lost]} on" in run.output
    assert "--resume_from_checkpoint auto to resume" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_hanging_rank_is_named_and_the_others_exit(example, forks, stuck):
    output = example.folder / f"hung-{stuck}"
    run = forks.start(words(example, output, "zero3", ddp_timeout=4), 2, SILENCE="6")
    once_trained(run)
    run.kill(signal.SIGSTOP, stuck)
    codes = run.codes()  # the launcher must kill a stopped rank
    assert all(codes)
    assert f"error: rank {stuck} (process {run.processes[stuck]} on" in run.output, run.output
    # Rank 0 holds the store in which the progress of the ranks is recorded.
    assert ["did not respond for 6 s", "made no progress for 4 s (--ddp_timeout)"][stuck] in run.output


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_stops_responding_is_named(example, forks, lost):
    """Ranks on different machines communicate only through the store; the host names are equal."""
    output = example.folder / f"silent-{lost}"
    run = forks.start(words(example, output, "ddp"), 2, HOST="node", MACHINES="north south", SILENCE="3")
    once_trained(run)
    run.kill(signal.SIGSTOP, lost)
    codes = run.codes()
    assert all(codes)
    assert f"error: rank {lost} (process {run.processes[lost]} on node)" in run.output, run.output


@pytest.mark.slow
def test_a_dead_rank_ends_the_ranks_of_all_machines(example, forks):
    output = example.folder / "found-out"
    run = forks.start(words(example, output, "ddp"), 3, HOST="south", MACHINES="north south south")
    once_trained(run)
    run.kill(signal.SIGKILL, 2)
    codes = run.codes()
    assert codes[2] == -signal.SIGKILL and codes[:2] == [1, 1]
    assert (
        run.output.count(f"error: rank 2 (process {run.processes[2]} on south) died") == 2
    )  # one per machine


@pytest.fixture(scope="module")
def saved(example, forks):
    """Output folders of two-rank runs of ten steps, with a checkpoint in the second epoch."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = example.folder / f"two-ranks-{kind}"
            codes, output = forks.run(of_two_epochs(example, folders[kind], kind, 2), 2)
            assert not any(codes), output
        return folders[kind]

    return make


def dry(example) -> Path:
    """The example model without dropout, whose random numbers depend on the number of ranks."""
    folder = example.folder / "dry"
    if not folder.exists():
        shutil.copytree(example.model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    return folder


def of_two_epochs(example, output: Path, kind: str, accumulation: int, **flags) -> list[str]:
    return words(
        example, output, kind, num_train_epochs=2, save_steps=7, gradient_accumulation_steps=accumulation,
        logging_steps=2, eval_strategy="epoch", weight_decay=0.1, model_name_or_path=dry(example), **flags,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ranks"),
    mostly_slow(
        [(kind, ranks) for kind in ("zero3", "zero2", "ddp") for ranks in (1, 4)],
        [("zero3", 4), ("ddp", 1)],
    ),
)
def test_a_run_resumes_with_a_different_number_of_ranks(example, forks, saved, kind, ranks):
    """Rows per step, data position, optimizer, schedule and logging window are restored."""
    whole = saved(kind)
    output = example.folder / f"two-ranks-{kind}-by-{ranks}"
    (output).mkdir()
    shutil.copytree(whole / "checkpoint-7", output / "checkpoint-7")
    flags = {"resume_from_checkpoint": "auto"}
    codes, printed = forks.run(of_two_epochs(example, output, kind, 4 // ranks, **flags), ranks)
    assert not any(codes), printed
    assert f"saved by 2 ranks, and this run has {ranks}" in printed and "(dropout) do not" in printed
    expected, got = load_file(whole / "model.safetensors"), load_file(output / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=2e-6)
    for before, after in zip(train_records(whole), train_records(output), strict=True):
        assert before["step"] == after["step"] and before["supervised_tokens"] == after["supervised_tokens"]
        for name in before.keys() - set(OF_THE_MACHINE) - {"padding_share", "epoch"}:
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-7), name
    assert eval_records(output)[-1]["eval_nll"] == pytest.approx(
        eval_records(whole)[-1]["eval_nll"], rel=1e-5
    )
    assert not list(output.glob("incomplete-*"))


@pytest.mark.parametrize(
    ("ranks", "accumulation", "message"),
    [
        (1, 2, "saved with 64 rows per step, and this run has 32 .*give --gradient_accumulation_steps 4"),
        (3, 1, "3 ranks cannot share 64 rows evenly"),
    ],
)
def test_a_different_number_of_rows_per_step_is_rejected(
    example, forks, saved, ranks, accumulation, message, request
):
    output = example.folder / request.node.name
    flags = {"resume_from_checkpoint": saved("ddp") / "checkpoint-7"}
    codes, printed = forks.run(of_two_epochs(example, output, "ddp", accumulation, **flags), ranks)
    assert EXIT_USER_ERROR in codes and 0 not in codes
    assert re.search(message, printed) and "Traceback" not in printed, printed


def test_a_sharded_checkpoint_is_not_loaded_without_sharding(example, forks, saved):
    flags = {"resume_from_checkpoint": saved("zero3") / "checkpoint-7"}
    (code,), printed = forks.run(of_two_epochs(example, example.folder / "mixed", "ddp", 4, **flags))
    assert (
        code == EXIT_USER_ERROR and "saved under DeepSpeed ZeRO-3, and this run is single process" in printed
    )


@pytest.mark.parametrize("ranks", mostly_slow([1, 2], [1]))
def test_full_determinism_makes_runs_bit_identical(example, forks, ranks):
    kind = "zero3" if ranks > 1 else "single"
    ends = []
    for number in range(2):
        output = example.folder / f"determined-{kind}-{number}"
        flags = {"full_determinism": True, "max_steps": 4, "dataloader_num_workers": number}
        codes, printed = forks.run(words(example, output, kind, **flags), ranks)
        assert not any(codes), printed
        ends.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
