"""Plan the memory of every recipe in recipes/, and write docs/recipes.md.

    python scripts/make_recipes_page.py

tests/scripts/test_recipes.py fails if the page is not current or a recipe does not fit its hardware.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import yaml
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dft.arguments.conflicts import check_arguments
from dft.arguments.deepspeed_file import zero_of
from dft.arguments.parser import Arguments, parse_arguments
from dft.report.terminal.plan import plan_lines
from dft.training.batching import packing_obstacle
from dft.training.memory.batch_tokens import full_rows
from dft.training.memory.plan import plan, requested_setting
from dft.training.model.loading import load_meta_model
from dft.training.model.positions import position_limit
from dft.training.parameters import GIB
from scripts.model_sizes import published_config

RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
USABLE_GIB = {24: 22.0, 80: 79.0}
"""Memory in GiB to plan with on cards that are sold with so many GB, less than they report."""
GATHERED_WEIGHTS = 1_000_000_000
"""Number of weights that ZeRO-3 may keep gathered: `stage3_max_live_parameters` in ds_config/."""


HEAD = """# Recipes

<!-- Written by scripts/make_recipes_page.py from the files in recipes/. Do not edit. -->

Flags for published models on common hardware, to start from.

```bash
python train_dft.py --config qwen3/8b-lora-1x24gb --data_files a.jsonl --output_dir runs/first
python train_dft.py --config qwen3/8b-lora-1x24gb mine.yaml --learning_rate 1e-4  # your file over the recipe
python scripts/make_recipes_page.py                           # plans all recipes and writes this page
```

`--config` finds a recipe by its name from any folder, also in the installed package; a file of that name in
the working folder has precedence.

A recipe names the model, its precision, how the devices share it, the length and number of rows of an
optimizer step, and the learning rate with its schedule. Your data, the output folder, evaluation, trackers
and checkpoints are yours to add, in a second file or on the command line, where any flag of the recipe can
be replaced. `scripts/train.sh` has defaults of its own, which override those of a file; start recipes with
the command in their third line.

The name says family/size-method-devices: `full` trains all weights, `lora` adapters, `qlora` adapters on
weights in 4 bits. Devices come in nodes of eight. Llama and Gemma ask you to accept a license on the hub.

## What was verified

- Each recipe is parsed and checked like the flags of a run, and planned with `--plan` from the sizes of its
  model (`tests/scripts/test_recipes.py`): all rows full, all tokens supervised. The plan must say that it
  fits. ZeRO-3 may keep a billion weights gathered, which a plan leaves out; the table includes them, and they
  must fit as well.
- Cards of 24 GB are planned with 22 GiB and cards of 80 GB with 79 GiB, of which a plan may use 92 %.
- **No recipe was run on the hardware in its name.** [planning.md](planning.md) says how far plans are from
  measured peaks; those of 4-bit weights and of several GPUs were never compared. If a run is out of memory,
  halve `--per_device_train_batch_size` and double `--gradient_accumulation_steps`, which takes the same
  optimizer steps, or shorten `--max_length`.
- The settings of Qwen2.5-Math with all weights are those of the paper (arXiv 2508.05629). All other learning
  rates are starting points that were not tuned. DFT has its default strength, `--dft_alpha 1`; first see
  whether it suits your data with `--preflight True` ([objectives.md](objectives.md)).
- The weights of gpt-oss-20b are published in 4 bits (MXFP4), which cannot be trained. Its recipes convert
  them to bfloat16 with `--dequantize True`, and models are saved so. That was tried on a tiny model in MXFP4
  (`tests/training/model/test_quantized.py`), not on the published one. Its experts are not linear layers, so
  adapters leave them out. Under ZeRO-3, each rank loads all weights, 39 GiB of CPU memory, before they are
  sharded.

## Recipes
"""
COLUMNS = """
| recipe | model | tokens per optimizer step | planned, per device | when to use it |
|---|---|---|---|---|
"""


def main() -> None:
    rows = [plan_recipe(path).row() for path in recipe_files()]
    PAGE.write_text(HEAD + COLUMNS + "".join(rows), encoding="utf-8")
    print(PAGE)


@dataclass(frozen=True)
class Recipe:
    """The flags of a recipe and the hardware that its name promises to suffice.

    Attributes:
        path: path of the file, relative to the repository.
        devices: number of devices.
        memory: memory of each device in GB.
        model_name: name of the model on the hub.
        arguments: the parsed flags, with a folder instead of that name.
    """

    path: Path
    devices: int
    memory: int
    model_name: str
    arguments: Arguments

    @property
    def tokens(self) -> int:
        """Maximum number of tokens of an optimizer step."""
        training = self.arguments.training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return self.devices * rows * self.arguments.data.max_length

    @property
    def name(self) -> str:
        """Name by which --config finds it."""
        return str(self.path.relative_to("recipes").with_suffix(""))

    @property
    def comment(self) -> list[str]:
        """Lines of the comment that the file begins with: when to use it, its step, and the command."""
        lines = (ROOT / self.path).read_text(encoding="utf-8").splitlines()
        return [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines)]

    def step(self) -> str:
        """Return the line of the comment about an optimizer step, as it follows from the flags."""
        training, data = self.arguments.training, self.arguments.data
        devices = _counted(self.devices, "device")
        rows = _counted(training.per_device_train_batch_size, "row")
        filled = "when the packed rows are full" if data.packing else "at most, for rows are not packed"
        return (
            f"Optimizer step: {devices} x {rows} x {training.gradient_accumulation_steps} accumulated x "
            f"{data.max_length:,} tokens = {self.tokens:,} tokens {filled}."
        )

    def command(self) -> str:
        """Return the command that starts it, as it follows from the flags and the devices."""
        launcher = "python"
        if self.devices > 1:
            launcher = "deepspeed" if self.arguments.training.deepspeed else "torchrun --nproc_per_node 8"
        if self.devices > 8:
            launcher += " --hostfile hostfile"
        return (
            f"{launcher} train_dft.py --config {self.name} --data_files train.jsonl --output_dir runs/first"
        )


def _counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as 2 rows."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True)
class PlannedRecipe:
    """The planned memory of a recipe.

    Attributes:
        recipe: the recipe.
        lines: what `--plan True` prints.
        peak: planned peak of a device in GiB.
        gathered: memory of gathered weights in GiB, which the plan does not count.
    """

    recipe: Recipe
    lines: tuple[str, ...]
    peak: float
    gathered: float

    @property
    def share(self) -> float:
        """Share of the device's memory that is in use at the peak, with gathered weights."""
        return (self.peak + self.gathered) / USABLE_GIB[self.recipe.memory]

    def row(self) -> str:
        """Return the row of the recipe in the table."""
        recipe = self.recipe
        link = f"[{recipe.name}](../{recipe.path})"
        memory = f"{self.peak + self.gathered:.0f} of {USABLE_GIB[recipe.memory]:.0f} GiB"
        return f"| {link} | {recipe.model_name} | {recipe.tokens:,} | {memory} | {recipe.comment[0]} |\n"


