"""The cache of prepared data: complete or absent, prepared once, and equal for any number of processes."""

import ast
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jinja2
import numpy as np
import pytest
from filelock import FileLock

import dft.data
from dft.arguments.data import DataArguments
from dft.data.preparing import cache as cache_module
from dft.data.preparing import digests as digests_module
from dft.data.preparing import encode as encode_module
from dft.data.preparing import prepare as prepare_module
from dft.data.preparing.cache import ABANDONED, DATA_REPORT, STAGING, check_private
from dft.data.preparing.cache_key import cache_key, source_files
from dft.data.preparing.digests import sampled_digest
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import prepare
from dft.data.reading.sources import resolve_sources
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.files import write_atomically
from tests.data.rows import column, conversation, numbered, write
from tests.data.templates.chat_templates import CHATML_LINES, with_template
from tests.launching import ROOT

FORK = multiprocessing.get_context("fork")


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("the data was tokenized again")


def test_second_preparation_reads_the_cache_even_if_files_are_renamed(encoder, tmp_path, monkeypatch):
    file, eval_file = write(tmp_path / "a.jsonl", numbered(9)), write(tmp_path / "e.jsonl", numbered(2, 50))
    options = PrepareOptions(max_length=64)
    first = prepare([file], [eval_file], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    monkeypatch.setattr(prepare_module, "encode_sources", forbidden)
    again = prepare([file], [eval_file], encoder, options, cache_dir=tmp_path / "cache", workers=4)
    assert again.report == first.report and again.path == first.path
    moved = Path(file).rename(tmp_path / "b.jsonl")
    renamed = prepare([str(moved)], [eval_file], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert renamed.path == first.path
    assert [entry["file"] for entry in renamed.report["train"]["files"]] == [str(moved)]
    assert [entry["file"] for entry in renamed.report["eval"]["files"]] == [eval_file]


def test_the_tokenizer_is_copied_once_before_workers_start_and_not_for_cached_data(encoder, tmp_path):
    file, options = write(tmp_path / "a.jsonl", numbered(9)), PrepareOptions(max_length=64)
    for copies in ({"backend", "text_tokenizer"}, set()):
        new = ChatEncoder(encoder.tokenizer)
        prepare([file], [], new, options, cache_dir=tmp_path / "cache", workers=1)
        assert vars(new).keys() & {"backend", "text_tokenizer"} == copies


def key_of(
    files: list[str], eval_files: list[str], encoder: ChatEncoder, options: PrepareOptions, cache: Path
) -> str:
    sources = {"train": resolve_sources(files, "--data_files"), "eval": resolve_sources(eval_files, "--eval")}
    contents = prepare_module.digests_of(sources, cache)
    return cache_key(sources, contents, encoder, options)


def test_code_in_sub_folders_of_dft_data_changes_the_key(encoder, tmp_path, monkeypatch):
    package = tmp_path / "dft" / "data"
    nested = package / "templates" / "spans.py"
    nested.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "labels.py").write_text("IGNORE_INDEX = -100\n")
    monkeypatch.setattr(dft.data, "__file__", str(package / "__init__.py"))
    file = tmp_path / "a.jsonl"
    file.touch()
    keys = []
    for rule in ("first", "second"):
        nested.write_text(f"RULE = {rule!r}\n")
        keys.append(key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path))
    (package.parent / "labels.py").write_text("IGNORE_INDEX = -1\n")
    keys.append(key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path))
    assert len(set(keys)) == 3


def test_every_module_of_dft_data_is_part_of_the_key():
    modules = {Path(module.__file__) for name, module in sys.modules.items() if name.startswith("dft.data")}
    assert modules <= set(source_files())


def test_every_module_that_dft_data_imports_is_part_of_the_key():
    covered = set(source_files())
    for path in (ROOT / "dft" / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dft."):
                module = ROOT.joinpath(*node.module.split("."))
                assert {module.with_suffix(".py"), module / "__init__.py"} & covered, node.module


def test_version_of_jinja_is_part_of_the_key(encoder, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.touch()
    before = key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path)
    monkeypatch.setattr(jinja2, "__version__", "0")
    assert key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path) != before


