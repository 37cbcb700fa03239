"""Runs with insufficient memory: the error message and the search for a batch size that fits."""

import json
from pathlib import Path

import pytest

from dft.errors import EXIT_SMALLER_BATCH, EXIT_USER_ERROR
from tests.launching import ROOT, launch
from tests.reliability.selecting import mostly_slow

MIB = 2**20
LITTLE = str(12 * MIB)
"""Bytes that a process may allocate after its first step, less than one micro-batch of these runs needs."""
SCRIPT = """
import dft.training.run
import train_dft
from tests.dying import DyingTrainer
dft.training.run.DFTTrainer = DyingTrainer
train_dft.main()
"""


def words(example, output: Path, ranks: int = 1, **flags) -> list[str]:
    more = {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True} if ranks > 1 else {}
    settings = {
        "per_device_train_batch_size": 256 // ranks, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 1, "resume_from_checkpoint": "auto", **more, **flags,
    }  # fmt: skip
    return example.words(output, **settings)


def logged(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [record for record in history if "grad_norm" in record]


def check_same(first: Path, other: Path) -> None:
    """Check that two runs saw the same data in the same steps, up to dropout."""
    assert [record["step"] for record in logged(first)] == [1, 2, 3, 4]
    for record, reference in zip(logged(first), logged(other), strict=True):
        assert record["supervised_tokens"] == reference["supervised_tokens"]
        assert record["nll"] == pytest.approx(reference["nll"], rel=0.01)


@pytest.mark.parametrize("ranks", mostly_slow([1, 2], [1]))
def test_the_error_lists_memory_use_and_remedies(example, forks, tmp_path, ranks):
    env = {"DIE_AT": "step 1", "DIE_BY": "MEMORY", "DISK": LITTLE, "DIE_RANK": str(ranks - 1)}
    codes, printed = forks.run(words(example, tmp_path / "run", ranks), ranks, **env)
    assert codes == [EXIT_USER_ERROR] * ranks, printed
    assert printed.count("error: out of memory in step") == 1 and "Traceback" not in printed
    assert ranks == 1 or "[rank 1] error: out of memory" in printed
    message = next(line for line in printed.splitlines() if "error:" in line)
    assert "activations" in message and "--enable_gradient_checkpointing True" in message
    assert f"--per_device_train_batch_size {128 // ranks} --gradient_accumulation_steps 2" in message
    assert (tmp_path / "run" / "checkpoint-1").is_dir() and not (
        tmp_path / "run" / "batch_size.json"
    ).exists()


@pytest.mark.slow
def test_several_ranks_resume_with_a_smaller_batch(example, forks, tmp_path):
    env = {"DIE_AT": "step 1", "DIE_BY": "MEMORY", "DISK": LITTLE, "DIE_RANK": "1"}
    flags = words(example, tmp_path / "run", 2, auto_find_batch_size=True)
    codes, printed = forks.run(flags, 2, **env)
    assert codes == [EXIT_SMALLER_BATCH] * 2 and "64 rows per device and 2 accumulated are next" in printed
    codes, printed = forks.run(flags, 2)
    assert not any(codes) and "(64 per device x 2 accumulated x 2 ranks)" in printed, printed
    codes, printed = forks.run(words(example, tmp_path / "whole", 2), 2)
    assert not any(codes), printed
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_one_process_restarts_itself_with_a_smaller_batch(example, forks, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = {"DIE_AT": "step 1", "DIE_BY": "MEMORY", "DISK": LITTLE}
    flags = words(example, tmp_path / "run", auto_find_batch_size=True, save_steps=100)
    finished = launch(flags, folder=tmp_path, script=script, env=env)
    assert finished.code == 0, finished.output
    assert "128 rows per device and 2 accumulated are next" in finished.output
    assert "(128 per device x 2 accumulated x 1 rank)" in finished.output
    is_kept = (tmp_path / "run" / "checkpoint-1").is_dir()
    assert is_kept or "too little memory to save the last completed step" in finished.output
    (code,), printed = forks.run(words(example, tmp_path / "whole"))
    assert code == 0, printed
    check_same(tmp_path / "run", tmp_path / "whole")
