"""DFTTrainer with the fused head: training matches that with full logits, and no logits are computed."""

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dft import DFTTrainer, dft_loss
from dft.data.batches.collator import PaddedCollator
from dft.errors import UserError
from dft.loss import linear, rows, tiles
from dft.loss.head import FusedHead
from dft.loss.linear import linear_dft_loss
from dft.loss.objectives import Dft
from dft.training.measuring.meter import TokenMeter
from dft.training.measuring.nonfinite import StepWatch, pass_on_nonfinite
from dft.training.measuring.scoring import origins_of_tokens
from tests.training.test_trainer import VOCAB, conversations, tiny


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Make a tile hold five rows, so that every batch has several tiles."""
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * 5)


def trainer(tmp_path, fused_head="on", model=None, **flags) -> DFTTrainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", disable_tqdm=True, seed=5, per_device_train_batch_size=4, max_steps=4,
        eval_strategy="steps", eval_steps=2, **flags,
    )  # fmt: skip
    train, evaluation = (Dataset.from_list(rows) for rows in (conversations(16), conversations(9, 2)))
    return DFTTrainer(
        model or tiny(),
        arguments,
        alpha=0.6,
        fused_head=fused_head,
        train_dataset=train,
        eval_dataset=evaluation,
    )


def history(run: DFTTrainer) -> list[dict[str, float]]:
    run.train()
    columns = ("loss", "nll", "avg_p_correct", "acc", "objective", "grad_norm")
    columns += tuple(f"eval_{name}" for name in columns[:-1])
    return [
        {name: record[name] for name in columns if name in record} for record in run.state.log_history[:-1]
    ]


WAYS = {
    "plain": ({}, 1e-5),
    "accumulated": ({"gradient_accumulation_steps": 3}, 1e-5),
    "checkpointed": ({"gradient_checkpointing": True}, 1e-5),
    "autocast": ({"bf16": True}, 3e-2),
}


@pytest.mark.parametrize("name", WAYS)
def test_training_and_evaluation_match_full_logits(tmp_path, name):
    flags, close = WAYS[name]
    expected = history(trainer(tmp_path, "off", **flags))
    actual = history(trainer(tmp_path, "on", **flags))
    assert len(actual) == len(expected) == 6 and any("eval_nll" in record for record in actual)
    for record, other in zip(actual, expected, strict=True):
        assert record == pytest.approx(other, rel=close, abs=0.1 if name == "autocast" else 1e-12)


def test_training_in_pure_bfloat16(tmp_path):
    wide = history(trainer(tmp_path, "on"))
    actual = history(trainer(tmp_path, "on", model=tiny().to(torch.bfloat16)))
    for record, other in zip(actual, wide, strict=True):
        (name,) = {"nll", "eval_nll"} & record.keys()
        assert record[name] == pytest.approx(other[name], rel=2e-2)


def test_logits_are_not_computed(tmp_path):
    run = trainer(tmp_path, eval_accumulation_steps=1)
    run.model.eval()
    run._run.loss.inspect_head(run.model)
    shapes = []
    run.model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    run.train()
    run.evaluate()
    # Each run begins with an inspection on 16 tokens.
    probed = [shape for shape in shapes if shape[-1] != 1]
    assert len(shapes) > 6 and len(probed) <= 4 and set(probed) == {(2, 8, VOCAB)}


def test_logits_are_returned_on_request(tmp_path):
    run = trainer(tmp_path)
    predicted = run.predict(run.eval_dataset)
    assert predicted.predictions.shape[-1] == VOCAB and predicted.metrics["test_nll"] > 0
    batch = run.data_collator(conversations(3))
    _, outputs = run.compute_loss(run.model, batch, return_outputs=True)
    assert outputs.logits.shape == (*batch["labels"].shape, VOCAB)


def test_saving_and_generation_still_work(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **options), run.model.generate(ids, **options))


def test_reason_for_an_unfused_head_is_printed_once_or_raised(tmp_path, capsys):
    def model():
        net = tiny()
        net.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, net.lm_head.weight)
        return net

    trainer(tmp_path, "auto", model=model()).train()
    reason = "the forward of its output embedding has been replaced"
    assert (
        capsys.readouterr().out.count(f"note        the loss is computed from whole logits: {reason}\n") == 1
    )
    with pytest.raises(UserError, match=f"--fused_head on: {reason}; use --fused_head auto"):
        trainer(tmp_path, "on", model=model()).train()
    trainer(tmp_path, "off").train()
    assert "whole logits" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="fused_head 'maybe': must be one of auto, on, off"):
        trainer(tmp_path, "maybe")


class NoSync(TorchDispatchMode):
    """Fails on operations that would synchronize with a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        assert name not in (
            "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::item",
            "aten::masked_select", "aten::unique",
        ), name  # fmt: skip
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_does_not_synchronize_with_the_device(tmp_path, monkeypatch):
    """Operations that are used only on CPUs are replaced."""
    monkeypatch.setattr(
        rows,
        "_expectation",
        lambda softmax, logits, spare: torch.mul(softmax, logits, out=spare).sum(1),
    )
    monkeypatch.setattr(rows, "_first_largest", lambda tile, targets, top: tile.argmax(1) == targets)
    monkeypatch.setattr(linear, "scaled", lambda gradient, factor, dtype: (gradient * factor).to(dtype))
    batch = trainer(tmp_path).data_collator(conversations(5))
    hidden = torch.randn(*batch["labels"].shape, 16, requires_grad=True)
    weight = torch.randn(VOCAB, 16, requires_grad=True)
    meter, count = TokenMeter(torch.device("cpu"), [3, 5], Dft(), files=2), torch.tensor(17)
    batch["origins"], watch = torch.zeros(5, 2, dtype=torch.int64), StepWatch()
    with NoSync():
        loss, stats = linear_dft_loss(
            hidden, weight, batch["labels"], num_items=count, positions=batch["loss_positions"]
        )
        watch.add(loss, stats.nll, batch, meter.sums)
        meter.update(stats, batch, loss.detach(), origins_of_tokens(batch)[:, 0])
        pass_on_nonfinite(loss).backward()
    assert meter.sums[0, 0] == len(batch["loss_positions"]) > 0
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        linear_dft_loss(hidden, weight, batch["labels"], num_items=count)


