"""Adapters are merged only into the model they were trained on, and written completely or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

from dft.arguments.lora import LoraArguments, check_not_adapters
from dft.errors import UserError
from dft.training.checkpoints.verify import probe
from dft.training.model.adapters import BASE_RECORD, add_adapters, write_base_record
from dft.training.parameters import shapes_digest
from scripts import merge_lora

pytest.importorskip("peft")
CPU = torch.device("cpu")
FILE = "adapter_model.safetensors"


def model_like(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> Path:
    """Save a model of the same family with other settings and random weights, and the same tokenizer."""
    config = AutoModelForCausalLM.from_pretrained(base).config
    if "num_hidden_layers" in settings:
        config.layer_types = ["full_attention"] * settings["num_hidden_layers"]
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, *targets: str) -> Path:
    """Save adapters with random weights in the format of a run."""
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    lora = LoraArguments(lora_r=2, lora_target_modules=list(targets) or None)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(base), lora, arguments, str(base))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    write_base_record(folder, model, shapes_digest(model))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += "{# of the run #}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 2], max_new_tokens=7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return adapt(tiny, tmp_path_factory.mktemp("trained") / "lora")


@pytest.fixture
def adapters(trained, tmp_path) -> Path:
    """A copy of the trained adapters, to be damaged by the test."""
    return Path(shutil.copytree(trained, tmp_path / "lora"))


def merge(adapters: Path, output: Path, base: Path | None = None, dtype: str = "auto") -> None:
    merge_lora.merge(adapters, output, base and str(base), dtype, trust_remote_code=False)


def refused(adapters: Path, output: Path, base: Path | None = None) -> str:
    """Return the error of a merge, after checking that the output folder is unchanged."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(UserError) as error:
        merge(adapters, output, base)
    assert sorted(output.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "lm_head"), ("q_proj", "embed_tokens")], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of adapters on tied embeddings
def test_the_merged_model_gives_the_logits_of_base_and_adapters(tiny, tmp_path, targets, tied, dtype):
    base = model_like(tiny, tmp_path / "base", dtype, tie_word_embeddings=tied)
    adapters = adapt(base, tmp_path / "lora", *targets)
    merge(adapters, tmp_path / "merged")
    adapted, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("lora", "merged"))
    vocab = adapted.config.vocab_size
    expected, logits = (probe(model, vocab, CPU) for model in (adapted, merged))
    assert merged.dtype == dtype and not [name for name in merged.state_dict() if "lora" in name]
    assert (logits - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 1e-5)
    before = probe(AutoModelForCausalLM.from_pretrained(base), vocab, CPU)
    assert (before - expected).norm() / expected.norm() > 0.2
    assert merged.config.tie_word_embeddings == (tied and not targets)


def test_the_merged_model_has_tokenizer_and_generation_settings_of_the_adapters(trained, tmp_path):
    merge(trained, tmp_path / "merged", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template.endswith("{# of the run #}")
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert (settings.eos_token_id, settings.max_new_tokens) == ([1, 2], 7)
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_hidden_layers": 1},
            "it has no module for 14 of 28 tensors, such as base_model.model.model.layers.1",
        ),
        ({"num_hidden_layers": 4}, "its num_hidden_layers is 4 instead of 2"),
        ({"hidden_size": 64}, "size mismatch"),
        ({"vocab_size": 364}, "its vocab_size is 364 instead of 271"),
    ],
    ids=["fewer layers", "more layers", "narrower", "larger vocabulary"],
)
def test_a_different_base_model_is_rejected(tiny, trained, tmp_path, settings, message):
    base = model_like(tiny, tmp_path / "base", **settings)
    error = refused(trained, tmp_path / "merged", base)
    assert error.startswith(f"{base}: is not the model that the adapters in {trained} were trained on: ")
    assert message in error and error.endswith("; name that model by --base")


def test_a_base_model_that_differs_in_modules_without_adapters_is_rejected(tiny, tmp_path):
    adapters = adapt(tiny, tmp_path / "lora", "q_proj")
    base = model_like(tiny, tmp_path / "base", intermediate_size=64)
    assert "its weights have other names or shapes" in refused(adapters, tmp_path / "merged", base)


