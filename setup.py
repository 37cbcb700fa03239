"""The parts of the package that pyproject.toml cannot describe: folders outside of dft, and the pins."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COMMANDS = ("chat", "evaluate", "get_model", "merge_lora", "report", "show_data")
"""The files in scripts/ that are installed, as dft_scripts. pyproject.toml names the command of each."""


def pins(name: str, *packages: str) -> list[str]:
    """Return the lines of a requirements file, or those of some packages."""
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not packages:
        return lines
    by_name = {line.split("==")[0]: line for line in lines}
    return [by_name[package] for package in packages]


class BuildCommands(build_py):
    """Leaves out of dft_scripts what is no command. An editable installation has the whole folder."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != "dft_scripts" or module[1] in COMMANDS]


setup(
    packages=[*find_packages(include=["dft", "dft.*"]), "dft.ds_config", "dft.recipes", "dft_scripts"],
    package_dir={"dft.ds_config": "ds_config", "dft.recipes": "recipes", "dft_scripts": "scripts"},
    py_modules=["train_dft"],
    cmdclass={"build_py": BuildCommands},
    package_data={
        "dft.ds_config": ["*.json"],
        "dft.recipes": ["*/*.yaml"],
        "dft.data.templates": ["*.jinja"],
        "dft.report.pages": ["*.jinja"],
    },
    install_requires=pins("requirements.txt"),
    extras_require={
        "dev": pins("requirements-dev.txt"),
        "gpu": pins("requirements-gpu.txt"),
        "lora": pins("requirements-dev.txt", "peft"),
        "real": pins("requirements-real.txt"),
        "trackers": pins(
            "requirements-dev.txt",
            "tensorboard",
            "swanboard",
            "mlflow-skinny",
            "sqlalchemy",
            "alembic",
            "trackio",
        ),
    },
)
