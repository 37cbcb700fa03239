"""Features that do not work together are refused before the data is read. docs/compatibility.md has them."""

import pytest

from dft.errors import UserError
from tests.arguments.command import checked
from tests.combinations import refuses

SHARED = "sequence_parallel_size"
CASES = [
    ("not with FSDP", {SHARED: 2, "fsdp": True}, "with --fsdp is not supported; use --deepspeed zero3"),
    (
        "remove --torch_compile", {SHARED: 2, "torch_compile": True},
        "with --torch_compile True is not supported; remove one of them",
    ),
    (
        "packed rows need varlen", {SHARED: 2, "packing": True, "attn_implementation": "sdpa"},
        "use --attn_implementation varlen or --packing False",
    ),
    ("needs whole sequences", {SHARED: 2, "objective": "asft"}, "--objective asft needs whole sequences"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [pytest.param(flags, message, marks=refuses(error, flags, 2)) for error, flags, message in CASES],
)
def test_a_refused_combination_is_one_error(tmp_path, flags, message):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with pytest.raises(UserError) as error:
        checked(tmp_path, *words, "--plan", "True", "--plan_world_size", "2")
    assert message in str(error.value) and "\n" not in str(error.value)
