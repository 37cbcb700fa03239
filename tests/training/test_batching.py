"""Packed rows and padding-free batches train like padded ones, for models that keep sequences apart."""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    modeling_flash_attention_utils,
)

from dft import DFTTrainer
from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.data.batches.dataset import SCHEMA, Sequences
from dft.errors import UserError
from dft.training.batching import (
    check_isolation,
    choose_collator,
    describe_batching,
    exact_row_length,
    is_packed,
    longest_row,
    sequence_lengths,
    token_count,
)

VOCAB = 40
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mistral, window of 4": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gemma3, window of 4": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **GEMMA)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)),
}


class Leaking(Qwen3ForCausalLM):
    """Drops the positions, which merges all sequences of a row."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


def build_model(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.use_cache = False  # as Trainer sets it
    model.config._attn_implementation = attention
    return model


def conversations(count: int) -> list[dict[str, list[int]]]:
    """Return conversations of 3 to 12 tokens whose last tokens are supervised."""
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        ids = generator.integers(1, VOCAB, generator.integers(3, 13)).tolist()
        prompt = int(generator.integers(1, len(ids)))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def pack(rows, counts) -> list[dict[str, list[int]]]:
    """Pack consecutive conversations into rows of `counts` conversations each."""
    packed, remaining = [], list(rows)
    for count in counts:
        members, remaining = remaining[:count], remaining[count:]
        packed.append(
            {
                "input_ids": [token for member in members for token in member["input_ids"]],
                "labels": [label for member in members for label in member["labels"]],
                "seq_lengths": [len(member["input_ids"]) for member in members],
            }
        )
    assert not remaining
    return packed


def trainer(tmp_path, model, rows, *, evaluation=None, collator=None, **flags) -> DFTTrainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", disable_tqdm=True, train_sampling_strategy="sequential", **flags,
    )  # fmt: skip
    return DFTTrainer(
        model, arguments, alpha=0.6, train_dataset=Dataset.from_list(rows), data_collator=collator,
        eval_dataset=Dataset.from_list(evaluation) if evaluation else None,
    )  # fmt: skip


def loss_and_gradients(tmp_path, model, rows):
    """Return (loss, gradients, batching) of DFTTrainer for one batch of all rows."""
    run = trainer(tmp_path, model, rows, per_device_train_batch_size=len(rows))
    batch = next(iter(run.get_train_dataloader()))
    count = sum(label != -100 for row in rows for label in row["labels"])
    model.train()
    loss = run.compute_loss(model, batch, num_items_in_batch=torch.tensor(count))
    loss.backward()
    assert token_count(batch) == sum(len(row["input_ids"]) for row in rows)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), gradients, describe_batching(run.data_collator)


def assert_equal_training(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (actual[1][name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.fixture
def flash(monkeypatch) -> list[dict[str, object]]:
    """Replace flash attention by plain torch behind transformers' own interface; return the calls made."""
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        """q, k, v: (tokens, heads, size)."""
        calls.append({"bounds": cu_seqlens_q.tolist(), "longest": max_seqlen_q, "dtype": cu_seqlens_q.dtype})
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        outputs = []
        for start, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * softmax_scale
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            hidden = (back < 0) | ((window_size[0] >= 0) & (back > window_size[0]))
            shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", shares, v[start:end]))
        return torch.cat(outputs)

    def plain(q, k, v, **options):
        """The same for batches without bounds: q, k, v (batch, seq, heads, size), one sequence per row."""
        rows = []
        for row in zip(q, k, v, strict=True):
            length = len(row[0])
            bounds = torch.tensor([0, length], dtype=torch.int32)
            rows.append(varlen(*row, bounds, bounds, length, length, **options))
        return torch.stack(rows)

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    functions = ((plain, varlen, None, None, None), (process, dict))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: functions)
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_loss_and_gradients_of_padded_conversations(tmp_path, name, attention):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, build_model(name, attention), rows)
    packed = loss_and_gradients(tmp_path, build_model(name, attention), pack(rows, [3, 1, 2, 2]))
    assert (expected[2], packed[2]) == ("padded on the right", "packed rows")
    assert_equal_training(packed, expected)


