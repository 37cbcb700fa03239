"""Saved models can be loaded, and resumed runs are bit-identical to uninterrupted ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.launch.probing import PROBE
from tests.launching import ROOT, eval_records, launch, train_records

PROBING = Path(__file__).parent / "probing.py"
STEPS_PER_EPOCH = 5
OF_THE_MACHINE = ("tokens_per_second", "peak_memory_gib", "seconds_left")
"""Log entries that differ between identical runs."""
RESUME_AT = 7
"""A step in the middle of the second epoch, between two log lines, evaluations and saves."""


def run(example, forks, output: Path, kind: str, **flags) -> None:
    if kind == "zero3":
        flags = {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True, **flags}
    words = example.words(
        output, num_train_epochs=2, per_device_train_batch_size=16 if kind != "single" else 32,
        gradient_accumulation_steps=2, logging_steps=2, save_strategy="steps", save_steps=RESUME_AT,
        eval_strategy="epoch", warmup_ratio=0.2, **flags,
    )  # fmt: skip
    if kind == "zero3":  # without a launcher, which would take longer than the run
        codes, printed = forks.run(words, 2, PROBING)
        assert codes == [0, 0], printed
        return
    launcher = {"ddp": "torchrun", "single": "python"}[kind]
    finished = launch(words, folder=example.folder, launcher=launcher, script=PROBING)
    assert finished.code == 0, finished.output


@pytest.fixture(scope="module")
def finished_run(example, forks):
    """Output folders of uninterrupted runs by kind of parallelism, created on first use."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = example.folder / f"whole-{kind}"
            run(example, forks, folders[kind], kind)
        return folders[kind]

    return make


@pytest.mark.parametrize("kind", ["zero3", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_saved_model_gives_the_logits_of_the_model_in_memory(finished_run, kind):
    folder = finished_run(kind)
    weights = load_file(folder / "model.safetensors")
    assert weights and all(weight.numel() > 0 and torch.isfinite(weight).all() for weight in weights.values())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.use_cache
    with torch.no_grad():
        reloaded = model(input_ids=PROBE).logits
    torch.testing.assert_close(reloaded, torch.load(folder / "probe.pt"), rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>" in tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow  # tests/reliability interrupts runs at more moments, without a launcher
@pytest.mark.parametrize("kind", ["zero3", "ddp", "single"])
def test_a_resumed_run_equals_the_uninterrupted_run(example, forks, finished_run, kind):
    whole = finished_run(kind)
    output = example.folder / f"resumed-{kind}"
    run(example, forks, output, kind, resume_from_checkpoint=whole / f"checkpoint-{RESUME_AT}")
    expected, got = load_file(whole / "model.safetensors"), load_file(output / "model.safetensors")
    start = load_file(example.model / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name
        assert not torch.equal(weight, start[name]), f"{name} was not trained"
    records, resumed = train_records(whole), train_records(output)
    assert [record["step"] for record in resumed] == list(range(2, 2 * STEPS_PER_EPOCH + 1, 2))
    for before, after in zip(records, resumed, strict=True):
        learned, again = (
            {k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in (before, after)
        )
        assert learned == again and len(learned) > 12
    assert eval_records(whole)[-1]["eval_nll"] == eval_records(output)[-1]["eval_nll"]


@pytest.mark.slow  # tests/reliability/test_ranks.py does so without a launcher
def test_resuming_with_other_rows_per_step_is_one_error_under_the_launcher(example, finished_run):
    checkpoint = finished_run("zero3") / f"checkpoint-{RESUME_AT}"
    words = example.words(
        example.folder / "one-rank",
        resume_from_checkpoint=checkpoint,
        deepspeed=ROOT / "ds_config/zero3.json",
    )
    finished = launch(words, folder=example.folder, launcher="deepspeed", ranks=1)
    assert finished.code != 0 and "Traceback" not in finished.output
    assert "saved with 64 rows per step, and this run has 8" in finished.output
