"""Prepared data is whole or not there, made once, and the same however many processes make it."""

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
from dft.data.preparing.cache import ABANDONED, REPORT, STAGING
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
    raise AssertionError("tokenized again")


def test_a_second_preparation_reads_the_cache_whatever_the_files_are_called(encoder, tmp_path, monkeypatch):
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


def key_of(
    files: list[str], eval_files: list[str], encoder: ChatEncoder, options: PrepareOptions, cache: Path
) -> str:
    sources = {"train": resolve_sources(files, "--data_files"), "eval": resolve_sources(eval_files, "--eval")}
    contents = prepare_module.contents_of(sources, cache)
    return prepare_module.cache_key(sources, contents, encoder, options)


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
    assert modules <= set(prepare_module.source_files())


def test_the_version_of_jinja_is_part_of_the_key(encoder, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.touch()
    before = key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path)
    monkeypatch.setattr(jinja2, "__version__", "0")
    assert key_of([str(file)], [], encoder, PrepareOptions(64), tmp_path) != before


def test_everything_that_shapes_the_data_changes_the_key(encoder, tokenizer_json, tmp_path):
    def key(text: str = "abc", name: str = "a.jsonl", using: ChatEncoder = encoder, **options: object) -> str:
        (tmp_path / name).write_text(text)
        chosen = PrepareOptions(**{"max_length": 64, **options})
        return key_of([str(tmp_path / name)], [], using, chosen, tmp_path)

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
        key(using=ChatEncoder(encoder.tokenizer, variables={"enable_thinking": False})),
        key(using=ChatEncoder(other)),
        key(using=ChatEncoder(with_token)),
        key(using=ChatEncoder(other, [0])),
    ]
    assert len(set(keys)) == len(keys)
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    orders = [([a, b], []), ([a], [b]), ([a], [])]
    made = {key_of(*order, encoder, PrepareOptions(64), tmp_path) for order in orders}
    assert len(made) == len(orders)


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


def test_processes_that_prepare_at_once_tokenize_once(encoder, tmp_path, monkeypatch):
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
    assert log.read_text() == "xx"  # one of them, for training files and for (no) evaluation files


def test_what_a_killed_preparation_left_is_removed_and_its_workers_end(encoder, tmp_path, monkeypatch):
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
    workers = [int(one.name) for one in pids.iterdir()]
    assert parent not in workers and process.pid not in workers
    wait_for(lambda: not any(map(is_running, workers)))

    folders = [one for one in (tmp_path / "cache").iterdir() if one.is_dir()]
    assert len(folders) == 1 and not (folders[0] / REPORT).exists()
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=tmp_path / "cache", workers=1)
    assert [one for one in (tmp_path / "cache").iterdir() if one.is_dir()] == [data.path]
    assert len(data.datasets["train"]) == 600


