"""README, CONTRIBUTING, CHANGELOG and docs/: the links, flags, paths and messages that they name exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from dft.arguments.parser import Parser, default_flags
from dft.data.conversations.column_meanings import MEANINGS
from dft.data.conversations.conversation import parse_conversation
from dft.data.conversations.forms import FORMS
from dft.metrics import CONSOLE, metrics_named
from dft.training.measuring import console
from tests.launching import ROOT

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)]+)\)")
IMAGE = re.compile(r'!\[[^\]]*\]\(([^)]+)\)|<img src="([^"]+)"')
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PATH = re.compile(r"(?<![\w/.}-])(?:dft|docs|ds_config|scripts|tests)/[\w./-]*\w")

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "scripts/paper/README.md"]
)
MAX_README_BYTES = 12_000

FLAGS_OF_OTHER_PROGRAMS = {
    "--nproc_per_node", "--num_accelerators", "--num_gpus", "--hostfile",  # torchrun, deepspeed
    "--no-deps", "--module", "--build-arg", "--basetemp", "--signal", "--help",  # pip, docker, pytest, Slurm
    "--model_args", "--tasks", "--apply_chat_template",  # lm_eval
    "--include_path", "--output_path", "--device",  # lm_eval
    "--outfile", "--outtype", "--jinja", "--temp", "--repeat-penalty",  # llama.cpp
    "--generation-config", "--enable-lora", "--lora-modules", "--max-lora-rank", "--chat-template",  # vLLM
    "--id", "--backend-store-uri",  # wandb sync, mlflow ui
    "--tokenizer", "--merges",  # tests.data.templates.check_published
    "--enable_dft_loss", "--debug",  # ms-swift, axolotl
    "--no-index", "--find-links", "--compile-bytecode", "--sdist", "--python",  # pip, uv, build
    "--minerva",  # of scripts/paper/prepare.py, which makes one flag per benchmark
}  # fmt: skip


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", prose(text), re.MULTILINE)


def sections(text: str) -> list[str]:
    """Return the text under each heading."""
    return re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub derives: lower case, without punctuation, hyphens for spaces."""
    words = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.fixture(scope="module")
def both() -> tuple[str, str]:
    return text_of("README.md"), text_of("README.zh.md")


# ---- README.zh.md mirrors README.md ----


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_is_short(name):
    assert (ROOT / name).stat().st_size <= MAX_README_BYTES


def test_translation_has_the_same_headings(both):
    english, chinese = (headings(text) for text in both)
    levels = [[len(heading.split(" ")[0]) for heading in page] for page in (english, chinese)]
    assert levels[0] == levels[1], "a section is missing, or at another level"
    assert not set(english) & set(chinese), "a heading is not translated"
    assert all(re.search("[\u4e00-\u9fff]", heading) for heading in chinese)


def test_translation_has_the_same_code_blocks(both):
    english, chinese = (FENCE.findall(text) for text in both)
    assert english == chinese


def test_translation_has_the_same_tables_section_by_section(both):
    for heading, *texts in zip(headings(both[0]), *(sections(text)[1:] for text in both), strict=True):
        rows = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in texts]
        assert len(rows[0]) == len(rows[1]), heading
        for row, translated in zip(*rows, strict=True):
            cells = [re.sub(r"\\\||`[^`]*`", "", line).count("|") for line in (row, translated)]
            assert cells[0] == cells[1], f"{heading}: {row}"
            # Flags and names in the first column are the same.
            names = [re.findall(r"`--[^`]+`", line.split("|")[1]) for line in (row, translated)]
            assert names[0] == names[1], heading


def test_translation_names_the_same_flags_section_by_section(both):
    for heading, *texts in zip(headings(both[0]), *(sections(text)[1:] for text in both), strict=True):
        flags = [set(re.findall(r"--[a-z][a-z_]+", text)) for text in texts]
        assert flags[0] == flags[1], heading


def test_translation_has_the_same_numbers_in_tables(both):
    english, chinese = (re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", text) for text in both)
    assert sorted(english) == sorted(chinese)


def test_translation_has_the_same_formulas_pictures_and_links(both):
    for pattern in (r"^\$\$.*\$\$$", r"!\[[^\]]*\]\(([^)]+)\)", r'<img src="([^"]+)"'):
        english, chinese = (re.findall(pattern, text, re.MULTILINE) for text in both)
        assert english == chinese
    outside = [
        sorted(link for link in LINK.findall(prose(text)) if not link.startswith(("#", "README")))
        for text in both
    ]
    assert outside[0] == outside[1]


# ---- every page ----


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_picture_resolves(name):
    text, folder = text_of(name), (ROOT / name).parent
    pictures = [first or second for first, second in IMAGE.findall(text)]
    for link in LINK.findall(prose(text)) + pictures:
        if link.startswith("http"):
            continue
        file, _, place = link.partition("#")
        target = folder / file if file else ROOT / name
        assert target.exists(), link
        if place:
            anchors = {anchor(heading) for heading in headings(target.read_text(encoding="utf-8"))}
            assert place in anchors, link


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """The flags of train_dft.py, of all scripts, and of the other programs that the pages call."""
    own = {f"--{name}" for name in default_flags()}
    scripts = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("scripts/**/*.sh"), ROOT / "tests/conftest.py"]
    of_scripts = {
        flag for path in scripts for flag in FLAG.findall(path.read_text(encoding="utf-8")) if flag != "--"
    }
    return own | of_scripts | FLAGS_OF_OTHER_PROGRAMS


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_exists(name, flags):
    assert not set(FLAG.findall(text_of(name))) - flags