def test_every_input_of_the_preparation_changes_the_key(encoder, tokenizer_json, tmp_path):
    def key(
        text: str = "abc", name: str = "a.jsonl", with_encoder: ChatEncoder = encoder, **options: object
    ) -> str:
        (tmp_path / name).write_text(text)
        prepare_options = PrepareOptions(**{"max_length": 64, **options})
        return key_of([str(tmp_path / name)], [], with_encoder, prepare_options, tmp_path)

    other = with_template(tokenizer_json, CHATML_LINES, eos_token="<|im_end|>")
    with_token = with_template(tokenizer_json, CHATML_LINES, eos_token="<|im_end|>")
    with_token.add_tokens(["newword"])
    base = key()
    assert key(name="b.jsonl") == base
    keys = [
        base,
        key("abd"),
        key(name="a.json"),
        key(max_length=65),
        key(seed=1),
        key(validation_split_percentage=1.0),
        key(max_train_samples=5),
        key(max_eval_samples=5),
        key(truncation="left"),
        key(train_on_last_turn_only=True),
        key(data_weights=(0.5,)),
        key(dedup=True),
        key(on_bad_data="skip"),
        key(packing=True),
        key(with_encoder=ChatEncoder(encoder.tokenizer, variables={"enable_thinking": False})),
        key(with_encoder=ChatEncoder(other)),
        key(with_encoder=ChatEncoder(with_token)),
        key(with_encoder=ChatEncoder(other, [0])),
    ]
    assert len(set(keys)) == len(keys)
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    orders = [([a, b], []), ([a], [b]), ([a], [])]
    keys_of_orders = {key_of(*order, encoder, PrepareOptions(64), tmp_path) for order in orders}
    assert len(keys_of_orders) == len(orders)


def test_one_and_three_processes_prepare_identical_data(prepared, tmp_path):
    generator = random.Random(0)
    words = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "<|im_end|>", "é", "🙂"]
    answers = [" ".join(generator.choices(words, k=generator.randint(5, 150))) for _ in range(3000)]
    rows = [conversation(f"{number}", answer) for number, answer in enumerate(answers)]
    alone = prepared(rows, workers=1, validation_split_percentage=10, max_length=100)
    assert (tmp_path / "train.jsonl").stat().st_size > encode_module.SMALL
    columns = {split: column(alone.datasets[split], "labels") for split in ("train", "eval")}
    (tmp_path / "cache").rename(tmp_path / "earlier")
    together = prepared(rows, workers=3, validation_split_percentage=10, max_length=100)
    assert {split: column(together.datasets[split], "labels") for split in ("train", "eval")} == columns
    assert together.report == alone.report
    assert together.report["truncated_conversations"] > 0
    assert [together.report[split]["conversations"] for split in ("train", "eval")] == [2700, 300]
    assert not multiprocessing.active_children()
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_concurrent_preparations_tokenize_only_once(encoder, tmp_path, monkeypatch):
    file, log = write(tmp_path / "a.jsonl", numbered(20)), tmp_path / "log"
    real = prepare_module.encode_sources

    def slow(*arguments: object) -> object:
        with open(log, "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(prepare_module, "encode_sources", slow)

    def work(queue: multiprocessing.Queue) -> None:
        data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)
        queue.put((str(data.path), column(data.datasets["train"], "input_ids")))

    queue = FORK.Queue()
    processes = [FORK.Process(target=work, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2]
    assert log.read_text() == "xx"  # one process, for the training files and the (empty) evaluation files


def test_remains_of_a_killed_preparation_are_removed_and_its_workers_end(encoder, tmp_path, monkeypatch):
    file, pids = write(tmp_path / "a.jsonl", numbered(600)), tmp_path / "pids"
    pids.mkdir()
    parent = os.getpid()

    def stuck(*_: object) -> None:
        (pids / str(os.getpid())).touch()
        time.sleep(60)

    def work() -> None:
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=2)

    with monkeypatch.context() as patched:
        patched.setattr(encode_module, "SMALL", 0)
        patched.setattr(encode_module, "encode_chunk", stuck)
        process = FORK.Process(target=work)
        process.start()
        wait_for(lambda: len(list(pids.iterdir())) == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    workers = [int(path.name) for path in pids.iterdir()]
    assert parent not in workers and process.pid not in workers
    wait_for(lambda: not any(map(is_running, workers)))

    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1 and not (folders[0] / DATA_REPORT).exists()
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [data.path]
    assert len(data.datasets["train"]) == 600


def test_files_that_change_during_the_preparation_raise(encoder, tmp_path, monkeypatch):
    file, real = tmp_path / "a.jsonl", prepare_module.encode_sources
    write(file, numbered(20))

    def edited(*arguments: object) -> object:
        write(file, numbered(7))
        return real(*arguments)

    options = PrepareOptions(64)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "encode_sources", edited)
        with pytest.raises(UserError, match="the data files changed while they were being prepared"):
            prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    write(file, numbered(20))
    data = prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert len(data.datasets["train"]) == 20


INVALID_CONTENTS = ["", "{", "{}", "[]", "null", "3", '{"train.arrow": 5}', "\\x00garbage"]


