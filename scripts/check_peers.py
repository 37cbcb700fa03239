"""Compare the DFT losses of LLaMA-Factory, ms-swift and Liger with ours, on random numbers (docs/peers.md).

    pip download --no-deps llamafactory==0.9.5 ms-swift==4.6.0
    for wheel in *.whl; do unzip -qo "$wheel" -d "${wheel%%-*}"; done
    python scripts/check_peers.py .

The functions of the first two are extracted from their source files, because the packages cannot be installed
together with our requirements. Liger, which also computes axolotl's loss, is in requirements-dev.txt.
"""

import argparse
import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TRITON_INTERPRET"] = "1"  # read when Liger is imported; its kernels then run on the CPU

from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

from dft import dft_loss

LLAMA_FACTORY = "llamafactory/llamafactory/train/trainer_utils.py"
SWIFT = "ms_swift/swift/trainers/utils.py"


def functions_of(path: Path, names: set[str]) -> dict[str, Any]:
    """Return some functions of a file without importing the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    namespace: dict[str, Any] = {"torch": torch, "F": F, "Optional": Optional}
    exec(compile(ast.Module(definitions, type_ignores=[]), str(path), "exec"), namespace)
    return namespace


def loss_and_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return a loss and its gradient on the logits."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.item(), leaf.grad


def compare(
    name: str,
    theirs: Callable[[torch.Tensor], torch.Tensor],
    ours: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
) -> None:
    """Print the losses of a peer and ours, and the differences of losses and gradients."""
    loss, gradient = loss_and_gradient(theirs, inputs)
    expected, expected_gradient = loss_and_gradient(ours, inputs)
    largest = (gradient - expected_gradient).abs().max()
    differences = f"{abs(loss - expected):.0e}, of gradients at most {largest:.0e}"
    print(f"{name}: {loss:.6f}, ours {expected:.6f}, difference {differences}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the DFT losses of peers with ours.")
    parser.add_argument("folder", type=Path, help="folder into which the wheels were unpacked")
    folder = parser.parse_args().folder
    factory = functions_of(folder / LLAMA_FACTORY, {"dft_loss_func", "_dft_cross_entropy"})["dft_loss_func"]
    swift = functions_of(folder / SWIFT, {"per_token_loss_func"})["per_token_loss_func"]

    torch.manual_seed(0)
    hidden, weight, labels = 0.4 * torch.randn(2, 7, 16), torch.randn(50, 16), torch.randint(50, (2, 7))
    logits = hidden @ weight.T
    labels[0, :3] = labels[1, 5:] = labels[:, 0] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).view(-1)
    count = (targets != -100).sum()

    def liger(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, x.shape[-1])
        return (
            liger_fused_linear_cross_entropy(rows, weight, targets, reduction="sum", use_token_scaling=True)
            / count
        )

    compare(
        "LLaMA-Factory",
        lambda x: factory({"logits": x}, labels, count),
        lambda x: dft_loss(x, labels)[0],
        logits,
    )
    compare(
        "ms-swift",
        lambda x: swift(SimpleNamespace(logits=x), labels, True).sum() / count,
        lambda x: dft_loss(x, labels)[0],
        logits,
    )
    compare("Liger", liger, lambda x: dft_loss(x @ weight.T, labels)[0], hidden)
    try:
        loss_and_gradient(lambda x: factory({"logits": x}, torch.full_like(labels, -100), count), logits)
    except RuntimeError as error:
        print(f"LLaMA-Factory without supervised tokens: {error}")


if __name__ == "__main__":
    main()
