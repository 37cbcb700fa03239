"""Packed rows and padding-free batches train as padded ones do, and only where a model allows it."""

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
from dft.training.batching import check_isolation, choose_collator, is_packed, sequence_lengths, token_count

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
    """Loses the positions on the way, so all sequences of a row are one to it."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


def make(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.use_cache = False  # as Trainer sets it
    model.config._attn_implementation = attention
    return model


def conversations(count: int) -> list[dict[str, list[int]]]:
    """Of 3 to 12 tokens with a supervised tail."""
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        ids = generator.integers(1, VOCAB, generator.integers(3, 13)).tolist()
        prompt = int(generator.integers(1, len(ids)))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def joined(rows, counts) -> list[dict[str, list[int]]]:
    """Rows of as many conversations as `counts` says."""
    packed, rest = [], list(rows)
    for count in counts:
        members, rest = rest[:count], rest[count:]
        packed.append(
            {
                "input_ids": [token for one in members for token in one["input_ids"]],
                "labels": [label for one in members for label in one["labels"]],
                "seq_lengths": [len(one["input_ids"]) for one in members],
            }
        )
    assert not rest
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
    """Of one batch with all rows, as DFTTrainer makes and scores it."""
    run = trainer(tmp_path, model, rows, per_device_train_batch_size=len(rows))
    batch = next(iter(run.get_train_dataloader()))
    count = sum(label != -100 for row in rows for label in row["labels"])
    model.train()
    loss = run.compute_loss(model, batch, num_items_in_batch=torch.tensor(count))
    loss.backward()
    assert token_count(batch) == sum(len(row["input_ids"]) for row in rows)
    return loss.item(), {name: one.grad for name, one in model.named_parameters()}, run.batching


def assert_same(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (got[1][name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.fixture
def flash(monkeypatch) -> list[dict[str, object]]:
    """flash_attn_varlen_func in plain torch behind transformers' own way to it. Holds what each call got."""
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        """q, k, v: (tokens, heads, size)."""
        calls.append({"bounds": cu_seqlens_q.tolist(), "longest": max_seqlen_q, "dtype": cu_seqlens_q.dtype})
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
        outputs = []
        for start, end in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * softmax_scale
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            hidden = (back < 0) | ((window_size[0] >= 0) & (back > window_size[0]))
            shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", shares, v[start:end]))
        return torch.cat(outputs)

    def plain(q, k, v, **options):
        """The same for (batch, seq, heads, size), each row a sequence: for batches without bounds."""
        rows = []
        for one in zip(q, k, v, strict=True):
            bounds = torch.tensor([0, len(one[0])], dtype=torch.int32)
            rows.append(varlen(*one, bounds, bounds, len(one[0]), len(one[0]), **options))
        return torch.stack(rows)

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    found = ((plain, varlen, None, None, None), (process, dict))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: found)
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_loss_and_gradients_of_padded_conversations(tmp_path, name, attention):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, make(name, attention), rows)
    packed = loss_and_gradients(tmp_path, make(name, attention), joined(rows, [3, 1, 2, 2]))
    assert (expected[2], packed[2]) == ("padded on the right", "packed rows")
    assert_same(packed, expected)


@pytest.mark.parametrize("counts", [None, [3, 1, 2, 2]], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_free_batches_have_the_loss_and_gradients_of_padded_ones(tmp_path, flash, name, counts):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, make(name), rows)
    assert not flash
    given = joined(rows, counts) if counts else rows
    flat = loss_and_gradients(tmp_path, make(name, "flash_attention_2"), given)
    assert (expected[2], flat[2]) == ("padded on the right", "padding-free")
    assert_same(flat, expected)
    lengths = [len(row["input_ids"]) for row in rows]
    call = {"bounds": np.cumsum([0, *lengths]).tolist(), "longest": max(lengths), "dtype": torch.int32}
    assert flash[-2:] == [call] * 2  # one for each layer; before, the model was looked at


def test_gradient_checkpointing_keeps_packed_conversations_apart(tmp_path):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, make("qwen3"), rows)
    model = make("qwen3")
    model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(tmp_path, model, joined(rows, [3, 1, 2, 2])), expected)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3, window of 4", "qwen3 moe"])