def test_files_that_change_while_they_are_prepared_are_refused(encoder, tmp_path, monkeypatch):
    file, real = tmp_path / "a.jsonl", prepare_module.encode_sources
    write(file, numbered(20))

    def edited(*arguments: object) -> object:
        write(file, numbered(7))
        return real(*arguments)

    options = PrepareOptions(64)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "encode_sources", edited)
        with pytest.raises(UserError, match="the data files changed while they were prepared"):
            prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    write(file, numbered(20))
    data = prepare([str(file)], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert len(data.datasets["train"]) == 20


ALIEN = ["", "{", "{}", "[]", "null", "3", '{"train.arrow": 5}', "\\x00garbage"]


@pytest.mark.parametrize(
    "damage", ["cut", "gone", "zeroed", "zeroed order", "other report", "folder", "file", *ALIEN]
)
def test_a_damaged_folder_is_prepared_anew_and_this_is_told(encoder, tmp_path, damage, capfd):
    file, options = write(tmp_path / "a.jsonl", numbered(20)), PrepareOptions(64)
    first = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    before = column(first.datasets["train"], "labels")
    store, order, contents = (
        first.path / name for name in ("train.arrow", "train.order.npy", "contents.json")
    )
    report = first.path / REPORT
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
    assert capfd.readouterr().err == f"note        {again.path} is damaged and prepared anew\n"
    prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert capfd.readouterr().err == ""


def test_a_stretch_of_zeros_in_a_large_file_is_seen(tmp_path):
    file, size = tmp_path / "large", 1 << 25
    file.write_bytes(np.random.default_rng(0).bytes(size))
    whole = sampled_digest(file)
    assert sampled_digest(file) == whole
    stretch = size // (digests_module.SAMPLES - 1)
    for start in (0, 12_345_678, size - stretch):
        with open(file, "r+b") as stream:
            stream.seek(start)
            kept = stream.read(stretch)
            stream.seek(start)
            stream.write(bytes(stretch))
            stream.flush()
            assert sampled_digest(file) != whole
            stream.seek(start)
            stream.write(kept)
    assert sampled_digest(file) == whole
    for cut in (size - 1, size - stretch):
        os.truncate(file, cut)
        assert sampled_digest(file) != whole


def test_all_of_a_folder_is_on_the_disk_before_it_gets_its_name(encoder, tmp_path, monkeypatch):
    file, cache, flushed = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache", []
    real = prepare_module.flush_to_disk

    def flush(path: Path) -> None:
        named = [one.name for one in cache.iterdir() if one.is_dir() and "." not in one.name]
        flushed.append((path.name, bool(named)))
        real(path)

    for module in (cache_module, prepare_module):
        monkeypatch.setattr(module, "flush_to_disk", flush)
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert [named for _, named in flushed] == [False] * (len(flushed) - 1) + [True]
    assert {one.name for one in data.path.iterdir()} < {name for name, _ in flushed}
    assert flushed[-2][0].startswith(data.path.name) and flushed[-1][0] == "cache"


def test_a_lock_that_is_a_folder_is_one_error(encoder, tmp_path):
    file, cache = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache"
    key = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1).path
    shutil.rmtree(key)
    Path(f"{key}.lock").unlink()
    Path(f"{key}.lock").mkdir()
    with pytest.raises(UserError, match=rf"{key.name}.lock is a folder where a file belongs; remove it"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)


def full_after(budget: int) -> Callable[..., object]:
    """A `Path.write_bytes` of a disk that has that many bytes left."""
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        real(path, bytes(data)[:budget])
        if len(data) > budget:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    return write_bytes