def training_commands() -> list[list[str]]:
    """Return the flags of every complete call of train_dft.py or scripts/train.sh in the pages."""
    blocks = [block for name in PAGES for block in re.findall(r"```bash\n(.*?)```", text_of(name), re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "$" not in line]
    calls = [re.search(r"train(?:_dft\.py|\.sh) (.*)", line) for line in lines]
    words = [shlex.split(call[1], comments=True) for call in calls if call]
    return [[word for word in flags if word not in ("...", "&", "--help")] for flags in words]


def test_every_training_command_can_be_parsed():
    commands = training_commands()
    assert len(commands) > 15
    for words in commands:
        _, unknown = Parser().parse_known_args(["--model_name_or_path", "M", "--data_files", "F", *words])
        assert not unknown, words


@pytest.mark.parametrize("name", PAGES)
def test_every_path_exists(name):
    paths = set(PATH.findall(text_of(name)))
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_tests_named_in_the_table_of_promises_exist():
    names = set(re.findall(r"`(test_\w+\.py)`", text_of("docs/reliability.md")))
    assert names
    assert not {name for name in names if not (ROOT / "tests/reliability" / name).exists()}


def test_the_index_lists_every_page():
    listed = set(LINK.findall(text_of("docs/README.md")))
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert pages <= listed


@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_opens_with_one_short_paragraph(name):
    """It says what the page answers; commands or sections follow."""
    title, opening = text_of(name).split("\n\n")[:2]
    assert title.startswith("# ") and "\n" not in title
    assert re.match(r"[A-Z<]", opening) and len(opening) <= 300


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "docs/training.md"])
def test_console_output_shown_has_the_current_columns(name):
    assert f"\n{console.heading(metrics_named(CONSOLE), 60)}\n" in text_of(name)


def test_rows_shown_in_the_data_page_are_accepted():
    text = text_of("docs/data.md")
    rows = [row for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) for row in block.splitlines()]
    conversations = [parse_conversation(row.encode()) for row in rows]
    supervised = [conversation.supervised.count(True) for conversation in conversations]
    assert supervised == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 1]
    assert conversations[-1].weights == (0.5, 0.5)
    assert all(conversation.messages[-1]["content"] == "4" for conversation in conversations)
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    for conversation in conversations[10:14]:
        assert conversation.messages[1]["tool_calls"][0]["function"] == call
    shown = {form.name for form in FORMS for row in rows if all(f'"{key}":' in row for key in form.keys)}
    assert shown == {form.name for form in FORMS}


def test_data_page_names_every_row_form_and_every_column_with_a_meaning():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text_of("docs/data.md"), re.MULTILINE)
    cells = dict(rows)
    for form in FORMS:
        assert all(f"`{key}`" in cells[form.name] for key in form.columns)
    for meaning in MEANINGS:
        assert ", ".join(f"`{column}`" for column in meaning.columns) in cells


# ---- messages that docs/troubleshooting.md quotes ----


def messages_of(path: Path) -> list[str]:
    """Return the string literals of a Python file, with `{}` for each interpolated value."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append(
                "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


FROM_LIBRARIES = {"DeepSpeedCPUAdam requires the cpu_adam op"}
PLACEHOLDERS = r"\b(?:N|P|HOST|FILE|LINE)\b|\.\.\."


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| (`[^|]*) \|", text_of("docs/troubleshooting.md"), re.MULTILINE)
    messages = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    return [quote for quote in messages if " " in quote and quote not in FROM_LIBRARIES]


def test_quoted_messages_exist_in_the_code():
    sources = [*ROOT.glob("dft/**/*.py"), ROOT / "train_dft.py"]
    code = "\n".join(text for path in sources for text in messages_of(path))
    # Every piece between two placeholders stands in one of the program's messages.
    pieces = [piece.strip(" :()") for quote in quoted_messages() for piece in re.split(PLACEHOLDERS, quote)]
    assert len(pieces) > 10
    assert not [piece for piece in pieces if piece not in code]
