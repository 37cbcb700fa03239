"""The recipes in recipes/: their flags exist, their models fit the hardware in their names."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dft.arguments.parser import parse_arguments
from dft.training.memory.plan import HEADROOM
from scripts.make_recipes_page import COLUMNS, HEAD, PAGE, ROOT, plan_recipe, read_recipe, recipe_files
from scripts.model_sizes import SIZES, published_config

WEIGHTS = {
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "microsoft/phi-4": 14_659_507_200,
    "openai/gpt-oss-20b": 20_914_757_184,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}
"""Number of weights of the published checkpoints."""
PAPER = {
    "learning_rate": 5e-5, "max_length": 2048, "packing": False, "num_train_epochs": 1, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "weight_decay": 0.01, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "dft_alpha": 1.0, "objective": "dft", "bf16": True, "lora_r": None,
}  # fmt: skip
"""Settings of arXiv 2508.05629, section 4.1.1."""

every_recipe = pytest.mark.parametrize("path", recipe_files(), ids=str)


def marks(path):
    """Return the marks of a recipe: creating the adapters of a large model takes seconds."""
    return [pytest.mark.slow] if "lora" in path.stem and float(path.stem.split("b-")[0]) > 8 else []


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_a_model_give_its_number_of_weights(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == WEIGHTS[name]


@every_recipe
def test_a_recipe_parses_and_its_comment_says_what_it_does(path):
    """Unknown flags and flags that contradict one another are errors."""
    with read_recipe(path) as recipe:
        purpose, step, command = recipe.comment
        assert purpose.endswith(".") and step == recipe.step() and command == recipe.command()


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=marks(path), id=str(path)) for path in recipe_files()]
)
def test_the_plan_of_a_recipe_fits_and_is_in_the_table(path):
    planned = plan_recipe(path)
    recipe = planned.recipe
    assert f"; {recipe.devices} x cuda, " in planned.lines[0]
    assert f" steps of {recipe.tokens // recipe.arguments.data.max_length} rows, " in planned.lines[1]
    assert planned.lines[-1].startswith("fits        yes: "), "\n".join(planned.lines)
    assert planned.share <= HEADROOM  # with the weights that ZeRO-3 gathers
    assert planned.row() in PAGE.read_text(encoding="utf-8"), "run python scripts/make_recipes_page.py"


def test_a_recipe_that_is_too_large_does_not_fit(tmp_path, monkeypatch):
    text = (ROOT / "recipes/qwen3/0.6b-full-1x24gb.yaml").read_text()
    file = tmp_path / "recipes/qwen3/0.6b-full-1x24gb.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"))
    monkeypatch.setattr("scripts.make_recipes_page.ROOT", tmp_path)
    planned = plan_recipe(file.relative_to(tmp_path))
    assert planned.share > HEADROOM and any(line.startswith("fits        no: ") for line in planned.lines)


def test_the_page_has_one_row_for_each_recipe():
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(HEAD + COLUMNS), "run python scripts/make_recipes_page.py"
    rows = page.removeprefix(HEAD + COLUMNS).splitlines()
    assert [row.split("](../")[1].split(")")[0] for row in rows] == [str(path) for path in recipe_files()]


@pytest.mark.parametrize("path", [path for path in recipe_files() if "math" in str(path)], ids=str)
def test_recipes_of_the_models_of_the_paper_have_its_settings(path):
    with read_recipe(path) as recipe:
        flags, training = recipe.arguments.flags, recipe.arguments.training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert rows * recipe.devices == 256
        differing = {name for name, value in PAPER.items() if flags[name] != value}
        adapters = {"learning_rate", "lora_r", "adam_beta2", "weight_decay"}
        assert differing == (adapters if "lora" in path.stem else set())


def test_files_and_flags_are_laid_over_a_recipe(tmp_path):
    recipe, mine = "qwen3/8b-lora-1x24gb", tmp_path / "mine.yaml"
    mine.write_text("max_length: 1024\nlora_r: 8\ndata_files: [a.jsonl]\n")
    words = ["--output_dir", str(tmp_path / "output"), "--use_cpu", "True", "--lora_r", "32"]
    arguments = parse_arguments([*words, "--config", recipe, str(mine)])
    assert arguments.data.max_length == 1024 and arguments.lora.lora_r == 32
    assert arguments.model.model_name_or_path == "Qwen/Qwen3-8B"  # only in the recipe
    arguments = parse_arguments([*words[:4], "--config", str(mine), recipe])
    assert arguments.data.max_length == 2048 and arguments.lora.lora_r == 16