def test_training_on_packed_rows_takes_the_steps_of_training_on_conversations(
    tmp_path, flash, name, attention
):
    """Three steps of eight conversations, in four packed rows each; the last evaluation batch has a blank."""
    rows, evaluation = conversations(24), conversations(9)
    plain = trainer(
        tmp_path, make(name), rows, evaluation=evaluation, per_device_train_batch_size=8, num_train_epochs=1
    )
    packed = trainer(
        tmp_path, make(name, attention), joined(rows, [3, 1, 2, 2] * 3),
        evaluation=joined(evaluation, [4, 4, 1]), per_device_train_batch_size=2,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, num_train_epochs=1,
    )  # fmt: skip
    plain.train()
    packed.train()
    records = zip(packed.state.log_history[:3], plain.state.log_history[:3], strict=True)
    for got, expected in records:
        for metric in ("loss", "nll", "avg_p_correct", "acc", "objective", "grad_norm"):
            assert got[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    got, expected = packed.evaluate(), plain.evaluate()
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_acc", "eval_objective"):
        assert got[metric] == pytest.approx(expected[metric], rel=1e-4), metric


def test_an_evaluation_of_packed_rows_equals_that_of_conversations(tmp_path):
    rows = conversations(9)
    plain = trainer(tmp_path, make("qwen3"), rows, evaluation=rows).evaluate()
    packed = trainer(
        tmp_path, make("qwen3"), rows, evaluation=joined(rows, [4, 4, 1]), per_device_eval_batch_size=2
    ).evaluate()
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_acc", "eval_objective"):
        assert packed[metric] == pytest.approx(plain[metric], rel=1e-5), metric


# ---- which collator ----


@pytest.mark.parametrize(
    ("attention", "packed", "expected"),
    [
        ("sdpa", False, PaddedCollator(7)),
        ("eager", True, PackedCollator(7)),
        ("flex_attention", True, PackedCollator(7)),
        ("flash_attention_2", False, FlatCollator()),
        ("flash_attention_3", True, FlatCollator()),
        ("kernels-community/vllm-flash-attn3", True, FlatCollator()),
    ],
)
def test_the_collator_follows_attention_and_data(attention, packed, expected):
    assert choose_collator(make("qwen3", attention), 7, packed) == expected


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
    model = make("qwen3", "flash_attention_2")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (mamba2, r"Mamba2ForCausalLM cannot .* not plain attention \(linear_attention\)"),
        (stateful, "Stateful cannot .* carries a state from token to token"),
        (lfm2, r"Lfm2ForCausalLM cannot .* not plain attention \(conv\)"),
        (bloom, "BloomForCausalLM cannot .* takes no position_ids"),
        (chunked_flash, "flash attention has no chunked attention"),
    ],
)
def test_models_that_see_across_boundaries_are_padded_and_packed_data_is_refused(build, reason):
    model = build()
    assert choose_collator(model, 7, packed=False) == PaddedCollator(7)
    with pytest.raises(UserError, match=f"{reason}.*--packing False"):
        choose_collator(model, 7, packed=True)


def test_the_trainer_refuses_packed_data_for_such_a_model(tmp_path):
    with pytest.raises(UserError, match="BloomForCausalLM .* --packing False"):
        trainer(tmp_path, bloom(), joined(conversations(2), [2]))


def test_a_cache_which_would_join_packed_conversations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--use_cache True"):
        trainer(tmp_path, make("qwen3"), joined(conversations(2), [2]), use_cache=True)


def test_a_given_collator_is_left_alone(tmp_path, flash):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = conversations(8)
    run = trainer(tmp_path, make("qwen3", "flash_attention_2"), rows, collator=collator, max_steps=1)
    assert run.data_collator is collator and run.batching == "by the given collator"
    expected = trainer(tmp_path, make("qwen3"), rows, max_steps=1)
    run.train()
    expected.train()
    assert run.state.log_history[0]["nll"] == pytest.approx(expected.state.log_history[0]["nll"], rel=1e-5)