def test_a_disk_that_is_full_is_one_error_and_leaves_nothing(encoder, tmp_path, monkeypatch):
    file, cache = write(tmp_path / "a.jsonl", numbered(20)), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_after(100))
        with pytest.raises(UserError, match=r"no space left .* after [\d,]+ bytes of prepared data") as told:
            prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert f"--data_cache_dir {cache}: " in str(told.value) and "another disk" in str(told.value)
    assert not [one for one in cache.iterdir() if one.is_dir()]
    data = prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert len(data.datasets["train"]) == 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_report_that_cannot_be_written_is_one_error_and_the_earlier_one_stays(
    prepared, tmp_path, monkeypatch, code
):
    data = prepared([*numbered(3), {"messages": 1}], on_bad_data="skip")
    output = tmp_path / "out"
    data.write_report(output)
    earlier = {one.name: one.read_bytes() for one in output.iterdir()}
    assert sorted(earlier) == [REPORT, "rejected.jsonl"]

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=rf"--output_dir {output}: .*{output}/rejected.jsonl") as told:
        data.write_report(output)
    assert ("bytes are free" in str(told.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert {one.name: one.read_bytes() for one in output.iterdir()} == earlier
    with pytest.raises(UserError, match=f"--output_dir {output}/{REPORT}: is not a folder"):
        data.write_report(output / REPORT)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_prepared_data_in_a_folder_that_takes_no_note_is_used(encoder, tmp_path, monkeypatch, code):
    file, options = write(tmp_path / "a.jsonl", numbered(5)), PrepareOptions(64)
    first = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    monkeypatch.setattr(digests_module, "SETTLED", -1.0)
    monkeypatch.setattr(prepare_module, "encode_sources", forbidden)

    def refused(path: Path, _: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(digests_module, "write_atomically", refused)
    again = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert again.path == first.path and not (tmp_path / "cache" / "digests").exists()


def test_folders_of_killed_runs_with_other_data_are_removed_once_nobody_fills_them(encoder, tmp_path):
    file, cache = write(tmp_path / "a.jsonl", numbered(5)), tmp_path / "cache"
    old = time.time() - 2 * ABANDONED

    def folder(name: str, changed: float) -> Path:
        made = cache / name
        made.mkdir(parents=True)
        (made / "train.arrow").write_bytes(b"x")
        for one in (made / "train.arrow", made):
            os.utime(one, (changed, changed))
        return made

    abandoned, locked, fresh = (folder(f"{letter * 32}.ab_cd012", old) for letter in "abc")
    written_lately = fresh / "train.arrow"
    os.utime(written_lately)
    others = [folder(name, old) for name in ("d" * 32, "my.data", f"{'e' * 32}.backup_of_mine")]
    with FileLock(cache / f"{'b' * 32}.lock"):
        prepare([file], [], encoder, PrepareOptions(64), cache_dir=cache, workers=1)
    assert not abandoned.exists()
    assert locked.exists() and fresh.exists() and all(one.exists() for one in others)


@pytest.mark.parametrize("given", [None, "", "relative", "/somewhere"])
def test_a_cache_folder_of_the_environment_counts_if_it_is_absolute(monkeypatch, given):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    expected = "/somewhere/dft" if given == "/somewhere" else "~/.cache/dft"
    assert DataArguments(data_files=[]).data_cache_dir == expected


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    def failing() -> object:
        yield "half"
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "a", ["one", "two"])
    with pytest.raises(OSError) as told:
        write_atomically(tmp_path / "a", failing())
    assert told.value.filename == str(tmp_path / "a")
    assert [one.name for one in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "onetwo"


@pytest.mark.parametrize("again_after", [None, 0.0, 0.05])
def test_ctrl_c_ends_a_preparation_at_once_with_one_line(tokenizer_folder, tmp_path, again_after):
    file, pids = write(tmp_path / "a.jsonl", numbered(600)), tmp_path / "pids"
    pids.mkdir()
    program = """
import os, runpy, signal, sys, time
from pathlib import Path
from dft.data import encode

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are deaf to it

def stuck(*_):
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(60)

encode.SMALL, encode.encode_chunk = 0, stuck
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    words = ["--model_name_or_path", str(tokenizer_folder), "--data_files", file]
    words += ["--data_cache_dir", str(tmp_path / "cache"), "--preprocessing_num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT / "scripts" / "show_data.py"), *words],
        env={**os.environ, "PIDS": str(pids), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(pids.iterdir())) == 2, seconds=60)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    if again_after is not None:
        time.sleep(again_after)
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 6, "half a second if the machine has nothing else to do"
    # A shell calls both 130. A second Ctrl-C may meet the interpreter when it has said what it had to say.
    assert process.returncode in ((130,) if again_after is None else (130, -signal.SIGINT))
    assert errors.splitlines()[-1:] == ["interrupted"], errors
    assert errors.count("interrupted") == 1 and "Traceback" not in errors
    wait_for(lambda: not any(is_running(int(one.name)) for one in pids.iterdir()), seconds=2)
    if again_after is None:
        assert not [one for one in (tmp_path / "cache").iterdir() if STAGING.fullmatch(one.name)]


def test_an_error_in_a_worker_keeps_the_lines_it_came_from(prepared, monkeypatch):
    def failing(*_: object) -> None:
        raise KeyError("of the worker")

    monkeypatch.setattr(encode_module, "SMALL", 0)
    monkeypatch.setattr(encode_module, "encode_chunk", failing)
    with pytest.raises(KeyError, match="of the worker") as told:
        prepared(numbered(600), workers=2)
    assert "in failing" in str(told.value.__cause__) and not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_told_with_a_remedy(prepared, tmp_path, monkeypatch):
    parent = os.getpid()

    def killed(*_: object) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode_module, "SMALL", 0)
    monkeypatch.setattr(encode_module, "encode_chunk", killed)
    with pytest.raises(UserError, match=r"lower --preprocessing_num_workers \(now 2\)"):
        prepared(numbered(600), workers=2)
    assert not [one for one in (tmp_path / "cache").iterdir() if one.is_dir()]
    assert not multiprocessing.active_children()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