@pytest.mark.parametrize(
    "damage", ["cut", "gone", "zeroed", "zeroed order", "other report", "folder", "file", *INVALID_CONTENTS]
)
def test_damaged_folder_is_prepared_again_with_a_note(encoder, tmp_path, damage, capfd):
    file, options = write(tmp_path / "a.jsonl", numbered(20)), PrepareOptions(64)
    first = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    before = column(first.datasets["train"], "labels")
    store, order, contents = (
        first.path / name for name in ("train.arrow", "train.order.npy", "contents.json")
    )
    report = first.path / DATA_REPORT
    if damage == "cut":
        os.truncate(store, store.stat().st_size // 2)
    elif damage == "gone":
        store.unlink()
    elif damage == "zeroed":
        store.write_bytes(bytes(store.stat().st_size))
    elif damage == "zeroed order":
        order.write_bytes(bytes(order.stat().st_size))
    elif damage == "other report":
        report.write_text(report.read_text().replace('"conversations_read": 20', '"conversations_read": 21'))
    elif damage == "folder":
        contents.unlink()
        contents.mkdir()
    elif damage == "file":
        shutil.rmtree(first.path)
        first.path.write_text("a file")
    else:
        contents.write_text(damage)
    del first
    capfd.readouterr()
    again = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert column(again.datasets["train"], "labels") == before
    assert capfd.readouterr().err == f"note        {again.path} is damaged and will be prepared again\n"
    prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert capfd.readouterr().err == ""


def test_sampled_digest_detects_zeroed_ranges_and_truncation(tmp_path):
    file, size = tmp_path / "large", 1 << 25
    file.write_bytes(np.random.default_rng(0).bytes(size))
    digest = sampled_digest(file)
    assert sampled_digest(file) == digest
    stretch = size // (digests_module.SAMPLES - 1)
    for start in (0, 12_345_678, size - stretch):
        with open(file, "r+b") as stream:
            stream.seek(start)
            original = stream.read(stretch)
            stream.seek(start)
            stream.write(bytes(stretch))
            stream.flush()
            assert sampled_digest(file) != digest
            stream.seek(start)
            stream.write(original)
    assert sampled_digest(file) == digest
    for cut in (size - 1, size - stretch):
        os.truncate(file, cut)
        assert sampled_digest(file) != digest


def test_folder_is_flushed_to_disk_before_it_gets_its_final_name(encoder, tmp_path, monkeypatch):
    file, cache, flushed = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache", []
    real = prepare_module.flush_to_disk

    def flush(path: Path) -> None:
        final_names = [entry.name for entry in cache.iterdir() if entry.is_dir() and "." not in entry.name]
        flushed.append((path.name, bool(final_names)))
        real(path)

    for module in (cache_module, prepare_module):
        monkeypatch.setattr(module, "flush_to_disk", flush)
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert [is_final for _, is_final in flushed] == [False] * (len(flushed) - 1) + [True]
    assert {path.name for path in data.path.iterdir()} < {name for name, _ in flushed}
    assert flushed[-2][0].startswith(data.path.name) and flushed[-1][0] == "cache"


def test_lock_path_that_is_a_folder_raises(encoder, tmp_path):
    file, cache = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache"
    key = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1).path
    shutil.rmtree(key)
    Path(f"{key}.lock").unlink()
    Path(f"{key}.lock").mkdir()
    with pytest.raises(UserError, match=rf"{key.name}.lock is a folder where a file belongs; remove it"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)


def test_file_that_vanishes_while_a_folder_is_checked_does_not_end_the_check(tmp_path, monkeypatch):
    folder, real = tmp_path / "digests", Path.iterdir
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([*real(path), path / "vanished"]))
    with pytest.raises(UserError, match="can be written by other users"):
        check_private(folder, tmp_path)
    folder.chmod(0o700)
    check_private(folder, tmp_path)


def full_after(budget: int) -> Callable[..., object]:
    """Return a replacement for `Path.write_bytes` on a disk with `budget` bytes left."""
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        real(path, bytes(data)[:budget])
        if len(data) > budget:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    return write_bytes


