"""Every optimizer of transformers trains three steps, or is one error; and Muon."""

import pytest
import torch
import transformers
from datasets import Dataset
from torch.optim import AdamW, Muon
from transformers.training_args import OptimizerNames

from dft import DFTTrainer
from dft.arguments.training import OwnOptimizer, TrainingArguments
from dft.errors import UserError
from dft.training.muon import MuonWithAdamW, muon_optimizer, split_weights
from dft.training.optimizer import UNSUPPORTED_OPTIMIZERS, check_optimizer, check_whole_matrices
from tests.training.test_trainer import conversations, tiny

ROWS = conversations(24)
RUNS_HERE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "muon")
"""Optimizers without another package, on a CPU."""
NAMES = [name.value for name in [*OptimizerNames, *OwnOptimizer]]


def arguments(folder, optim: str, **flags) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, seed=5, logging_steps=1, optim=optim,
        learning_rate=1e-2, per_device_train_batch_size=4, **{"max_steps": 3, "save_strategy": "no", **flags},
    )  # fmt: skip


def trainer(args: TrainingArguments) -> DFTTrainer:
    optimizer = muon_optimizer(args)
    data = Dataset.from_list(ROWS)
    return DFTTrainer(tiny(), args, alpha=0.6, train_dataset=data, optimizer_cls_and_kwargs=optimizer)


@pytest.mark.parametrize("optim", RUNS_HERE)
def test_an_optimizer_trains_every_weight(tmp_path, optim):
    args = arguments(tmp_path, optim)
    check_optimizer(args)
    run = trainer(args)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "grad_norm" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    unchanged = [name for name, weight in run.model.state_dict().items() if torch.equal(weight, before[name])]
    assert not unchanged


@pytest.mark.parametrize("optim", [name for name in NAMES if name not in RUNS_HERE])
def test_an_optimizer_that_cannot_run_here_is_one_error(tmp_path, optim):
    """It names the package to install, the device that is needed, or the reason. Skipped if it can run."""
    args = arguments(tmp_path, optim)
    try:
        check_optimizer(args)
    except UserError as error:
        message = str(error)
    else:
        pytest.skip("its package is installed")
    assert message.startswith(f"--optim {optim}: ")
    if args.optim in UNSUPPORTED_OPTIMIZERS:
        assert "updates the weights during the backward pass" in message
    elif optim in ("adamw_torch_xla", "adamw_torch_npu_fused"):
        assert "needs a device of the type" in message
    else:
        assert "pip install " in message


def test_muon_trains_the_matrices_of_the_hidden_layers_and_adamw_the_rest():
    model = tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, decayed, others = ([names[id(p)] for p in group] for group in split_weights(model))
    assert len(matrices) == 7 and all(".layers.0." in name and "_proj.weight" in name for name in matrices)
    assert decayed == ["model.embed_tokens.weight", "lm_head.weight"]
    assert others and all("norm" in name for name in others)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert len(split_weights(model)[0]) == 6


def test_muon_updates_as_the_optimizers_of_torch():
    models = [tiny(), tiny()]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = MuonWithAdamW(*split_weights(models[0]), **options, betas=(0.9, 0.95), eps=1e-8, momentum=0.9)
    matrices, decayed, others = split_weights(models[1])
    adamw = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    theirs = [
        Muon(matrices, **options, momentum=0.9), AdamW(decayed, **adamw, weight_decay=0.1),
        AdamW(others, **adamw, weight_decay=0.0),
    ]  # fmt: skip
    for seed in range(3):
        for model in models:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        for optimizer in (ours, *theirs):
            optimizer.step()
    for mine, their in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, their)


def test_a_run_with_muon_resumes_exactly(tmp_path):
    flags = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    whole = trainer(arguments(tmp_path / "run", "muon", **flags))
    whole.train()
    resumed = trainer(arguments(tmp_path / "resumed", "muon", **flags))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for mine, their in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, their)
    with pytest.raises(UserError, match="saved with --optim muon, and this run has --optim adamw_torch"):
        other = trainer(arguments(tmp_path / "other", "adamw_torch", **flags))
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=3", "unknown option 'speed'; choose from momentum, nesterov, ns_steps, adjust_lr_fn"),
        ("momentum=much", "--optim_args momentum=much: could not convert string to float"),
        ("nesterov=maybe", "--optim_args nesterov=maybe: expected True or False"),
        ("adjust_lr_fn=other", "Adjust learning rate function other is not supported"),
    ],
)
def test_wrong_options_of_muon_are_one_error(tmp_path, text, message):
    with pytest.raises(UserError) as raised:
        check_optimizer(arguments(tmp_path, "muon", optim_args=text))
    assert str(raised.value).startswith("--optim muon: ") and message in str(raised.value)


@pytest.mark.parametrize("optim", ["muon", "adafactor", "galore_adamw", "apollo_adamw"])
@pytest.mark.parametrize(
    ("sharding", "value", "flag"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "the DeepSpeed settings of accelerate launch"),
        ("fsdp", True, "--fsdp"),
    ],
)
def test_optimizers_of_whole_matrices_are_refused_where_weights_are_sharded(
    tmp_path, optim, sharding, value, flag
):
    args = arguments(tmp_path, optim)
    check_whole_matrices(args)
    setattr(args, sharding, value)
    message = f"^--optim {optim}: computes with rows and columns of whole weight matrices, and {flag} gives "
    with pytest.raises(UserError, match=message):
        check_whole_matrices(args)


def test_adamw_is_not_refused_where_weights_are_sharded(tmp_path):
    args = arguments(tmp_path, "adamw_torch")
    args.fsdp = True
    check_whole_matrices(args)


def test_an_unknown_optimizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="adamm is not a valid OptimizerNames"):
        arguments(tmp_path, "adamm")
    assert transformers.TrainingArguments(str(tmp_path), use_cpu=True).optim == "adamw_torch_fused"
