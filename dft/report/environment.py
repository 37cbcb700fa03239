"""Description of the installation and the machine for bug reports (`--env`), without secrets and paths."""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import huggingface_hub
import psutil
import torch

from dft.ranks import choose_deepspeed_accelerator, is_main_process, mute_deepspeed
from dft.report.run_record import ROOT, git_commit
from dft.training.measuring.tracker_setup import swanlab_has_login, wandb_has_login
from dft.version import __version__

GIB = 2**30
PACKAGES = (
    "torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "huggingface_hub", "numpy",
    "pyarrow", "triton", "peft", "flash-attn", "liger-kernel", "bitsandbytes", "vllm", "wandb", "swanlab",
    "tensorboard", "mlflow-skinny", "trackio",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "LOCAL_RANK",
    "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "RANK", "SWANLAB_MODE", "TOKENIZERS_PARALLELISM", "WANDB_MODE", "WORLD_SIZE",
)  # fmt: skip
"""Variables that are printed with their values. All others may hold secrets."""


def print_environment() -> None:
    """Print the description on the first rank."""
    if is_main_process():
        for line in environment_lines():
            print(line, flush=True)


def environment_lines() -> Iterator[str]:
    """Yield the lines that --env prints. The slow parts come last."""
    commit = git_commit(ROOT)
    yield f"dft         {__version__}" + (f", commit {commit}" if commit else ", installed package")
    yield f"python      {platform.python_version()}, {platform.platform()}"
    yield f"packages    {', '.join(describe_packages())}"
    yield from describe_devices()
    memory = psutil.virtual_memory()
    yield (
        f"cpu         {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, "
        f"{memory.total / GIB:.1f} GiB memory, {memory.available / GIB:.1f} GiB available"
    )
    yield f"disk        {', '.join(describe_disks())}"
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield f"variables   {' '.join(variables) or 'none set'}"
    yield f"compilers   {', '.join(describe_compilers())}"
    yield f"trackers    {', '.join(describe_logins())}"
    yield f"deepspeed   {describe_operators()}"


def describe_packages() -> Iterator[str]:
    """Yield the name and version of each package that a run may use."""
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"


def describe_devices() -> Iterator[str]:
    """Yield a line for each GPU, or one that says that there is none."""
    if not torch.accelerator.is_available():
        build = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
        )
        yield f"device      cpu only ({build})"
    elif not torch.cuda.is_available():
        device = torch.accelerator.current_accelerator()
        yield f"device      {torch.accelerator.device_count()} x {device}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        yield (
            f"device      cuda:{index} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / GIB:.1f} GiB, {free / GIB:.1f} GiB free, CUDA {torch.version.cuda}"
        )


def describe_disks() -> Iterator[str]:
    """Yield the free space of the folders that runs write to. Their paths may name the user."""
    folders = {
        "working folder": Path.cwd(),
        "home": Path.home(),
        "temporary files": Path(tempfile.gettempdir()),
        "shared memory": Path("/dev/shm"),
    }
    for name, folder in folders.items():
        if folder.is_dir():
            space = shutil.disk_usage(folder)
            yield f"{name} {space.free / GIB:.1f} of {space.total / GIB:.1f} GiB free"


def describe_compilers() -> Iterator[str]:
    """Yield the version of each compiler that DeepSpeed and torch.compile use."""
    for command in ("c++", "nvcc", "ninja"):
        if shutil.which(command) is None:
            yield f"{command} missing"
            continue
        printed = subprocess.run(
            [command, "--version"], check=False, capture_output=True, text=True, timeout=30
        )
        lines = [line for line in printed.stdout.splitlines() if any(letter.isdigit() for letter in line)]
        release = [line for line in lines if "release" in line]  # nvcc prints a copyright first
        yield f"{command} {(release or lines or ['without a version'])[0].strip()}"


def describe_logins() -> Iterator[str]:
    """Yield for each service whether a login is stored."""
    yield f"hugging face {'logged in' if huggingface_hub.get_token() else 'not logged in'}"
    for name, has_login in (("wandb", wandb_has_login), ("swanlab", swanlab_has_login)):
        if importlib.util.find_spec(name) is None:
            yield f"{name} not installed"
        else:
            yield f"{name} {'logged in' if has_login() else 'not logged in'}"


def describe_operators() -> str:
    """Return which operators of DeepSpeed are built, and which can be compiled when they are first used."""
    if not torch.accelerator.is_available():
        choose_deepspeed_accelerator("cpu")
    mute_deepspeed()
    # Slow to import.
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    states: dict[str, list[str]] = {"built": [], "can be compiled": [], "not possible": []}
    for name, builder in ALL_OPS.items():
        if name == "deepspeed_not_implemented":
            continue
        if installed_ops.get(name, False):
            states["built"].append(name)
        else:
            states["can be compiled" if builder.is_compatible(verbose=False) else "not possible"].append(name)
    parts = [f"{state}: {' '.join(names)}" for state, names in states.items() if names]
    return f"{get_accelerator().device_name()}; operators {'; '.join(parts)}"