@pytest.mark.parametrize("counts", [None, [3, 1, 2, 2]], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_free_batches_have_the_loss_and_gradients_of_padded_ones(tmp_path, flash, name, counts):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, build_model(name), rows)
    assert not flash
    examples = pack(rows, counts) if counts else rows
    flat = loss_and_gradients(tmp_path, build_model(name, "flash_attention_2"), examples)
    assert (expected[2], flat[2]) == ("padded on the right", "padding-free")
    assert_equal_training(flat, expected)
    lengths = [len(row["input_ids"]) for row in rows]
    call = {"bounds": np.cumsum([0, *lengths]).tolist(), "longest": max(lengths), "dtype": torch.int32}
    assert flash[-2:] == [call] * 2  # one per layer; the calls before are those of the check


def test_packed_conversations_stay_apart_under_gradient_checkpointing(tmp_path):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, build_model("qwen3"), rows)
    model = build_model("qwen3")
    model.gradient_checkpointing_enable()
    assert_equal_training(loss_and_gradients(tmp_path, model, pack(rows, [3, 1, 2, 2])), expected)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3, window of 4", "qwen3 moe"])
def test_packed_training_takes_the_same_steps_as_padded_training(tmp_path, flash, name, attention):
    """Three steps of eight conversations, in four packed rows each; the last evaluation batch is padded."""
    rows, evaluation = conversations(24), conversations(9)
    plain = trainer(
        tmp_path,
        build_model(name),
        rows,
        evaluation=evaluation,
        per_device_train_batch_size=8,
        num_train_epochs=1,
    )
    packed = trainer(
        tmp_path, build_model(name, attention), pack(rows, [3, 1, 2, 2] * 3),
        evaluation=pack(evaluation, [4, 4, 1]), per_device_train_batch_size=2,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, num_train_epochs=1,
    )  # fmt: skip
    plain.train()
    packed.train()
    records = zip(packed.state.log_history[:3], plain.state.log_history[:3], strict=True)
    for actual, expected in records:
        for metric in ("loss", "nll", "avg_p_correct", "acc", "objective", "grad_norm"):
            assert actual[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    actual, expected = packed.evaluate(), plain.evaluate()
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_acc", "eval_objective"):
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-4), metric


def test_packed_evaluation_equals_padded_evaluation(tmp_path):
    rows = conversations(9)
    plain = trainer(tmp_path, build_model("qwen3"), rows, evaluation=rows).evaluate()
    packed = trainer(
        tmp_path, build_model("qwen3"), rows, evaluation=pack(rows, [4, 4, 1]), per_device_eval_batch_size=2
    ).evaluate()
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_acc", "eval_objective"):
        assert packed[metric] == pytest.approx(plain[metric], rel=1e-5), metric


@pytest.mark.parametrize(
    ("attention", "packed", "expected"),
    [
        ("sdpa", False, PaddedCollator(7)),
        ("eager", True, PackedCollator(7)),
        ("flex_attention", True, PackedCollator(7)),
        ("flash_attention_2", False, FlatCollator()),
        ("varlen", False, FlatCollator()),
        ("varlen", True, FlatCollator()),
        ("flash_attention_3", True, FlatCollator()),
        ("kernels-community/vllm-flash-attn3", True, FlatCollator()),
    ],
)
def test_choose_collator_follows_attention_and_packing(attention, packed, expected):
    assert choose_collator(build_model("qwen3", attention), 7, packed) == expected


def mamba2():
    return Mamba2ForCausalLM(
        Mamba2Config(vocab_size=VOCAB, hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=1)
    )


class Stateful(Qwen3ForCausalLM):
    _is_stateful = True


def stateful():
    return Stateful(Qwen3Config(**SHAPE))


def lfm2():
    return Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))


def chunked_flash():
    model = build_model("qwen3", "flash_attention_2")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    return model


def llama4(attention_chunk_size: int = 4, floor_scale: int = 8192):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{**SHAPE, "pad_token_id": None}, intermediate_size_mlp=32, num_local_experts=2,
        num_experts_per_tok=1, no_rope_layer_interval=2, attention_chunk_size=attention_chunk_size,
        floor_scale=floor_scale,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    assert config.layer_types == ["chunked_attention", "full_attention"]
    return Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mamba2, r"Mamba2ForCausalLM cannot .* not plain attention \(linear_attention\)"),
        (stateful, "Stateful cannot .* carries a state from token to token"),
        (lfm2, r"Lfm2ForCausalLM cannot .* not plain attention \(conv\)"),
        (bloom, "BloomForCausalLM cannot .* takes no position_ids"),
        (chunked_flash, "flash attention has no chunked attention"),
        (llama4, "Llama4ForCausalLM cannot .* the position in the row .* rows of up to 8191 tokens"),
    ],
)
def test_models_that_mix_sequences_get_padded_rows_and_reject_packed_ones(build, reason):
    model = build()
    assert choose_collator(model, 7, packed=False) == PaddedCollator(7)
    with pytest.raises(UserError, match=f"{reason}.*--packing False"):
        choose_collator(model, 7, packed=True)


