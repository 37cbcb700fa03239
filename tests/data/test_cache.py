"""Prepared data is whole or not there, made once, and the same however many processes make it."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dft.data import encode as encode_module
from dft.data import prepare as prepare_module
from dft.data.chat import ChatEncoder
from dft.data.options import PrepareOptions
from dft.data.prepare import REPORT, prepare
from dft.data.sources import resolve_sources
from dft.errors import UserError
from tests.data.chat_templates import CHATML_LINES, with_template
from tests.data.rows import column, conversation, numbered, write

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


@pytest.mark.parametrize("damage", ["cut", "gone", "contents"])
def test_a_damaged_folder_is_prepared_anew(encoder, tmp_path, damage):
    file, options = write(tmp_path / "a.jsonl", numbered(20)), PrepareOptions(64)
    first = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    before = column(first.datasets["train"], "labels")
    store = first.path / "train.arrow"
    if damage == "cut":
        os.truncate(store, store.stat().st_size // 2)
    elif damage == "gone":
        store.unlink()
    else:
        (first.path / "contents.json").write_text("{")
    again = prepare([file], [], encoder, options, cache_dir=tmp_path / "cache", workers=1)
    assert column(again.datasets["train"], "labels") == before and again.path == first.path


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
