"""torchrun that exits with the code of the first rank that failed; torchrun itself always exits with 1.

    python scripts/torchrun.py --nproc_per_node 4 train_dft.py --bf16 True ...

This lets scripts/train.sh distinguish 75 (stopped with everything saved) from an error. It signals the ranks
directly: a launcher that is signalled itself gives them only half a minute, and exits with the signal's
number.

Under nohup, a run goes on when the terminal closes. torchrun itself would end the ranks.
"""

import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        arguments = ["--signals_to_handle", "SIGTERM,SIGINT,SIGQUIT", *arguments]
    try:
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode  # below 0: the number of the signal that ended it
        code = code if code > 0 else 128 - code
        print(f"rank {rank} (process {failure.pid}) ended with code {code}", file=sys.stderr)
        sys.exit(code)
    except DistNetworkError as error:
        print(
            f"error: {' '.join(str(error).split())}; if another run uses the port, give this one another: "
            "--master_port N",
            file=sys.stderr,
        )
        sys.exit(1)
    except SignalException as stopped:
        print(f"the launcher was stopped by {stopped.sigval.name}, and has ended its ranks", file=sys.stderr)
        sys.exit(128 + stopped.sigval)
