"""The names of commands in messages, in the repository and as an installed package."""

import sys
import tomllib

import pytest

from dft import program
from dft.program import command_of, install_command, launch_command, program_name, shipped_folder
from tests.launching import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MERGE = "scripts/merge_lora.py"


def test_the_table_has_the_commands_of_the_package_and_their_scripts():
    assert sorted(program.COMMANDS.values()) == sorted(SCRIPTS)
    for script, command in program.COMMANDS.items():
        module = script.removesuffix(".py").replace("scripts/", "dft_scripts.")
        assert (ROOT / script).is_file() and SCRIPTS[command] == f"{module}:main"


@pytest.mark.parametrize("argument", ["train_dft.py", "/anywhere/scripts/merge_lora.py", "pytest"])
def test_in_the_repository_messages_name_its_scripts(monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", [argument])
    assert program_name() == "train_dft.py" and command_of(MERGE) == "python scripts/merge_lora.py"
    assert launch_command("deepspeed") == "deepspeed train_dft.py"
    assert shipped_folder("recipes") == ROOT / "recipes"


@pytest.mark.parametrize(("argument", "is_repository"), [("/bin/train-dft-report", True), ("x.py", False)])
def test_an_installed_command_and_package_name_the_commands(monkeypatch, argument, is_repository):
    monkeypatch.setattr(sys, "argv", [argument])
    monkeypatch.setattr(program, "IS_REPOSITORY", is_repository)
    assert program_name() == "train-dft" and command_of(MERGE) == "train-dft-merge"
    assert launch_command("deepspeed --num_gpus 2") == "deepspeed --num_gpus 2 --module train_dft"
    assert launch_command("torchrun --nproc_per_node N") == "torchrun --nproc_per_node N -m train_dft"


def test_the_package_has_its_files_inside(monkeypatch):
    monkeypatch.setattr(program, "IS_REPOSITORY", False)
    assert shipped_folder("ds_config") == ROOT / "dft/ds_config"


def test_a_missing_optional_package_is_installed_from_the_requirements_or_by_its_pin(monkeypatch):
    assert install_command("real", "gguf") == "pip install -r requirements-real.txt"
    monkeypatch.setattr(program, "IS_REPOSITORY", False)
    lines = ["torch==1", 'gguf==0.19.0; extra == "real"']
    monkeypatch.setattr(program, "requires", {"dft-trainer": lines}.__getitem__)
    assert install_command("real", "gguf") == "pip install gguf==0.19.0"