def recipe_files() -> list[Path]:
    """Return the paths of all recipes, relative to the repository: by family, size and method."""
    files = [path.relative_to(ROOT) for path in RECIPES.glob("*/*.yaml")]
    return sorted(files, key=lambda path: (path.parent, float(path.stem.split("b-")[0]), path.stem))


@contextmanager
def launched() -> Iterator[None]:
    """Parse flags in this context as a process that a launcher started."""
    with (
        mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}),
        mock.patch("dft.arguments.training.init_cpu_deepspeed"),
        mock.patch("dft.arguments.lora.check_installed"),  # bitsandbytes needs a GPU
    ):
        try:
            yield
        finally:
            unset_hf_deepspeed_config()


@contextmanager
def read_recipe(path: Path) -> Iterator[Recipe]:
    """Parse a recipe, with the configuration of its model in a temporary folder.

    Args:
        path: path of the recipe, relative to the repository.
    """
    match = re.fullmatch(r"[\d.]+b-(?:full|lora|qlora)-(\d+)x(\d+)gb", path.stem)
    assert match is not None, f"{path}: expected a name such as 8b-lora-1x24gb.yaml"
    devices, memory = map(int, match.groups())
    model_name = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["model_name_or_path"]
    with tempfile.TemporaryDirectory() as folder, launched():
        published_config(model_name).save_pretrained(folder)
        arguments = parse_arguments([
            "--config", str(ROOT / path), "--model_name_or_path", folder, "--data_files", "train.jsonl",
            "--output_dir", f"{folder}/output", "--use_cpu", "True", "--attn_implementation", "varlen",
            "--plan", "True", "--plan_world_size", str(devices),
            "--plan_device_memory", str(USABLE_GIB[memory]),
        ])  # fmt: skip
        with on_cuda():
            check_arguments(arguments)
        yield Recipe(path, devices, memory, model_name, arguments)


def plan_recipe(path: Path) -> PlannedRecipe:
    """Plan a recipe from the sizes of its model, with rows that are full of supervised tokens.

    Args:
        path: path of the recipe, relative to the repository.
    """
    with read_recipe(path) as recipe:
        training = recipe.arguments.training
        model = load_meta_model(recipe.arguments)
        length = recipe.arguments.data.max_length
        assert length <= (position_limit(model.config.get_text_config()) or length), f"{path}: too long"
        obstacle = packing_obstacle(model) if recipe.arguments.data.packing else None
        assert obstacle is None, f"{path}: {obstacle}"
        with on_cuda():
            lines = plan_lines(recipe.arguments, model, {"train": report_of_full_rows(length)})
            setting = requested_setting(model, training, recipe.devices)
            peak = plan(model, training, setting, full_rows(length), fused=True).peak
        return PlannedRecipe(recipe, tuple(lines), peak, gathered_gib(recipe.arguments, model))


def on_cuda() -> AbstractContextManager[Any]:
    """Return a context in which a run that was parsed on a CPU is one on a CUDA device."""
    return mock.patch("transformers.TrainingArguments.device", torch.device("cuda"))


def report_of_full_rows(length: int) -> dict[str, Any]:
    """Return the data report of rows of a length in which all tokens are supervised, the largest batches."""
    count = 100_000
    tokens = count * length
    return {
        "rows": count, "tokens": tokens, "supervised_tokens": tokens, "length_percentiles": {"100": length}
    }  # fmt: skip


def gathered_gib(arguments: Arguments, model: PreTrainedModel) -> float:
    """Return the memory of the weights that ZeRO-3 may keep gathered, in GiB."""
    if zero_of(arguments.training)[0] < 3:
        return 0.0
    weights = sum(parameter.numel() for parameter in model.parameters())
    return min(GATHERED_WEIGHTS, weights) * 2 / GIB


if __name__ == "__main__":
    main()
