"""Files of a model's folder that are saved with the trained model, and what is left out."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dft.training.model.companion_files import MAX_BYTES, copy_companions, left_out_note
from dft.training.model.weight_names import source_names
from tests.families import make_family

KEPT = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.model",
    "merges.txt", "tekken.json", "modeling_own.py", "LICENSE", "Notice.md",
)  # fmt: skip
WRITTEN_ANEW = (
    "README.md", "trainer_state.json", "data_report.json", "run_args.yaml", "report.html", "manifest.json",
    "special_tokens_map.json", "chat_template.json", "train_results.json", "optimizer.pt", "rng_state_0.pth",
    "pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json", ".run.lock",
)  # fmt: skip


@pytest.fixture
def source(tokenizer_folder, tmp_path) -> Path:
    folder = make_family("qwen3_5", tokenizer_folder, tmp_path / "source")
    for name in (*KEPT, *WRITTEN_ANEW):
        if not (folder / name).exists():
            (folder / name).write_text(f"{name} of the source")
    (folder / "checkpoint-5").mkdir()
    return folder


def test_files_other_than_weights_and_of_runs_are_copied(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("new")
    (source / "preprocessor_config.json").chmod(0o444)
    (source / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    copy_companions(str(source), target)
    assert (target / "config.json").read_text() == "new"
    copied = {path.name for path in target.iterdir()}
    assert copied >= set(KEPT) and not copied & {*WRITTEN_ANEW, "large.json", "model.safetensors"}
    assert (target / "LICENSE").read_text() == "LICENSE of the source"
    copy_companions("", target)
    copy_companions("no/such-model", target)
    assert {path.name for path in target.iterdir()} == copied


def test_what_is_left_out_is_named(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "original").mkdir()
    (source / "demo.ipynb").write_text("")
    (source / "model.safetensors.index.json").unlink()
    note = left_out_note(str(source), model, source_names(str(source)))
    assert note.endswith(
        "holds what the saved model will not: 21 weights that its text part does not use (model.visual), "
        "demo.ipynb, original/"
    )


def test_nothing_is_left_out_of_a_language_model(tokenizer_folder, tmp_path):
    folder = make_family("llama", tokenizer_folder, tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert left_out_note(str(folder), model, source_names(str(folder))) is None
    shutil.copy(folder / "config.json", folder / "params.json")
    assert left_out_note(str(folder), model, source_names(str(folder))) is None
