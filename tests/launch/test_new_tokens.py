"""Tokens added to the vocabulary: with adapters, the embeddings are trained, saved, resumed and merged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.errors import EXIT_USER_ERROR
from scripts import merge_lora
from tests.combinations import proves
from tests.launch.test_lora import flags_of, ranks_of
from tests.launching import train_records

peft = pytest.importorskip("peft")
TOKENS = ["<|im_start|>", "<|im_end|>"]
EMBEDDING, HEAD = (f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head"))


@pytest.fixture(scope="module")
def bases(example) -> dict[str, Path]:
    """Models without the tokens of ChatML. `padded` has an untied head and 16 unused embeddings."""
    tied = example.folder / "without-chatml"
    shutil.copytree(example.model, tied)
    (tied / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tied / name).read_text()
        text = text.replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
        (tied / name).write_text(
            text.replace("<|im_start|>", "<|unused1|>").replace("<|im_end|>", "<|unused2|>")
        )
    padded = example.folder / "padded"
    model = AutoModelForCausalLM.from_pretrained(tied, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.resize_token_embeddings(model.config.vocab_size + 16)
    model.save_pretrained(padded)
    AutoTokenizer.from_pretrained(tied).save_pretrained(padded)
    return {"tied": tied, "padded": padded}


@pytest.fixture(scope="module")
def train(example, forks, bases):
    """Train adapters for tokens that a base lacks, under single, ddp, zero3 or fsdp."""

    def run(output: Path, base: str, kind: str, env: dict[str, str] | None = None, **flags):
        ranks = ranks_of(kind)
        settings = {
            "model_name_or_path": bases[base], "per_device_train_batch_size": 32 // ranks, "use_cpu": True,
            "eval_data_files": None, "resume_from_checkpoint": "auto", "verify_save": "all",
        }  # fmt: skip
        words = example.words(output, **settings | flags_of(kind) | flags)
        return forks.run(words, ranks, **(env or {}))

    return run


@pytest.fixture(scope="module")
def whole(example, train):
    """Output folders of uninterrupted runs, and what they printed."""
    runs: dict[tuple[str, str], tuple[Path, str]] = {}

    def make(base: str, kind: str) -> tuple[Path, str]:
        if (base, kind) not in runs:
            output = example.folder / f"new-tokens-{base}-{kind}"
            codes, printed = train(output, base, kind)
            assert not any(codes), printed
            runs[base, kind] = output, printed
        return runs[base, kind]

    return make


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        pytest.param("tied", "zero3", marks=proves(flags_of("zero3"), 2)),
        pytest.param("padded", "zero3", marks=proves(flags_of("zero3"), 2)),
        pytest.param("tied", "fsdp", marks=proves(flags_of("fsdp"), 2)),
        pytest.param("padded", "ddp", marks=[proves(flags_of("ddp"), 2), pytest.mark.slow]),
    ],
)
def test_a_step_does_not_depend_on_the_sharding(bases, whole, base, kind):
    (single, printed), (other, others) = whole(base, "single"), whole(base, kind)
    assert "computed from whole logits" not in printed + others
    for record, expected in zip(train_records(other), train_records(single), strict=True):
        for name in ("loss", "nll", "grad_norm", "acc"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (other, single))
    assert weights.keys() == expected.keys() and len(weights) == 2 * 7 * 2 + 2
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(weights[EMBEDDING], weights[HEAD]) == (base == "tied")
    before = load_file(bases[base] / "model.safetensors")["model.embed_tokens.weight"]
    count = weights[EMBEDDING].numel() * (1 if base == "tied" else 2) / 1e6
    assert f"trained as a whole and saved with the adapters: {count:.2f} M weights" in printed
    assert len(weights[EMBEDDING]) == len(before) + (2 if base == "tied" else 0)
    ids = AutoTokenizer.from_pretrained(single).convert_tokens_to_ids(TOKENS)
    assert ids == [len(before), len(before) + 1] if base == "tied" else max(ids) < len(before)
    mean = before[: min(ids)].mean(0)
    assert all((weights[EMBEDDING][row] - mean).abs().max() > 1e-3 for row in ids)


@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
def test_half_precision_trains_and_saves_the_embeddings(train, whole, tmp_path, kind):
    """peft makes adapters in float32, and ZeRO-3 trains weights of one dtype only."""
    flags = {"bf16": True, "torch_dtype": "bfloat16", "save_strategy": "no"}
    codes, printed = train(tmp_path / "out", "tied", kind, **flags)
    assert not any(codes), printed
    records = zip(train_records(tmp_path / "out"), train_records(whole("tied", "single")[0]), strict=True)
    for record, expected in records:
        assert record["nll"] == pytest.approx(expected["nll"], rel=0.05)


@pytest.mark.parametrize(("base", "kind"), [("tied", "zero3"), ("padded", "single")])
def test_adapters_load_and_merge_with_the_embeddings_of_the_run(whole, tmp_path, base, kind):
    folder, printed = whole(base, kind)
    assert "(AutoPeftModelForCausalLM.from_pretrained loads them with their base model" in printed
    assert "`AutoPeftModelForCausalLM.from_pretrained` loads them" in (folder / "README.md").read_text()
    merge_lora.merge(folder, tmp_path / "merged", None, "auto", trust_remote_code=False)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[*AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(TOKENS), 5, 6, 7]])
    torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)
    saved = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(merged.model.embed_tokens.weight, saved[EMBEDDING])
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (base == "tied")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKENS)
        == ids[0, :2].tolist()
    )


@pytest.mark.parametrize("kind", ["single", "zero3"])
def test_a_killed_run_resumes_to_the_result_of_the_uninterrupted_run(example, train, whole, kind):
    output = example.folder / f"new-tokens-killed-{kind}"
    codes, printed = train(output, "tied", kind, env={"DIE_AT": "step 5"})
    assert any(codes) and (output / "checkpoint-4").is_dir(), printed
    codes, printed = train(output, "tied", kind)
    assert not any(codes) and "train step 4" not in printed, printed
    weights, expected = (
        load_file(path / "adapter_model.safetensors") for path in (output, whole("tied", kind)[0])
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("base", "tokens"), [("tied", ["<a>"]), ("padded", ["<a>"]), ("padded", ["<b>", "<a>"])]
)
def test_a_run_does_not_resume_with_other_tokens(whole, train, tmp_path, base, tokens):
    shutil.copytree(whole(base, "single")[0], tmp_path / "out")
    (code,), printed = train(tmp_path / "out", base, "single", max_steps=9, add_tokens=tokens)
    added = [*tokens, *TOKENS]
    assert code == EXIT_USER_ERROR and "Traceback" not in printed, printed
    assert (
        f"saved with added tokens {' '.join(TOKENS)}, and this run has added tokens {' '.join(added)}: the "
        "embeddings of the checkpoint are those of its tokens" in printed
    ), printed


@pytest.mark.parametrize("lora_r", [None, 4])
def test_named_tokens_that_the_data_writes_are_trained_and_saved(example, bases, train, tmp_path, lora_r):
    """The row of a token in the input embedding changes only if the token is in the data."""
    rows = [json.loads(line) for line in example.train.read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = f"<think>hm</think>{message['content']}"
    data = tmp_path / "think.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["<think>", "</think>", "<never>"]
    flags = {"add_tokens": names, "data_files": data, "max_steps": 3, "save_strategy": "no"}
    output = tmp_path / "out"
    (code,), printed = train(output, "padded", "single", lora_r=lora_r, **flags)
    assert code == 0 and "added to the vocabulary: <think> </think> <never>" in printed, printed
    assert "answers contain special tokens as text" not in printed
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer.convert_tokens_to_ids(names)
    before = load_file(bases["padded"] / "model.safetensors")["model.embed_tokens.weight"]
    name, file = ("model.embed_tokens.weight", "model") if lora_r is None else (EMBEDDING, "adapter_model")
    after = load_file(output / f"{file}.safetensors")[name]
    assert after.shape == before.shape and ids == list(range(len(tokenizer) - 5, len(tokenizer) - 2))
    mean = before[: ids[0]].double().mean(0).float()
    first, second, never = ((after[row] - mean).abs().max().item() for row in ids)
    assert min(first, second) > 1e-3 and never == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"add_tokens": [""]}, "--add_tokens '': a token needs characters other than spaces; remove it"),
        ({"add_tokens": ["<a>", "<a>"]}, "--add_tokens <a>: this token is named twice; remove one of them"),
        ({"add_tokens": ["<|endoftext|>"]}, "--add_tokens <|endoftext|>: the vocabulary has this token "
         "already, with the id 0; remove it from the flag"),
        ({"add_tokens": ["<a>"], "lora_target_modules": ["q_proj", "lm_head"]},
         "--lora_target_modules lm_head: <a> <|im_start|> <|im_end|> had to be added to the vocabulary, so "
         "the input and output embedding are trained as a whole and get no adapter; leave it out"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_added_are_one_error(train, tmp_path, flags, message):
    (code,), printed = train(tmp_path / "out", "padded", "single", **flags)
    assert code == EXIT_USER_ERROR and message in printed and "Traceback" not in printed, printed


@pytest.mark.parametrize("base", ["tied", "padded"])
def test_the_plan_names_the_embeddings_that_are_trained(bases, whole, train, tmp_path, base):
    (code,), printed = train(tmp_path / "out", base, "single", plan=True, resume_from_checkpoint=None)
    assert code == 0, printed
    saved = load_file(whole(base, "single")[0] / "adapter_model.safetensors")
    count = sum(weight.numel() for name, weight in saved.items() if base == "padded" or name != HEAD)
    assert f"M parameters, {count / 1e6:.1f} M trainable" in printed, printed
    (note,) = re.findall("--lora_r: .* trained as a whole and saved.*", printed)
    assert note in whole(base, "single")[1]
