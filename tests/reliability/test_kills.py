"""Runs that are killed repeatedly at random moments end with the weights of an uninterrupted run."""

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT
from tests.reliability.test_resume import logged

KILLS = int(os.environ.get("KILLS", "30"))
LIVES = 3
"""Number of kills that a run has to survive."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "zero3"])
def test_kills_at_random_moments(example, forks, kind):
    """Every step is saved and checkpoints are rotated, so that many kills happen during a save."""
    ranks = 1 if kind == "single" else 2
    more = {"deepspeed": ROOT / f"ds_config/{kind}.json", "use_cpu": True} if ranks > 1 else {}

    def words(output):
        return example.words(
            output, num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
            save_total_limit=2, eval_strategy="steps", eval_steps=3, logging_steps=2, packing=True,
            max_length=96, per_device_train_batch_size=16 // ranks, resume_from_checkpoint="auto", **more,
        )  # fmt: skip

    reference = example.folder / f"unkilled-{kind}"
    assert not any(forks.run(words(reference), ranks)[0])
    slow = {"SAVE_SLOWLY": "0.1"}
    started = time.monotonic()
    assert not any(forks.run(words(example.folder / f"timed-{kind}"), ranks, **slow)[0])
    lasts = time.monotonic() - started
    chance = random.Random(7)
    kills = passed_over = within_saves = 0
    while kills < KILLS:
        output = example.folder / f"killed-often-{kind}-{kills}"
        for _ in range(LIVES):
            run = forks.start(words(output), ranks, **slow)
            time.sleep(chance.uniform(0.1, 0.9) * lasts)
            # Kill one rank, or all of them, as when a machine fails.
            run.kill(signal.SIGKILL, chance.choice([None, *range(ranks)]))
            codes = run.codes()
            if "train step" in run.output:  # ranks watch one another only during training
                assert "Traceback" not in run.output, run.output
            if not any(codes):
                continue  # the run ended before it was killed
            kills += 1
            within_saves += bool(list(output.glob("incomplete-*")))
        codes, printed = forks.run(words(output), ranks)
        assert not any(codes), printed
        passed_over += printed.count("skipped /")
        expected, got = load_file(reference / "model.safetensors"), load_file(output / "model.safetensors")
        assert all(torch.equal(weight, got[name]) for name, weight in expected.items()), printed
        assert logged(output) == logged(reference)
        assert not list(output.glob("incomplete-*"))
    print(f"\n{kind}: {kills} kills survived, {within_saves} of them within a save or removal")
