"""torchrun that ends as its first rank to fail did; its own code is 1 whatever that was.

    python scripts/torchrun.py --nproc_per_node 4 train_dft.py --bf16 True ...

So scripts/train.sh or a scheduler can tell 75, stopped with everything saved, from an error.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode  # below 0: the number of the signal that ended it
        code = code if code > 0 else 128 - code
        print(f"rank {rank} (process {failure.pid}) ended with code {code}", file=sys.stderr)
        sys.exit(code)