def test_trainer_rejects_packed_data_for_a_model_that_mixes_sequences(tmp_path):
    with pytest.raises(UserError, match="BloomForCausalLM .* --packing False"):
        trainer(tmp_path, bloom(), pack(conversations(2), [2]))


def test_use_cache_is_rejected_with_packed_data(tmp_path):
    with pytest.raises(ValueError, match="--use_cache True"):
        trainer(tmp_path, build_model("qwen3"), pack(conversations(2), [2]), use_cache=True)


def test_custom_collator_is_used_as_it_is(tmp_path, flash):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = conversations(8)
    run = trainer(tmp_path, build_model("qwen3", "flash_attention_2"), rows, collator=collator, max_steps=1)
    assert run.data_collator is collator and describe_batching(run.data_collator) == "by the given collator"
    expected = trainer(tmp_path, build_model("qwen3"), rows, max_steps=1)
    run.train()
    expected.train()
    assert run.state.log_history[0]["nll"] == pytest.approx(expected.state.log_history[0]["nll"], rel=1e-5)


def prepared(tmp_path, offsets=None) -> Sequences:
    """Return a dataset of three sequences with 3, 2 and 1 tokens, packed at `offsets`."""
    columns = {
        "input_ids": [[1, 2], [3, 4, 5], [6]], "labels": [[-100, 2], [-100, 4, 5], [-100]],
        "source": [0, 0, 0], "line": [1, 2, 3], "part": [0, 0, 0], "reason": ["", "", ""],
    }  # fmt: skip
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
    return Sequences(tmp_path / "data.arrow", np.array([1, 0, 2]), offsets)


def test_is_packed_recognizes_packed_datasets(tmp_path):
    rows = conversations(2)
    packed = pack(rows, [2])
    plain, several = prepared(tmp_path), prepared(tmp_path, np.array([0, 2, 3]))
    assert is_packed(several) and is_packed(None, {"a": rows, "b": several}) and is_packed(packed)
    assert is_packed(Dataset.from_list(packed))
    assert is_packed(Dataset.from_list(packed).to_iterable_dataset())
    assert not is_packed(None, {"a": plain}, rows, [], Dataset.from_list(rows))


def test_sequence_lengths_of_prepared_rows(tmp_path):
    assert sequence_lengths(prepared(tmp_path)).tolist() == [3, 2, 1]
    assert sequence_lengths(prepared(tmp_path, np.array([0, 2, 3]))).tolist() == [5, 1]


def test_packed_rows_train_with_workers_and_group_by_length(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", max_steps=1,
        disable_tqdm=True, train_sampling_strategy="group_by_length", dataloader_num_workers=1,
    )  # fmt: skip
    run = DFTTrainer(build_model("qwen3"), arguments, train_dataset=prepared(tmp_path, np.array([0, 2, 3])))
    plain = DFTTrainer(build_model("qwen3"), arguments, train_dataset=prepared(tmp_path))
    run.train()
    plain.train()
    assert describe_batching(run.data_collator) == "packed rows"
    assert run.state.log_history[0]["nll"] == pytest.approx(plain.state.log_history[0]["nll"], rel=1e-5)


def leaking(attention: str = "sdpa"):
    torch.manual_seed(0)
    model = Leaking(Qwen3Config(**SHAPE))
    model.config._attn_implementation = attention
    return model


