"""Checks of the output directory before a run."""

import os

import pytest

from dft.errors import UserError
from tests.arguments.command import checked


def test_checkpoints_of_an_earlier_run_are_not_overwritten(tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds 1 checkpoint\(s\) of an earlier run"):
        checked(tmp_path)
    assert checked(tmp_path, "--overwrite_output_dir", "True").training.overwrite_output_dir


def test_a_file_as_output_directory_is_rejected(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        checked(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_directory_is_rejected(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        checked(tmp_path)
