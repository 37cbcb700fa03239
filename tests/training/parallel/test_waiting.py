"""Waiting for slow work on one rank."""

SCRIPT = """
import time
from datetime import timedelta
from accelerate import Accelerator, InitProcessGroupKwargs
from dft.ranks import exit_rank
from dft.training.parallel.waiting import wait_until

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=5))])
started, beats = time.monotonic(), []
seconds = 8 if accelerator.is_main_process else 0
wait_until(lambda: time.monotonic() - started > seconds, accelerator, lambda: beats.append(time.monotonic()))
gaps = [after - before for before, after in zip(beats, beats[1:])]
assert time.monotonic() - started > 7 and max(gaps) < 5, gaps
print(f"rank {accelerator.process_index} waited", flush=True)
exit_rank()  # without shutting down the interpreter, which sometimes aborts a rank
"""


def test_ranks_wait_longer_than_the_timeout_of_their_process_group(forks, tmp_path):
    """A barrier would fail after 5 seconds, and a watchdog without a beat for that long would end the run."""
    script = tmp_path / "wait.py"
    script.write_text(SCRIPT)
    codes, printed = forks.run([], 2, script)
    assert codes == [0, 0], printed
    assert all(f"rank {rank} waited" in printed for rank in (0, 1))
