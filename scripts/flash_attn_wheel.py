"""Print where flash-attn would publish a prebuilt wheel for this Python, torch and CUDA; it may not exist.

    python scripts/flash_attn_wheel.py 2.8.3.post1

The package index holds only the sources of flash-attn; its wheels, one for each combination, are files of its
GitHub releases. The source package can fetch them itself, but not on a machine without the CUDA toolkit, and
where there is no wheel it starts a build that takes an hour; so the wheel is requested directly.
"""

import platform
import sys

import torch

RELEASES = "https://github.com/Dao-AILab/flash-attention/releases/download"

if __name__ == "__main__":
    version = sys.argv[1]
    if torch.version.cuda is None:
        raise SystemExit(f"error: torch {torch.__version__} is built without CUDA")
    cuda = torch.version.cuda.split(".")[0]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    abi = str(torch.compiled_with_cxx11_abi()).upper()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    build = f"cu{cuda}torch{torch_version}cxx11abi{abi}"
    wheel = f"flash_attn-{version}+{build}-{python}-{python}-linux_{platform.machine()}.whl"
    print(f"{RELEASES}/v{version}/{wheel.replace('+', '%2B')}")
