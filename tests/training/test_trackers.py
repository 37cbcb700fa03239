"""A tracker without a login is set offline, with a note; one with a login or a mode is left alone."""

import os

import pytest

from dft.training.trackers import go_offline_without_login

HOST = "machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n"


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A home directory without a login, and no variable of a tracker."""
    for name in (
        "SWANLAB_MODE",
        "SWANLAB_API_KEY",
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(tracker: str) -> str | None:
    return os.environ.get(f"{tracker.upper()}_MODE")


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_without_a_login_it_goes_offline(nobody, tracker):
    (note,) = go_offline_without_login([tracker])
    assert note.startswith(f"{tracker}: no login") and mode(tracker) == "offline"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_a_mode_is_left_alone(nobody, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "disabled")
    assert go_offline_without_login([tracker]) == [] and mode(tracker) == "disabled"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_a_key_in_the_environment_is_a_login(nobody, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_API_KEY", "0" * 40)
    assert go_offline_without_login([tracker]) == [] and mode(tracker) is None


def test_a_wandb_login_on_disk_is_found(nobody):
    (nobody / ".netrc").write_text(HOST)
    (nobody / ".netrc").chmod(0o600)
    assert go_offline_without_login(["wandb"]) == [] and mode("wandb") is None


def test_a_tracker_that_is_not_asked_for_is_not_touched(nobody):
    assert go_offline_without_login(["tensorboard"]) == []
    assert mode("swanlab") is None and mode("wandb") is None
