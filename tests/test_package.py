"""The wheel: its contents, its requirements, and its commands in an environment without this repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from email import message_from_bytes
from pathlib import Path

import pytest

from dft.version import __version__
from tests.examples import Example
from tests.launching import ROOT, launch
from tests.reliability.spoiling import LINE

SOURCES = ("dft", "ds_config", "recipes", "scripts")
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
CALL_COMMANDS = """
import sys
from importlib.metadata import entry_points
paths = sys.path.copy()
for command in entry_points(group="console_scripts"):
    if command.name.startswith("train-dft"):
        sys.argv = ["/bin/" + command.name, "--help"]
        try:
            command.load()()
        except SystemExit as ended:
            assert not ended.code, command
        print("called:", command.name, sys.modules[command.module].__file__)
assert sys.path == paths, sys.path
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.toml", "*.in", "requirements*.txt", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder / "src")
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder), "."]
    subprocess.run(build, cwd=folder / "src", check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The folder with the installed wheel."""
    target = wheel.parent / "installed"
    install = [*PIP, "install", "--no-deps", "--no-index", "-q", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    return target


def pins(name: str) -> set[str]:
    """Return the pins of a requirements file, without their markers."""
    lines = (ROOT / name).read_text().splitlines()
    return {line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")}


def run(command: list[str], installed: Path, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_requirements_and_extras_are_those_of_the_requirements_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    extras = defaultdict(set)
    for line in metadata.get_all("Requires-Dist"):
        extra = re.search(r'extra == "(\w+)"', line)
        extras[extra[1] if extra else ""].add(line.partition(";")[0].strip())
    assert metadata["Version"] == __version__
    assert extras[""] == pins("requirements.txt")
    for extra in ("dev", "gpu", "real"):
        assert extras[extra] == pins(f"requirements-{extra}.txt")
    assert {pin.split("==")[0] for pin in extras["lora"]} == {"peft"}
    packages = {"tensorboard", "swanboard", "mlflow-skinny", "sqlalchemy", "alembic", "trackio"}
    assert {pin.split("==")[0] for pin in extras["trackers"]} == packages
    assert extras["lora"] | extras["trackers"] < pins("requirements-dev.txt")


def test_the_wheel_contains_all_modules_templates_recipes_and_deepspeed_files_and_nothing_else(wheel):
    files = [file for file in (ROOT / "dft").rglob("*") if file.suffix in (".py", ".jinja")]
    expected = {str(file.relative_to(ROOT)) for file in files}
    expected |= {f"dft/ds_config/{file.name}" for file in (ROOT / "ds_config").glob("*.json")}
    expected |= {f"dft/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").glob("*/*.yaml")}
    expected |= {f"{target.partition(':')[0].replace('.', '/')}.py" for target in COMMANDS.values()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_an_editable_installation_finds_the_modules_of_all_commands(wheel, tmp_path):
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=wheel.parent / "src", check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        finder = next(name for name in archive.namelist() if name.endswith("_finder.py"))
        text = archive.read(finder).decode()
    for target in COMMANDS.values():
        assert f"'{target.partition(':')[0].partition('.')[0]}'" in text


def test_every_command_starts_from_another_folder(installed, tmp_path):
    assert (
        run([str(installed / "bin/train-dft"), "--version"], installed, tmp_path)
        == f"train-dft {__version__}\n"
    )
    printed = run([sys.executable, "-c", CALL_COMMANDS], installed, tmp_path)
    for command, target in COMMANDS.items():
        assert f"usage: {command} " in printed
        file = installed / f"{target.partition(':')[0].replace('.', '/')}.py"
        assert f"called: {command} {file}\n" in printed


@pytest.mark.slow
def test_deepspeed_starts_the_installed_package_and_finds_a_configuration_by_name(installed, tiny, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_bytes(LINE * 4)
    output = tmp_path / "out"
    words = Example(tmp_path, tiny, data, data, data).words(
        output, eval_data_files=None, deepspeed="zero3", max_steps=1
    )
    env = {"PYTHONPATH": str(installed)}
    command = ["train_dft", *words]
    finished = launch(command, folder=tmp_path, launcher="deepspeed", script=Path("--module"), env=env)
    assert finished.code == 0, finished.output
    assert "ZeRO-3" in finished.output and (output / "model.safetensors").exists()
    assert "deepspeed: zero3\n" in (output / "run_args.yaml").read_text()
