"""Verification detects saved models that differ from the trained model, and accepts undamaged ones."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from dft import DFTTrainer
from dft.training.checkpoints import verify
from dft.training.checkpoints.verify import Damaged, Expected, check_files, check_loaded, dtypes_of, probe
from dft.training.run_options import RunOptions
from tests.reliability.spoiling import EMBEDDING

CPU = torch.device("cpu")
NORM = "model.norm.weight"


@pytest.fixture
def saved(tiny, tmp_path) -> tuple[Path, Expected]:
    """An undamaged model folder, and the reference to check it against."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logits = probe(model, model.config.vocab_size, CPU)
    return folder, Expected(dtypes_of(model), tokenizer, logits)


def check(folder: Path, expected: Expected, **flags: object) -> None:
    arguments = TrainingArguments(str(folder.parent), use_cpu=True, report_to="none", **flags)
    check_files(folder, expected)
    check_loaded(folder, expected, arguments, trust_remote_code=False)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoiled_value(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[NORM].view(-1)[3:4].fill_(value)


def sharded(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def test_an_undamaged_model_passes(saved):
    folder, expected = saved
    before = torch.get_rng_state()
    check(folder, expected)
    sharded(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    check(folder, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtypes_of_unsaved_buffers_are_ignored(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0], dtype=torch.bfloat16)
    assert any(buffer.dtype == torch.float32 for buffer in model.buffers()), "of the positions"
    assert dtypes_of(model) == {torch.bfloat16}


def test_rounding_to_half_precision_is_tolerated(saved):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = probe(exact, model.config.vocab_size, CPU)
    check(folder, Expected(dtypes_of(model), expected.tokenizer, logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({NORM: torch.zeros(0)}), f"{NORM} has no elements .shape .0.."),
        (lambda weights: weights.update({NORM: weights[NORM].half()}), f"{NORM} is float16, and was"),
        (spoiled_value(float("nan")), f"{NORM} holds values that are not finite"),
        (spoiled_value(float("-inf")), f"{NORM} holds values that are not finite"),
        (lambda weights: weights.pop(NORM), f"{NORM} is not in its files"),
        (lambda weights: weights[EMBEDDING].copy_(weights[EMBEDDING].flip(0)), "it gives different logits"),
        (lambda weights: weights.clear(), "it has no weights"),
    ],
    ids=["zero-size", "dtype", "nan", "infinity", "missing", "other-weights", "empty"],
)  # fmt: skip
def test_damaged_weights_are_detected(saved, change, message):
    folder, expected = saved
    rewritten(folder, change)
    with pytest.raises(Damaged, match=message):
        check(folder, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "it has no config.json"),
        ("tokenizer_config.json", "it has no tokenizer_config.json"),
        ("tokenizer.json", "cannot be loaded|another vocabulary"),
        ("model.safetensors", "it has no weights"),
        ("chat_template.jinja", "its chat template is not the one"),
    ],
)
def test_missing_files_are_detected(saved, name, message):
    folder, expected = saved
    expected.tokenizer.chat_template = "{{ messages }}"
    expected.tokenizer.save_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(Damaged, match=message):
        check(folder, expected)


def test_renamed_weights_are_detected(saved):
    folder, expected = saved
    names = frozenset(load_file(folder / "model.safetensors")) | {"model.visual.weight", "mtp.weight"}
    check(folder, replace(expected, names=names))
    rewritten(folder, lambda weights: weights.update({f"language_model.{NORM}": weights.pop(NORM)}))
    with pytest.raises(
        Damaged, match=rf"1 of \d+ weights have names .* such as language_model.{NORM}; other"
    ):
        check_files(folder, replace(expected, names=names))


def test_missing_and_truncated_shards_are_detected(saved):
    folder, expected = saved
    sharded(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(Damaged, match=f"{shard.name} cannot be read"):
        check(folder, expected)
    shard.unlink()
    with pytest.raises(Damaged, match=f"it has no {shard.name}, which model.safetensors.index.json names"):
        check(folder, expected)


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "tied": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "softcap": transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "experts": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
    "experts-with-buffers": transformers.DeepseekV3Config(
        **SIZES, num_key_value_heads=4, n_routed_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, first_k_dense_replace=1,
    ),
    "linear-attention": transformers.Qwen3NextConfig(
        **SIZES, **EXPERTS, shared_expert_intermediate_size=16, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_undamaged_models_of_many_families_pass(tmp_path, family, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    ids = list(range(5, 25))
    data = [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]}] * 2
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_steps=1, learning_rate=1e-2,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DFTTrainer(model, arguments, train_dataset=data, options=RunOptions(verify_save="all"))
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "checkpoint-1").is_dir()


def test_a_note_is_printed_if_memory_is_too_small_to_reload_the_model(saved, monkeypatch, capsys):
    folder, expected = saved
    monkeypatch.setattr(verify, "LOADING_MEMORY_FACTOR", 1e12)
    check(folder, expected)
    assert "was not loaded to be verified, only read" in capsys.readouterr().out


def test_an_adapter_is_loaded_with_its_base_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected.tokenizer.save_pretrained(tmp_path / "adapter")
    logits = probe(adapted, model.config.vocab_size, CPU)
    adapted_expected = Expected(dtypes_of(adapted), expected.tokenizer, logits)
    check(tmp_path / "adapter", adapted_expected)
    with pytest.raises(Damaged, match="it gives different logits"):
        check(
            tmp_path / "adapter",
            Expected(adapted_expected.dtypes, adapted_expected.tokenizer, expected.logits),
        )