def test_the_head_is_inspected_in_each_run(tmp_path):
    run = trainer(tmp_path)
    run.evaluate()
    first = run._run.loss.head
    assert isinstance(first, FusedHead)
    run.model.resize_token_embeddings(VOCAB + 7)
    run.train()
    head = run._run.loss.head
    assert head is not first and head.module is run.model.lm_head
    assert run.model.lm_head.weight.shape[0] == VOCAB + 7


def test_an_adapter_added_between_two_runs_is_trained(tmp_path):
    run = trainer(tmp_path, "auto")
    run.evaluate()
    run.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    before = run.model.lm_head.lora_B["default"].weight.detach().clone()
    run.train()
    assert isinstance(run._run.loss.head, str)
    assert not torch.equal(run.model.lm_head.lora_B["default"].weight, before)


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_streamed_examples_are_all_trained_on(tmp_path, fused_head):
    def stream():
        yield from conversations(16)

    run = trainer(tmp_path, fused_head)
    run.train_dataset = run.eval_dataset = IterableDataset.from_generator(stream)
    run.train()
    (record,) = [entry for entry in run.state.log_history if entry.get("step") == 1 and "grad_norm" in entry]
    rows = conversations(4)
    plain = trainer(tmp_path, "off")
    plain.train_dataset, plain.args.train_sampling_strategy = Dataset.from_list(rows), "sequential"
    plain.args.max_steps = 1
    plain.train()
    expected = next(entry for entry in plain.state.log_history if "grad_norm" in entry)
    for name in ("loss", "nll", "grad_norm"):
        assert record[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_a_custom_collator_may_change_labels(tmp_path, fused_head):
    ours = PaddedCollator(0)

    def collate(examples):
        batch = ours(examples)
        batch["labels"] = batch["labels"].masked_fill(torch.arange(batch["labels"].shape[1]) % 3 == 0, -100)
        return batch

    run = trainer(tmp_path, fused_head)
    run.data_collator = collate
    batch = collate(conversations(5))
    loss = run.compute_loss(run.model.eval(), batch)
    expected, _ = dft_loss(run.model(input_ids=batch["input_ids"]).logits, batch["labels"], alpha=0.6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_inspection_preserves_random_state_and_training_mode(tmp_path):
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    run = trainer(tmp_path, model=model)
    run.model.train()
    before = torch.get_rng_state()
    run._run.loss.inspect_model(run.model, run.model)
    assert torch.equal(torch.get_rng_state(), before) and run.model.training
    run.model(input_ids=torch.arange(8)[None])
    assert not torch.equal(torch.get_rng_state(), before), "dropout is on in training"
