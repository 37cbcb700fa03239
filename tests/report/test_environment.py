"""The output of --env: what a bug report needs, and no secrets."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from dft.version import __version__
from tests.launching import ROOT

SECRETS = ("hf_topsecret", "wandbsecret0123456789", "swanlabsecret", "environmentsecret", "netrcsecret" * 4)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """The output of `train_dft.py --env` with tokens in the environment and in wandb's netrc."""
    home = tmp_path_factory.mktemp("jane_doe")
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {SECRETS[4]}\n")
    (home / ".netrc").chmod(0o600)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SWANLAB_"))},
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": SECRETS[0],
        "AWS_SECRET_ACCESS_KEY": SECRETS[1],
        "SWANLAB_API_KEY": SECRETS[2],
        "https_proxy": f"http://user:{SECRETS[3]}@proxy:1",
        "NCCL_DEBUG": "WARN",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(ROOT / "train_dft.py"), "--env"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=True, timeout=240)
    return done.stdout + done.stderr


def test_versions_devices_disks_operators_and_trackers_are_printed(printed):
    assert f"dft         {__version__}, commit " in printed
    for package in ("torch", "transformers", "deepspeed"):
        assert f"{package} {version(package)}" in printed
    assert "NCCL_DEBUG=WARN" in printed and "device      cpu only" in printed
    assert "disk        working folder " in printed and "cpu; operators " in printed
    assert "trackers    hugging face logged in, wandb logged in, swanlab logged in" in printed


def test_no_token_and_no_path_is_printed(printed):
    assert [secret for secret in SECRETS if secret in printed] == []
    assert "jane_doe" not in printed