def test_full_disk_raises_and_leaves_no_data(encoder, tmp_path, monkeypatch):
    file, cache = write(tmp_path / "a.jsonl", numbered(20)), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_after(100))
        with pytest.raises(
            UserError, match=r"no space left .* after [\d,]+ bytes of prepared data"
        ) as raised:
            prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert f"--data_cache_dir {cache}: " in str(raised.value) and "another disk" in str(raised.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert len(data.datasets["train"]) == 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_report_that_cannot_be_written_raises_and_keeps_the_earlier_one(
    prepared, tmp_path, monkeypatch, code
):
    data = prepared([*numbered(3), {"messages": 1}], on_bad_data="skip")
    output = tmp_path / "out"
    data.write_report(output)
    earlier = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sorted(earlier) == [DATA_REPORT, "rejected.jsonl"]

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=rf"--output_dir {output}: .*{output}/rejected.jsonl") as raised:
        data.write_report(output)
    assert ("bytes are free" in str(raised.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == earlier
    with pytest.raises(UserError, match=f"--output_dir {output}/{DATA_REPORT}: is not a folder"):
        data.write_report(output / DATA_REPORT)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_prepared_data_is_used_from_a_cache_that_cannot_be_written(encoder, tmp_path, monkeypatch, code):
    file, options = write(tmp_path / "a.jsonl", numbered(5)), PrepareOptions(64)
    first = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    monkeypatch.setattr(digests_module, "MIN_AGE", -1.0)
    monkeypatch.setattr(prepare_module, "encode_sources", forbidden)

    def refused(path: Path, _: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(digests_module, "write_atomically", refused)
    again = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert again.path == first.path and not (tmp_path / "cache" / "digests").exists()


def test_abandoned_folders_of_other_keys_are_removed_unless_locked_or_recent(encoder, tmp_path):
    file, cache = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache"
    old = time.time() - 2 * ABANDONED

    def folder(name: str, changed: float) -> Path:
        path = cache / name
        path.mkdir(parents=True)
        (path / "train.arrow").write_bytes(b"x")
        for changed_path in (path / "train.arrow", path):
            os.utime(changed_path, (changed, changed))
        return path

    abandoned, locked, recent = (folder(f"{letter * 32}.ab_cd012", old) for letter in "abc")
    os.utime(recent / "train.arrow")
    others = [folder(name, old) for name in ("d" * 32, "my.data", f"{'e' * 32}.backup_of_mine")]
    with FileLock(cache / f"{'b' * 32}.lock"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert not abandoned.exists()
    assert locked.exists() and recent.exists() and all(path.exists() for path in others)


@pytest.mark.parametrize("value", [None, "", "relative", "/somewhere"])
def test_cache_folder_of_the_environment_is_used_if_it_is_absolute(monkeypatch, value):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    expected = "/somewhere/dft" if value == "/somewhere" else "~/.cache/dft"
    assert DataArguments(data_files=[]).data_cache_dir == expected


def test_file_is_written_completely_or_stays_unchanged(tmp_path):
    def failing() -> object:
        yield "half"
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "a", ["one", "two"])
    with pytest.raises(OSError) as raised:
        write_atomically(tmp_path / "a", failing())
    assert raised.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "onetwo"


@pytest.mark.parametrize("again_after", [None, 0.0, 0.05])
def test_ctrl_c_ends_a_preparation_at_once_with_one_line(tokenizer_folder, tmp_path, again_after):
    file, pids = write(tmp_path / "a.jsonl", numbered(600)), tmp_path / "pids"
    pids.mkdir()
    program = """
import os, runpy, signal, sys, time
from pathlib import Path
from dft.data.preparing import encode

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in background jobs

def stuck(*_):
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(600)

encode.SMALL, encode.encode_chunk = 0, stuck
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    arguments = ["--model_name_or_path", str(tokenizer_folder), "--data_files", file]
    arguments += ["--data_cache_dir", str(tmp_path / "cache"), "--preprocessing_num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT / "scripts" / "show_data.py"), *arguments],
        env={**os.environ, "PIDS": str(pids), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(pids.iterdir())) == 2, seconds=60)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, which signals the workers as well
    if again_after is not None:
        time.sleep(again_after)
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # the preparation itself would never end
    # A shell reports both as 130. A second Ctrl-C may arrive when the message is already printed.
    assert process.returncode in ((130,) if again_after is None else (130, -signal.SIGINT))
    assert errors.splitlines()[-1:] == ["interrupted"], errors
    assert errors.count("interrupted") == 1 and "Traceback" not in errors
    wait_for(lambda: not any(is_running(int(path.name)) for path in pids.iterdir()), seconds=30)
    if again_after is None:
        assert not [path for path in (tmp_path / "cache").iterdir() if STAGING.fullmatch(path.name)]


def test_error_in_a_worker_keeps_its_traceback(prepared, monkeypatch):
    def failing(*_: object) -> None:
        raise KeyError("of the worker")

    monkeypatch.setattr(encode_module, "SMALL", 0)
    monkeypatch.setattr(encode_module, "encode_chunk", failing)
    with pytest.raises(KeyError, match="of the worker") as raised:
        prepared(numbered(600), workers=2)
    assert "in failing" in str(raised.value.__cause__) and not multiprocessing.active_children()


def test_killed_worker_raises_an_error_with_a_remedy(prepared, tmp_path, monkeypatch):
    parent = os.getpid()

    def killed(*_: object) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode_module, "SMALL", 0)
    monkeypatch.setattr(encode_module, "encode_chunk", killed)
    with pytest.raises(UserError, match=r"lower --preprocessing_num_workers \(now 2\)"):
        prepared(numbered(600), workers=2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not multiprocessing.active_children()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"condition not met within {seconds} seconds"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process is running; zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
