"""Count how often a training step waits for the device, and where.

    python scripts/bench/bench_waits.py 2>/dev/null
    python scripts/bench/bench_waits.py --ranks 2 2>/dev/null    # under DDP, as rank 0 counts them

Steps of two micro-batches with `--optim adamw_torch_fused`, the default, between two log lines.

On a GPU, PyTorch reports each wait (torch.cuda.set_sync_debug_mode). On a CPU, operations are counted that
would wait if the tensors were on a GPU: reading a number or a condition, copying to the host, and operations
whose result has a size that depends on values. Copies of batches to a GPU can only be seen on a GPU.

The gradient norm of a step that was skipped on the device, or might have been, is read during the next step
(`dft.training.measuring.device_skip`), which waits for work that is done by then; it is counted as late. So
is the exchange between several ranks of whether to stop (`dft.training.parallel.stopping`).
"""

import argparse
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainingArguments

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft import DFTTrainer
from dft.ranks import world_size
from dft.training import host_copy
from dft.training.measuring import device_skip
from dft.training.parallel import stopping
from dft.training.parallel.stopping import StopRequest
from dft.training.run_options import RunOptions

ON_GPU = torch.cuda.is_available()
STEPS = 8
OPERATORS = frozenset({
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave", "aten::bincount",
})  # fmt: skip
"""Operators that wait for a GPU."""
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
"""Operators that wait for a GPU if an index is a condition."""
METHODS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu})
"""Methods that copy a tensor to the host without such an operator, if it is on a CPU."""
OF_THE_COUNTING = ("torch/utils/_python_dispatch", "torch/_dynamo/", "torch/_tensor.py", "torch/_compile.py")
"""Code of torch between an operator and its place in the code."""
ON_HOST = {
    "dft/data/batches": None,
    "torch/utils/data": None,
    "torch/optim/optimizer.py": ("_get_value",),  # step counters are on the host unless the update is fused
    "dft/loss/rows.py": ("_expectation", "_first_largest"),
    "dft/loss/products.py": ("scaled",),
    "dft/training/attention/sequences.py": ("sequence_attention", "sequence_attention_backward"),
}
"""Code that runs on the host, or only if the device is a CPU: path, and functions (None: all)."""

DDP_BACKWARD = "torch/autograd/graph.py"
"""Python code from which DDP, in C++, reads on the host which parameters were used."""


class HostWaits:
    """Waits for the device, by their place in the code.

    Attributes:
        places: number of waits by `file:line`, since the last call of `take`.
        late: number of flags that were read during the step after their own.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.late = 0

    def add(self) -> None:
        """Count a wait at the current place, unless only a CPU would run this code."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename != __file__ and not any(path in frame.filename for path in OF_THE_COUNTING)
        ]
        for frame in frames:
            for path, functions in ON_HOST.items():
                if path in frame.filename and (functions is None or frame.name in functions):
                    return
        if frames[-1].filename.endswith(DDP_BACKWARD):
            return
        if frames[-1].filename == host_copy.__file__ and frames[-1].name == "read":
            self.late += 1
        else:
            self.add_at(frames[-1].filename, frames[-1].lineno)

    def add_at(self, file: str, line: int | None) -> None:
        """Count a wait."""
        self.places[f"{'/'.join(Path(file).parts[-2:])}:{line}"] += 1

    def take(self) -> tuple[Counter[str], int]:
        """Return the counts and start again."""
        counts = self.places, self.late
        self.places, self.late = Counter(), 0
        return counts

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count waits within the context."""
        if not ON_GPU:
            with OperatorWaits(self), MethodWaits(self):
                yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            show: Callable[..., None] = warnings.showwarning

            def count(message: Any, category: Any, file: str, line: int, *more: Any, **options: Any) -> None:
                if "synchronizing CUDA operation" in str(message):
                    self.add_at(file, line)
                else:
                    show(message, category, file, line, *more, **options)

            with patch.object(warnings, "showwarning", count):
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    yield
                finally:
                    torch.cuda.set_sync_debug_mode("default")


class OperatorWaits(TorchDispatchMode):
    """Counts operators that would wait for a GPU."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name in OPERATORS or (name in INDEXING and _selects_by_condition(args[1])):
            self.waits.add()
        return function(*args, **(kwargs or {}))


