"""--lora_args: options of peft beside those that have flags."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dft import DFTTrainer
from dft.arguments.lora import LORA_OPTIONS, LoraArguments, check_lora, lora_options
from dft.arguments.parser import parse_arguments
from dft.data.batches.sampler import WithBlank
from dft.errors import UserError
from dft.evaluation.sampling import load_for_sampling
from dft.training.checkpoints.run_settings import model_settings
from dft.training.model.adapters import add_adapters, write_base_record
from dft.training.parameters import shapes_digest
from scripts import merge_lora
from tests.training.test_trainer import conversations, tiny

peft = pytest.importorskip("peft")
ROWS = conversations(16)
OPTIONS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "both": {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian"},
    "patterns": {
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "exclude_modules": ["v_proj"],
        "init_lora_weights": "orthogonal",
    },
}  # fmt: skip


def flags_of(options: dict | str, **flags) -> LoraArguments:
    text = options if isinstance(options, str) else json.dumps(options)
    return LoraArguments(lora_r=4, lora_alpha=6, lora_args=text, **flags)


def arguments_of(folder: Path, **flags) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, logging_steps=1, learning_rate=1e-1, disable_tqdm=True, seed=5,
        max_steps=4, save_steps=2, per_device_train_batch_size=4, **flags,
    )  # fmt: skip


def trainer(folder: Path, base: Path, options: dict | str) -> DFTTrainer:
    arguments = arguments_of(folder)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(base), flags_of(options), arguments, str(base))
    return DFTTrainer(model, arguments, alpha=0.0, fused_head="on", train_dataset=Dataset.from_list(ROWS))


def adapters_of(run: transformers.Trainer) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_plain_peft_and_continues_exactly(tmp_path, base, name):
    """SFT: the same adapters as from transformers' Trainer around peft's own model, and after resuming."""
    run = trainer(tmp_path / "run", base, OPTIONS[name])
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", **OPTIONS[name]
    )
    transformers.set_seed(5)
    plain_model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    begun = {key: weight.clone() for key, weight in adapters_of(run).items()}
    for key, weight in plain_model.named_parameters():
        assert not weight.requires_grad or torch.equal(weight, begun[key]), key
    run.train()
    plain = transformers.Trainer(
        plain_model, arguments_of(tmp_path / "plain"), train_dataset=Dataset.from_list(ROWS),
        data_collator=run.data_collator,
    )  # fmt: skip
    plain._get_train_sampler = lambda *_: run._order.train_sampler(WithBlank(run.train_dataset, 0))
    plain.train()
    trained, expected = adapters_of(run), adapters_of(plain)
    assert trained.keys() == expected.keys()
    for key, weight in trained.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, begun[key]), key
    resumed = trainer(tmp_path / "resumed", base, OPTIONS[name])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for key, weight in adapters_of(resumed).items():
        assert torch.equal(weight, trained[key]), key


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_adapters_load_and_merge(tmp_path, base, tokenizer, name):
    run = trainer(tmp_path / "run", base, OPTIONS[name])
    run.train()
    run.save_model()
    write_base_record(tmp_path / "run", run.model, shapes_digest(run.model))
    tokenizer.save_pretrained(tmp_path / "run")
    merge_lora.merge(tmp_path / "run", tmp_path / "merged", None, "auto", trust_remote_code=False)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    expected = run.model.eval()(input_ids=ids).logits
    for folder in ("run", "merged"):
        loaded = load_for_sampling(str(tmp_path / folder), "auto", trust_remote_code=False, device="cpu")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("use_dora", "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[1]", "expected a JSON object such as '{\"use_dora\": true}'"),
        ('{"use_dora": true, "use_dora": false}', "not valid JSON (the key 'use_dora' appears twice"),
        ('{"r": 8}', "r has a flag of its own, --lora_r"),
        ('{"target_modules": []}', "target_modules has a flag of its own, --lora_target_modules"),
        ('{"use_dorra": true}', "use_dorra is not supported; the options of peft that are: use_dora, use_rs"),
        ('{"task_type": "SEQ_CLS"}', "task_type is not supported; the options of peft that are: use_dora"),
        ('{"use_dora": "yes"}', 'use_dora must be true or false, got "yes"'),
        ('{"use_dora": 1}', "use_dora must be true or false, got 1"),
        ('{"init_lora_weights": "pissa"}', "init_lora_weights must be true, false, gaussian or orthogonal, "
         'got "pissa"; initializations such as pissa or olora change the weights of the model'),
        ('{"init_lora_weights": 1}', "init_lora_weights must be true, false, gaussian or orthogonal, got 1"),
        ('{"rank_pattern": 3}', "rank_pattern must be an object of names and ranks above 0, got 3"),
        ('{"rank_pattern": {"q_proj": 2.5}}', 'names and ranks above 0, got {"q_proj": 2.5}'),
        ('{"rank_pattern": {"(": 2}}', 'names and ranks above 0, got {"(": 2}'),
        ('{"alpha_pattern": {"q_proj": "a"}}', 'names and alphas above 0, got {"q_proj": "a"}'),
        ('{"alpha_pattern": {"q_proj": NaN}}', 'names and alphas above 0, got {"q_proj": NaN}'),
        ('{"exclude_modules": [1]}', "must be a list of names, or a regular expression, got [1]"),
        ('{"exclude_modules": "("}', "must be a list of names, or a regular expression, got"),
        ('{"layers_to_transform": ["a"]}', "must be a layer number, or a list of them, from 0, got"),
        ('{"layers_to_transform": -1}', "must be a layer number, or a list of them, from 0, got -1"),
        ('{"layers_to_transform": 0}', "layers_to_transform needs the names of modules; add "
         "--lora_target_modules, for example q_proj v_proj"),
    ],
)  # fmt: skip
def test_invalid_options_are_one_error(text, message):
    with pytest.raises(UserError) as caught:
        lora_options(flags_of(text))
    assert str(caught.value).startswith(f"--lora_args {text}: ") and message in str(caught.value)


def test_options_need_adapters(tmp_path):
    arguments = arguments_of(tmp_path)
    with pytest.raises(UserError, match="--lora_args has no effect without --lora_r"):
        check_lora(LoraArguments(lora_args="{}"), arguments, 0)


def adapt(options: dict, targets: list[str] | None = None) -> set[str]:
    """Add adapters to a model, and return the names of the modules that have one."""
    flags = flags_of(options, lora_target_modules=targets)
    adapted = add_adapters(tiny(), flags, transformers.TrainingArguments(use_cpu=True), "base")
    return {name.rsplit(".", 1)[-1] for name in adapted.base_model.targeted_module_names}


def test_an_option_that_peft_rejects_is_an_error_with_the_flags():
    with pytest.raises(UserError) as caught:
        adapt({"exclude_modules": ".*"})
    assert str(caught.value).startswith(
        '--lora_target_modules all-linear --lora_args {"exclude_modules": ".*"}: All modules were excluded'
    )


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ({}, ["q_proj", "k"], "--lora_target_modules k: matches no module of the model"),
        ({"exclude_modules": ["k"]}, None, "--lora_args: exclude_modules k matches no module of the model"),
        ({"exclude_modules": "k"}, None, "--lora_args: exclude_modules k matches no module of the model"),
        ({"rank_pattern": {"k": 2}}, None, "--lora_args: rank_pattern k matches none of the 7 modules that "
         "get an adapter, such as model.layers.0."),
        ({"alpha_pattern": {"k_proj": 2}}, ["q_proj"], "--lora_args: alpha_pattern k_proj matches none of "),
        ({"layers_to_transform": [0, 9]}, ["q_proj"], "--lora_args: layers_to_transform 9 matches none of "),
    ],
)  # fmt: skip
def test_a_name_that_matches_no_module_is_an_error(options, targets, message):
    with pytest.raises(UserError) as caught:
        adapt(options, targets)
    assert str(caught.value).startswith(message)


def test_options_select_the_modules_that_they_match():
    assert adapt({"exclude_modules": r".*mlp\..*", "rank_pattern": {"self_attn.q_proj": 2}}) == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert adapt({"layers_to_transform": 0, "layers_pattern": "layers"}, ["q_proj"]) == {"q_proj"}


def test_a_config_file_may_write_the_options_as_a_mapping(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("lora_r: 4\nlora_args:\n  use_dora: true\n  rank_pattern: {q_proj: 8}\n")
    words = ["--config", file, "--model_name_or_path", "m", "--data_files", "a.jsonl", "--output_dir", "out"]
    arguments = parse_arguments([*map(str, words), "--use_cpu", "True"])
    assert lora_options(arguments.lora) == {"use_dora": True, "rank_pattern": {"q_proj": 8}}


def test_all_options_exist_in_the_installed_peft():
    assert LORA_OPTIONS.keys() <= {field.name for field in peft.LoraConfig.__dataclass_fields__.values()}


def test_options_that_scale_adapters_must_be_those_of_the_checkpoint(tmp_path, base):
    run = trainer(tmp_path / "run", base, {"use_rslora": True, "init_lora_weights": "gaussian"})
    run.train()
    assert model_settings(run.model)["--lora_args"] == {"use_rslora": True}
    with pytest.raises(UserError) as caught:
        trainer(tmp_path / "other", base, "{}").train(str(tmp_path / "run/checkpoint-2"))
    assert (
        'saved with --lora_args {"use_rslora": true}, and this run has no --lora_args: the adapters'
        in str(caught.value)
    )