def test_adapters_are_rejected_as_a_base_model(trained, tmp_path):
    assert "it has adapters itself; name that model" in refused(trained, tmp_path / "merged", trained)
    with pytest.raises(UserError, match=r"lora: holds adapters, not a model; merge them .*merge_lora\.py "):
        check_not_adapters(str(trained))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_base_model_with_more_layers_is_rejected_without_a_record(tiny, tmp_path):
    adapters = adapt(tiny, tmp_path / "lora", "q_proj")  # in every layer
    (adapters / BASE_RECORD).unlink()
    base = model_like(tiny, tmp_path / "base", num_hidden_layers=4)
    message = (
        "4 of the 8 tensors for its modules are missing, such as base_model.model.model.layers.2.self_attn."
    )
    assert message in refused(adapters, tmp_path / "merged", base)


def test_adapters_without_a_record_are_merged(adapters, tmp_path):
    (adapters / BASE_RECORD).unlink()
    merge(adapters, tmp_path / "merged")
    assert (tmp_path / "merged/config.json").is_file()


def test_the_record_of_a_4_bit_model_has_no_shapes(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.quantization_config = {"load_in_4bit": True}
    write_base_record(tmp_path, model, "of packed weights")
    record = json.loads((tmp_path / BASE_RECORD).read_text())
    assert record == {"sizes": {"vocab_size": 271, "num_hidden_layers": 2}, "shapes": ""}


@pytest.mark.parametrize("name", ["/nowhere/model", None])
def test_a_missing_base_model_can_be_named(tiny, adapters, tmp_path, name):
    settings = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
    assert "by --base" in refused(adapters, tmp_path / "merged")
    merge(adapters, tmp_path / "merged", tiny)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


ADAPTER_CONFIG, TOKENIZER = "is adapter_config.json damaged?", "the tokenizer and the generation settings of"
DAMAGE = {
    "broken settings": (
        "adapter_config.json",
        lambda file: file.write_text("{"),
        ADAPTER_CONFIG,
    ),
    "no kind": ("adapter_config.json", lambda file: file.write_text("{}"), ADAPTER_CONFIG),
    "list": ("adapter_config.json", lambda file: file.write_text("[]"), ADAPTER_CONFIG),
    "truncated": (FILE, truncate, f"{FILE} cannot be read"),
    "no weights": (FILE, Path.unlink, f"it has no weights ({FILE})"),
    "not finite": (FILE, not_finite, "holds values that are not finite"),
    "broken record": (BASE_RECORD, lambda file: file.write_text("[1]"), f"{BASE_RECORD}: cannot be read"),
    "broken tokenizer": ("tokenizer.json", lambda file: file.write_text("{"), TOKENIZER),
    "broken stops": (
        "generation_config.json",
        lambda file: file.write_text("{"),
        TOKENIZER,
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapters_are_an_error(adapters, tmp_path, kind):
    name, damage, message = DAMAGE[kind]
    damage(adapters / name)
    error = refused(adapters, tmp_path / "merged")
    assert message in error and str(adapters) in error


def test_a_truncated_base_model_is_an_error(tiny, trained, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    truncate(base / "model.safetensors")
    assert refused(trained, tmp_path / "merged", base).startswith(f"{base}: SafetensorError: ")


def test_a_base_model_with_missing_weights_is_rejected(tiny, trained, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert f"{base}: has no model.norm.weight in its files" in refused(trained, tmp_path / "merged", base)


def test_adapters_of_other_types_are_rejected(adapters, tmp_path):
    settings = {"peft_type": "IA3", "base_model_name_or_path": "model"}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    assert "holds IA3 adapters; only LoRA adapters can be merged" in refused(adapters, tmp_path / "merged")


def test_an_existing_output_is_rejected(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    for name in ("file", "full"):
        assert refused(trained, tmp_path / name).endswith(f"{name}: exists already; name a new folder")
    with pytest.raises(UserError, match="is not a folder; remove it or name another"):
        merge(trained, tmp_path / "file/merged")
    assert (tmp_path / "file").read_text() == (tmp_path / "full/mine").read_text() == "mine"


def test_an_empty_output_and_leftovers_of_a_killed_merge_are_replaced(trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "incomplete-merged").mkdir()
    (tmp_path / "incomplete-merged/model.safetensors").write_text("half")
    merge(trained, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_merged_model_that_fails_its_check_is_removed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_lora, "untie_embeddings", lambda model: model.lm_head.weight.data.mul_(-1))
    assert "not written; the merged model failed its check" in refused(trained, tmp_path / "merged")


def test_an_interrupted_merge_leaves_no_files(trained, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        assert (tmp_path / "incomplete-merged/model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_lora, "check_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(trained, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(trained, tmp_path, monkeypatch):
    def full(_: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(merge_lora, "flush_to_disk", full)
    error = refused(trained, tmp_path / "merged")
    assert "cannot be written: no space left on the device" in error and "name a folder elsewhere" in error