def _selects_by_condition(indices: Any) -> bool:
    """Return whether one of the indices of a tensor is a condition for each of its entries."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class MethodWaits(TorchFunctionMode):
    """Counts methods of tensors that would wait for a GPU."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METHODS:
            self.waits.add()
        return function(*args, **(kwargs or {}))


class StepWaits(TrainerCallback):
    """Collects the waits of each step, from the end of one step to the end of the next.

    Attributes:
        steps: the counts of all steps, see `HostWaits.take`.
    """

    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits
        self.steps: list[tuple[Counter[str], int]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.waits.take())


def make_rows(packed: bool, ranks: int) -> list[dict[str, Any]]:
    """Create conversations of 4 to 9 tokens of which some are supervised, or rows of three of them."""
    rows: list[dict[str, Any]] = []
    for number in range(4 * STEPS * ranks):
        ids = [1 + (7 * number + 3 * place) % 90 for place in range(4 + number % 6)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    if not packed:
        return rows
    groups = [rows[start : start + 3] for start in range(len(rows) - 2)]
    return [
        {name: sum((row[name] for row in group), []) for name in ("input_ids", "labels")}
        | {"seq_lengths": [len(row["input_ids"]) for row in group]}
        for group in groups
    ]


def count_waits(
    attention: str = "varlen", packed: bool = False, logging_steps: int = 100, **flags: Any
) -> tuple[list[tuple[Counter[str], int]], DFTTrainer]:
    """Train a small model. Return the waits of each step (`HostWaits.take`), and the trainer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-waits-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=not ON_GPU, max_steps=STEPS, save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=logging_steps,
            logging_nan_inf_filter=False, accelerator_config={"non_blocking": ON_GPU}, report_to="none",
            **flags,
        )  # fmt: skip
        waits = HostWaits()
        steps = StepWaits(waits)
        model = Qwen3ForCausalLM(config)
        options = RunOptions(stop=StopRequest())
        rows = make_rows(packed, world_size())
        trainer = DFTTrainer(model, arguments, train_dataset=rows, callbacks=[steps], options=options)
        with waits.counting():
            trainer.train()
    return steps.steps, trainer


CASES: Mapping[str, dict[str, Any]] = {
    "varlen": {},
    "varlen, packed": {"packed": True},
    "varlen, checkpointing": {"gradient_checkpointing": True},
    "varlen, `--max_grad_norm 0`": {"max_grad_norm": 0.0},
    "varlen, `--optim adamw_torch`": {"optim": "adamw_torch"},
    "varlen, `--logging_steps 1`": {"logging_steps": 1},
    "sdpa": {"attention": "sdpa"},
    "sdpa, packed": {"attention": "sdpa", "packed": True},
}
"""Arguments of `count_waits` by description."""


def print_table(rank: int = 0, ranks: int = 1, port: int = 0) -> None:
    """Print the table as one of several ranks. Only rank 0 prints."""
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    devices = frozenset({"cuda"} if ON_GPU else {"cpu"})
    lines = ["| attention and flags | waits | late reads | where it waits |", "|---|---|---|---|"]
    for name, settings in CASES.items():
        with (
            patch.object(device_skip, "DEVICE_TYPES", devices),
            patch.object(stopping, "DEVICE_TYPES", devices),
            redirect_stdout(sys.stderr),
        ):
            steps, _ = count_waits(**settings)
        places, late = steps[STEPS // 2]
        where = ", ".join(f"{place} ({count})" for place, count in places.items())
        lines.append(f"| {name} | {places.total()} | {late} | {where} |")
    if rank == 0:
        print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="number of processes")
    ranks = parser.parse_args().ranks
    if ranks == 1:
        print_table()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(print_table, (ranks, port), ranks)


if __name__ == "__main__":
    main()
