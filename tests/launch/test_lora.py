"""LoRA adapters: invariance under sharding, saving, resuming and merging."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dft.errors import EXIT_USER_ERROR
from dft.training.model.adapters import BASE_RECORD
from tests.combinations import proves
from tests.launching import ROOT, train_records

peft = pytest.importorskip("peft")
LORA = {"lora_r": 4, "learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}


def ranks_of(kind: str) -> int:
    return 1 if kind == "single" else 2


def flags_of(kind: str) -> dict[str, object]:
    """Return the flags of adapters under single, ddp, zero2, zero3 or fsdp."""
    zero = {"deepspeed": ROOT / f"ds_config/{kind}.json"} if kind.startswith("zero") else {}
    return {**LORA, **zero, **({"fsdp": True} if kind == "fsdp" else {})}


def sharded(kind: str, alpha: float, *marks: pytest.MarkDecorator):
    """Return a case with the mark of what it proves."""
    return pytest.param(
        kind, alpha, marks=[proves({**flags_of(kind), "dft_alpha": alpha}, ranks_of(kind)), *marks]
    )


@pytest.fixture(scope="module")
def train(example, forks):
    """Train adapters under single, ddp, zero2, zero3 or fsdp with 32 rows per step."""

    def run(output: Path, kind: str, ranks: int | None = None, env: dict[str, str] | None = None, **flags):
        ranks = ranks or ranks_of(kind)
        settings = {"per_device_train_batch_size": 32 // ranks, "use_cpu": True, "eval_data_files": None}
        settings |= {"resume_from_checkpoint": "auto", **flags_of(kind), **flags}
        return forks.run(example.words(output, **settings), ranks, **(env or {}))

    return run


@pytest.fixture(scope="module")
def whole(example, train):
    """Output folders of uninterrupted runs."""
    folders: dict[tuple[str, float], Path] = {}

    def make(kind: str, alpha: float = 1.0) -> Path:
        if (kind, alpha) not in folders:
            folders[kind, alpha] = example.folder / f"lora-{kind}-{alpha}"
            codes, printed = train(folders[kind, alpha], kind, dft_alpha=alpha)
            assert not any(codes), printed
            assert re.search(
                r"^adapters    LoRA, rank 4, alpha 8.*0.02 M trainable parameters", printed, re.MULTILINE
            )
        return folders[kind, alpha]

    return make


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [
        sharded("ddp", 0.0),
        sharded("zero2", 0.5),
        sharded("zero3", 1.0),
        sharded("fsdp", 0.5),
        sharded("zero3", 0.0, pytest.mark.slow),
        sharded("zero3", 0.5, pytest.mark.slow),
    ],
)
@proves(flags_of("single"))
def test_a_step_does_not_depend_on_the_sharding(whole, kind, alpha):
    single, other = whole("single", alpha), whole(kind, alpha)
    for record, expected in zip(train_records(other), train_records(single), strict=True):
        for name in ("loss", "nll", "grad_norm", "acc"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (other, single))
    # A and B of seven linear layers in two blocks.
    assert weights.keys() == expected.keys() and len(weights) == 2 * 7 * 2
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    records = {(path / BASE_RECORD).read_text() for path in (single, other, other / "checkpoint-4")}
    assert len(records) == 1 and json.loads(records.pop())["shapes"]


def test_only_the_adapters_are_trained_and_saved(example, whole):
    folder = whole("zero3")
    assert not list(folder.rglob("model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(example.model).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    remaining = {
        name.replace(".base_layer", ""): weight
        for name, weight in loaded.state_dict().items()
        if "lora" not in name
    }
    assert all(torch.equal(weight, base[name]) for name, weight in remaining.items()) and len(
        remaining
    ) == len(base)
    moved = [weight.abs().sum().item() for name, weight in loaded.named_parameters() if "lora_B" in name]
    assert moved and all(moved)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(example.model.resolve())


def test_the_seed_determines_new_adapters_on_all_ranks(example, train, tmp_path):
    """They are created before the Trainer, which sets the seed of a run."""
    adapters = []
    for number, (seed, kind) in enumerate([(1, "single"), (1, "ddp"), (2, "single")]):
        output = tmp_path / str(number)
        codes, printed = train(output, kind, seed=seed, learning_rate=0, max_steps=1)
        assert not any(codes), printed
        adapters.append(load_file(output / "adapter_model.safetensors"))
    first, again, other = adapters
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    same = [name for name, weight in first.items() if torch.equal(weight, other[name])]
    assert same == [name for name in first if "lora_B" in name]  # these begin with 0


@pytest.mark.parametrize("kind", ["single", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_result_of_the_uninterrupted_run(example, train, whole, kind):
    output = example.folder / f"lora-killed-{kind}"
    codes, printed = train(output, kind, env={"DIE_AT": "step 5"})
    assert any(codes) and (output / "checkpoint-4").is_dir(), printed
    codes, printed = train(output, kind)
    assert not any(codes) and "train step 4" not in printed, printed
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (output, whole(kind)))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["zero3", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_dora_reads_whole_weights_under_sharding(example, train, tmp_path, kind):
    """It needs the norms of the rows of frozen weights. Here, ZeRO-3 keeps none of them between uses."""
    zero = json.loads((ROOT / "ds_config/zero3.json").read_text())
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        zero["zero_optimization"][f"stage3_{name}"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    flags = {"lora_args": json.dumps({"use_dora": True}), "max_steps": 3, "save_strategy": "no"}
    sharding = {"deepspeed": tmp_path / "zero3.json"} if kind == "zero3" else {}
    records = []
    for place, ranks, more in (("single", 1, {}), (kind, 2, sharding)):
        codes, printed = train(tmp_path / place, place, ranks, **{**flags, **more})
        assert not any(codes), printed
        assert "adapters    DoRA, rank 4" in printed
        assert "(AutoPeftModelForCausalLM.from_pretrained loads them with their base model;" in printed
        records.append(train_records(tmp_path / place))
    for record, expected in zip(*records, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    card = (tmp_path / kind / "README.md").read_text()
    assert "These are DoRA adapters of rank 4." in card
    saved = load_file(tmp_path / kind / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / kind))
    assert any("magnitude" in name for name in saved)
    assert all(torch.equal(weight, loaded[name]) for name, weight in saved.items())


def merge(*words: object) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts/merge_lora.py"), *map(str, words)]
    return subprocess.run(script, capture_output=True, text=True, timeout=120)


def test_merged_adapters_give_the_logits_of_the_adapted_model(example, whole, tmp_path):
    folder, merged = whole("zero3"), tmp_path / "merged"
    merged_run = merge(folder, merged)
    assert merged_run.returncode == 0 and f"merged: {merged}" in merged_run.stdout, merged_run.stderr
    ids = torch.arange(5, 25)[None]
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, merged))
    assert not [name for name, _ in other.named_parameters() if "lora" in name]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert (
        model(ids).logits - AutoModelForCausalLM.from_pretrained(example.model)(ids).logits
    ).abs().max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(example.model).chat_template
    stops = GenerationConfig.from_pretrained(merged).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])
    again = merge(folder, merged)
    assert again.returncode == EXIT_USER_ERROR and "exists already; name a new folder" in again.stderr
    wrong = merge(example.model, tmp_path / "other")
    assert wrong.returncode == EXIT_USER_ERROR and "holds no adapters (adapter_config.json)" in wrong.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_target_modules": "nowhere"}, "--lora_target_modules nowhere: Target modules"),
        ({"lora_r": 0}, "--lora_r 0: must be greater than 0"),
        ({"lora_alpha": -1}, "--lora_alpha -1: must be greater than 0"),
        ({"lora_dropout": 1.5}, "--lora_dropout 1.5: must be less than 1"),
        ({"lora_r": None, "lora_alpha": 8}, "--lora_alpha has no effect without --lora_r"),
        ({"lora_r": None, "load_in_4bit": True}, "4-bit weights cannot be trained; add adapters with"),
        ({"load_in_4bit": True}, "--load_in_4bit True needs a CUDA GPU"),
    ],
)  # fmt: skip
def test_unsupported_combinations_are_one_error(train, tmp_path, flags, message):
    (code,), printed = train(tmp_path / "out", "single", **flags)
    assert code == EXIT_USER_ERROR and message in printed and "Traceback" not in printed, printed
