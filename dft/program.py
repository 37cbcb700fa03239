"""How this program was installed: the commands that messages name, and the folders of files that it ships."""

import sys
from importlib.metadata import requires
from pathlib import Path

COMMANDS = {
    "train_dft.py": "train-dft",
    "scripts/chat.py": "train-dft-chat",
    "scripts/evaluate.py": "train-dft-evaluate",
    "scripts/get_model.py": "train-dft-get-model",
    "scripts/merge_lora.py": "train-dft-merge",
    "scripts/report.py": "train-dft-report",
    "scripts/show_data.py": "train-dft-show-data",
}
"""The installed command of each script, as in pyproject.toml."""
DISTRIBUTION = "dft-trainer"
_PACKAGE = Path(__file__).parent
IS_REPOSITORY = not (_PACKAGE / "ds_config").is_dir()
"""Whether the package lies in its repository, where scripts are files. A wheel has ds_config in dft."""


def uses_commands() -> bool:
    """Return whether the user starts installed commands rather than files of the repository."""
    return not IS_REPOSITORY or Path(sys.argv[0]).name in COMMANDS.values()


def program_name(script: str = "train_dft.py") -> str:
    """Return the name of a script in --help and messages, such as train-dft or train_dft.py."""
    return COMMANDS[script] if uses_commands() else Path(script).name


def command_of(script: str = "train_dft.py") -> str:
    """Return the command that starts a script: `train-dft-merge` or `python scripts/merge_lora.py`."""
    return COMMANDS[script] if uses_commands() else f"python {script}"


def launch_command(launcher: str) -> str:
    """Return the command that starts training with `deepspeed` or `torchrun`, which take a file or module.

    Args:
        launcher: the launcher with its own flags.
    """
    if not uses_commands():
        return f"{launcher} train_dft.py"
    option = "--module" if launcher.startswith("deepspeed") else "-m"
    return f"{launcher} {option} train_dft"


def install_command(extra: str, package: str) -> str:
    """Return the command that installs an optional package in the version that this program is tested with.

    Args:
        extra: extra that contains it, which has a requirements file of its own in the repository.
        package: name of the package.
    """
    if IS_REPOSITORY:
        return f"pip install -r requirements-{extra}.txt"
    pins = (line.partition(";")[0].strip() for line in requires(DISTRIBUTION) or ())
    return f"pip install {next(pin for pin in pins if pin.partition('==')[0] == package)}"


def shipped_folder(name: str) -> Path:
    """Return a folder of shipped files, which a wheel has inside of `dft` and the repository beside it."""
    return (_PACKAGE.parent if IS_REPOSITORY else _PACKAGE) / name