def prepared(tmp_path, offsets=None) -> Sequences:
    """Three sequences of 2, 3 and 1 tokens, in the order of their lengths backwards."""
    columns = {
        "input_ids": [[1, 2], [3, 4, 5], [6]], "labels": [[-100, 2], [-100, 4, 5], [-100]],
        "source": [0, 0, 0], "line": [1, 2, 3],
    }  # fmt: skip
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
    return Sequences(tmp_path / "data.arrow", np.array([1, 0, 2]), offsets)


def test_packed_data_is_recognized(tmp_path):
    rows = conversations(2)
    packed = joined(rows, [2])
    plain, several = prepared(tmp_path), prepared(tmp_path, np.array([0, 2, 3]))
    assert is_packed(several) and is_packed(None, {"a": rows, "b": several}) and is_packed(packed)
    assert is_packed(Dataset.from_list(packed))
    assert is_packed(Dataset.from_list(packed).to_iterable_dataset())
    assert not is_packed(None, {"a": plain}, rows, [], Dataset.from_list(rows))


def test_lengths_of_prepared_rows_are_those_of_their_tokens(tmp_path):
    assert sequence_lengths(prepared(tmp_path)).tolist() == [3, 2, 1]
    assert sequence_lengths(prepared(tmp_path, np.array([0, 2, 3]))).tolist() == [5, 1]


def test_prepared_rows_train_with_workers_and_grouped_by_length(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", max_steps=1,
        disable_tqdm=True, train_sampling_strategy="group_by_length", dataloader_num_workers=1,
    )  # fmt: skip
    run = DFTTrainer(make("qwen3"), arguments, train_dataset=prepared(tmp_path, np.array([0, 2, 3])))
    plain = DFTTrainer(make("qwen3"), arguments, train_dataset=prepared(tmp_path))
    run.train()
    plain.train()
    assert run.batching == "packed rows"
    assert run.state.log_history[0]["nll"] == pytest.approx(plain.state.log_history[0]["nll"], rel=1e-5)


# ---- the check before training ----


def leaking(attention: str = "sdpa"):
    torch.manual_seed(0)
    model = Leaking(Qwen3Config(**SHAPE))
    model.config._attn_implementation = attention
    return model


def test_training_is_refused_where_packed_conversations_see_each_other(tmp_path):
    run = trainer(tmp_path, leaking(), joined(conversations(4), [2, 2]), max_steps=1)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match="Leaking with sdpa attention does not keep .* --packing False"):
        run.train()
    assert all(torch.equal(one, before[name]) for name, one in run.model.state_dict().items())


def test_a_model_that_leaks_may_train_on_padded_conversations(tmp_path):
    run = trainer(tmp_path, leaking(), conversations(4), max_steps=1)
    run.train()
    assert run.state.log_history[0]["nll"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_sound_models_pass_the_check_in_every_precision_and_a_leak_does_not(name, dtype):
    model = make(name).to(dtype).eval()
    check_isolation(model, model, PackedCollator(0), CPU, dtype)

    def without_positions(position_ids, **inputs):
        return model(**inputs)

    with pytest.raises(UserError, match="does not keep packed conversations apart"):
        check_isolation(without_positions, model, PackedCollator(0), CPU, dtype)


def test_the_check_sees_flash_attention_that_ignores_the_bounds(flash):
    model = make("qwen3", "flash_attention_2").eval()
    check_isolation(model, model, FlatCollator(), CPU, torch.float32)

    def as_one(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, position_ids, **inputs):
        total = inputs["input_ids"].shape[1]
        bounds = torch.tensor([0, total], dtype=torch.int32)
        return model(
            **inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=total, max_length_k=total
        )

    with pytest.raises(UserError, match="use --attn_implementation sdpa"):
        check_isolation(as_one, model, FlatCollator(), CPU, torch.float32)


def test_the_check_leaves_random_numbers_and_the_mode_of_the_model_alone(tmp_path):
    run = trainer(tmp_path, make("qwen3"), joined(conversations(4), [2, 2]))
    run.model.train()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    run._inspect_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
    assert run.model.training and all(one.grad is None for one in run.model.parameters())