def test_training_rejects_a_model_that_leaks_between_packed_conversations(tmp_path):
    run = trainer(tmp_path, leaking(), pack(conversations(4), [2, 2]), max_steps=1)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match="Leaking with sdpa attention does not keep .* --packing False"):
        run.train()
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_a_leaking_model_may_train_on_padded_conversations(tmp_path):
    run = trainer(tmp_path, leaking(), conversations(4), max_steps=1)
    run.train()
    assert run.state.log_history[0]["nll"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_isolation_check_passes_sound_models_in_every_dtype_and_finds_a_leak(name, dtype):
    model = build_model(name).to(dtype).eval()
    check_isolation(model, model, PackedCollator(0), CPU, dtype)

    def without_positions(position_ids=None, **inputs):
        return model(**inputs)

    with pytest.raises(UserError, match="does not keep packed conversations separate"):
        check_isolation(without_positions, model, PackedCollator(0), CPU, dtype)


def test_isolation_check_finds_flash_attention_that_ignores_bounds(flash):
    model = build_model("qwen3", "flash_attention_2").eval()
    check_isolation(model, model, FlatCollator(), CPU, torch.float32)

    def without_bounds(input_ids, **others):
        inputs, total = {"input_ids": input_ids}, input_ids.shape[1]
        bounds = torch.tensor([0, total], dtype=torch.int32)
        return model(
            **inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=total, max_length_k=total
        )

    with pytest.raises(UserError, match="use --attn_implementation sdpa"):
        check_isolation(without_bounds, model, FlatCollator(), CPU, torch.float32)


def test_isolation_check_keeps_random_states_and_model_mode(tmp_path):
    run = trainer(tmp_path, build_model("qwen3"), pack(conversations(4), [2, 2]))
    run.model.train()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    run._run.loss.inspect_model(run.model, run.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
    assert run.model.training and all(parameter.grad is None for parameter in run.model.parameters())


LIMIT = 11
"""Tokens of the longest row in which `llama4(floor_scale=LIMIT + 1)` may be packed."""


def test_llama4_is_packed_only_in_rows_without_scaled_queries(tmp_path):
    packed = pack(conversations(8), [1] * 6 + [2])
    model = llama4(floor_scale=LIMIT + 1)
    assert exact_row_length(model.config) == LIMIT < longest_row(Dataset.from_list(packed))
    with pytest.raises(UserError, match=f"rows of up to {LIMIT} tokens, and the longest row has {LIMIT + 1}"):
        choose_collator(model, 0, packed=True, longest_row=LIMIT + 1)
    assert choose_collator(model, 0, True, LIMIT) == PackedCollator(0)
    assert choose_collator(model, 0, False, LIMIT + 1) == PaddedCollator(0)
    with pytest.raises(UserError, match="Llama4ForCausalLM cannot train on packed conversations"):
        trainer(tmp_path, model, packed)
    short = [row for row in packed if len(row["input_ids"]) <= LIMIT]
    assert trainer(tmp_path, model, short).data_collator == PackedCollator(0)


def test_scaled_queries_of_llama4_would_change_the_loss_of_longer_packed_rows(tmp_path):
    rows = conversations(8)
    model = llama4(floor_scale=LIMIT + 1)
    expected = loss_and_gradients(tmp_path, llama4(floor_scale=13), rows)[0]  # conversations of up to 12
    run = trainer(tmp_path, model, pack(rows, [8]), collator=PackedCollator(0), per_device_train_batch_size=1)
    batch = next(iter(run.get_train_dataloader()))
    count = torch.tensor(sum(label != -100 for row in rows for label in row["labels"]))
    loss = run.compute_loss(model.train(), batch, num_items_in_batch=count).item()
    assert abs(loss - expected) > 1e-5 * expected


def test_chunks_of_attention_restart_with_each_packed_conversation(tmp_path):
    """transformers maps packed positions back to those of the conversation before it forms chunks."""
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, llama4(attention_chunk_size=4), rows)
    packed = pack(rows, [3, 1, 2, 2])
    assert max(len(row["input_ids"]) for row in packed) > 16  # beyond the first chunks
    assert_equal_training(loss_and_gradients(tmp_path, llama4(attention_chunk_size=4), packed), expected)
    whole = loss_and_gradients(tmp_path, llama4(attention_chunk_size=64), rows)
    assert abs(whole[0] - expected[0]) > 1e-4  # the chunks matter


def test_longest_row_of_datasets(tmp_path):
    packed = Dataset.from_list(pack(conversations(3), [3]))
    total = sum(len(row["input_ids"]) for row in conversations(3))
    assert longest_row(None, {"a": packed, "b": prepared(tmp_path)}) == total
    assert longest_row(prepared(tmp_path, np.array([0, 2, 3]))) == 5
    assert longest_row(packed, conversations(3)) is None  # would require reading the stream
