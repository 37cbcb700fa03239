"""Code in models, data files and chat templates is not run, and files of other users are not trusted."""

import json
import multiprocessing
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dft.arguments.parser import parse_arguments
from dft.data.preparing.cache import CONTENTS, file_entry
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.prepare import PreparedData, prepare
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.template import ChatTemplate
from dft.data.templates.tokenizer import load_tokenizer
from dft.errors import UserError
from dft.training.model.loading import load_model
from tests.launching import launch
from tests.reliability.spoiling import CHATML, LINE, Ground, Malicious, pickled, settings

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the model that the test may change."""
    return Ground(tmp_path, tiny).copy()


@pytest.fixture
def encoder(tiny) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(tiny))[0])


def load(folder: Path) -> None:
    """Load tokenizer and model with the default settings of a run."""
    words = ["--model_name_or_path", str(folder), "--data_files", "a", "--output_dir", str(folder / "out")]
    tokenizer, _ = load_tokenizer(str(folder))
    load_model(parse_arguments([*words, "--use_cpu", "True"]), tokenizer)


# ---- models ----


@pytest.mark.parametrize("is_known", [True, False], ids=["known-architecture", "unknown-architecture"])
def test_code_shipped_with_a_model_is_not_run(folder, tmp_path, is_known):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    kind = {} if is_known else {"model_type": "evil", "architectures": ["Evil"]}
    settings(
        "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, **kind
    )(folder)
    settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(folder)
    if is_known:
        load(folder)
    else:
        with pytest.raises(UserError, match="trust_remote_code"):
            load(folder)
    assert not marker.exists()


def test_code_shipped_with_a_tokenizer_is_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings("tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")(folder)
    settings("config.json", model_type="evil")(folder)
    with pytest.raises(UserError, match="contains custom code which must be executed"):
        load_tokenizer(str(folder))
    assert not marker.exists()


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    pickled(folder)
    with pytest.raises(UserError, match=r"only as a pickle \(pytorch_model.bin\).*save_pretrained\('NEW'\)"):
        load(folder)
    assert not (tmp_path / "unpickled").exists()


def test_pickled_weights_next_to_safetensors_are_not_loaded(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    pickled(folder)
    (folder / "model.safetensors").write_bytes(weights)
    load(folder)
    assert not (tmp_path / "unpickled").exists()


# ---- chat templates ----


def test_templates_are_rendered_in_the_sandbox():
    assert isinstance(ChatTemplate(CHATML, {}).compiled.jinja.environment, ImmutableSandboxedEnvironment)


def test_template_limits_do_not_apply_to_this_process(encoder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 300)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    prepared(encoder, tmp_path / "a.jsonl", tmp_path / "cache")
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before


# ---- data files ----


def prepared(encoder: ChatEncoder, file: Path, cache: Path, workers: int = 1) -> PreparedData:
    options = PrepareOptions(max_length=256, on_bad_data="skip")
    return prepare([str(file)], [], encoder, options, cache_dir=cache, workers=workers)


def opened_while(action: Callable[[], object], log: Path) -> str:
    """Record every path that a process and its children open or stat."""

    def watched() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hear(event: str, arguments: tuple[object, ...]) -> None:
            if event.startswith(("open", "os.", "shutil.", "socket.", "urllib.", "subprocess.")):
                os.write(handle, f"{event} {arguments!r}\n".encode(errors="replace"))

        sys.addaudithook(hear)
        action()

    process = multiprocessing.get_context("fork").Process(target=watched)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return log.read_text(errors="replace")


def test_paths_in_data_files_are_never_opened(tiny, tmp_path):
    canary = tmp_path / "canary"
    os.mkfifo(canary)  # opening it would block forever
    (tmp_path / "t.jinja").write_text("{{ messages[0].image }}{{ messages[0].content }}" + CHATML)
    encoder = ChatEncoder(load_tokenizer(str(tiny), chat_template=str(tmp_path / "t.jinja"))[0])
    url, path = f"file://{canary}", str(canary)
    contents = [
        path, url, [{"type": "text", "text": path}], [{"type": "image", "path": path}],
        [{"type": "image_url", "image_url": {"url": url}}], [{"type": "video", "video": url}], {"path": path},
    ]  # fmt: skip
    rows = [
        {
            "messages": [
                {"role": "user", "content": entry, "image": path},
                {"role": "assistant", "content": url},
            ],
            "images": [path],
            "path": path,
            "chat_template_kwargs": {"documents": [path], "include": path},
            "tools": [{"type": "function", "function": {"name": path, "parameters": {"$ref": url}}}],
        }
        for entry in contents
    ]
    rows += [{key: value for key, value in row.items() if key != "tools"} for row in rows]
    for row in [*rows]:  # rows with images are refused, so the others are tried without
        turns = [{key: value for key, value in turn.items() if key != "image"} for turn in row["messages"]]
        rows.append({**{key: value for key, value in row.items() if key != "images"}, "messages": turns})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = opened_while(
        lambda: prepared(encoder, tmp_path / "a.jsonl", tmp_path / "cache").write_report(tmp_path / "out"),
        tmp_path / "opened",
    )
    assert "a.jsonl" in opened and "canary" not in opened
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["train"]["conversations"] == 3 and report["rejected"] == 25


# ---- secrets ----

SECRETS = {
    "HF_TOKEN": "hf_SeCrEt000000000000000000000000000001", "HUGGING_FACE_HUB_TOKEN": "hf_SeCrEt2",
    "WANDB_API_KEY": "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7", "SWANLAB_API_KEY": "SeCrEt4swanlab",
    "OPENAI_API_KEY": "sk-SeCrEt5", "MLFLOW_TRACKING_PASSWORD": "SeCrEt6mlflow",
}  # fmt: skip
"""Secrets in environment variables."""
IN_FILE = "hf_SeCrEt7"


def test_a_token_on_the_command_line_is_rejected_and_not_printed(tmp_path):
    with pytest.raises(UserError, match="every user of this machine can read a token") as caught:
        parse_arguments(["--model_name_or_path", "m", "--data_files", "a", "--hub-token", IN_FILE])
    assert IN_FILE not in str(caught.value)


def test_no_secret_is_written_or_printed(tiny, tmp_path):
    """By a run that reports to all trackers, with artifacts."""
    trackers = ["tensorboard", "wandb", "swanlab", "mlflow", *filter(find_spec, ["trackio"])]
    output, logs = tmp_path / "out", tmp_path / "logs"
    rows = [LINE.replace(b"1 + 1", f"{n} + 1".encode()) for n in range(8)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    (tmp_path / "flags.yaml").write_text(f"hub_token: {IN_FILE}\n")
    words = [
        "--config", str(tmp_path / "flags.yaml"), "--output_dir", str(output),
        "--model_name_or_path", str(tiny), "--data_files", str(tmp_path / "a.jsonl"),
        "--validation_split_percentage", "25", "--eval_strategy", "steps", "--eval_steps", "1",
        "--max_steps", "2", "--save_steps", "1", "--logging_dir", str(logs), "--use_cpu", "True",
        "--data_cache_dir", str(tmp_path / "prepared"), "--log_artifacts", "True",
        "--report_to", *trackers,
    ]  # fmt: skip
    modes = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    finished = launch(words, folder=tmp_path, env={**SECRETS, **modes})
    assert finished.code == 0, finished.output
    secrets = [value.encode() for value in (*SECRETS.values(), IN_FILE)]
    places = [("output", finished.output.encode())]
    places += [
        (str(file), file.read_bytes())
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != "flags.yaml"
    ]
    names = [name for name, _ in places]
    for expected in ("run_args.yaml", "wandb/offline-run", "mlflow.db", "artifacts/report/report.html"):
        assert any(expected in name for name in names), expected
    assert finished.output.count("files logged to ") == len(trackers) - 2  # two have no artifacts
    leaks = [(name, secret) for name, content in places for secret in secrets if secret in content]
    assert not leaks, leaks


# ---- prepared data ----


def cached(encoder: ChatEncoder, tmp_path: Path) -> PreparedData:
    (tmp_path / "a.jsonl").write_bytes(LINE * 3)
    return prepared(encoder, tmp_path / "a.jsonl", tmp_path / "cache")


def test_prepared_data_is_private(encoder, tmp_path):
    data = cached(encoder, tmp_path)
    for folder in (tmp_path / "cache", data.path):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_prepared_data_that_others_can_write_is_not_used(encoder, tmp_path):
    data = cached(encoder, tmp_path)
    data.path.chmod(0o777)
    with pytest.raises(UserError, match="can be written by other users and is not used; remove it"):
        cached(encoder, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("name", [".", "train.arrow"])
def test_prepared_data_of_other_users_is_not_used(encoder, tmp_path, name):
    data = cached(encoder, tmp_path)
    os.chown(data.path / name, 12345, 12345)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 12345\) and is not used; remove it"):
        cached(encoder, tmp_path)


@pytest.mark.parametrize("inside", [True, False], ids=["a-file", "the-folder"])
def test_links_in_the_cache_are_not_followed(encoder, tmp_path, inside):
    data = cached(encoder, tmp_path)
    link = data.path / "train.arrow" if inside else data.path
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is or contains a symbolic link and is not used; remove it"):
        cached(encoder, tmp_path)


def test_links_named_like_locks_or_staging_folders_are_not_followed(encoder, tmp_path):
    data = cached(encoder, tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (data.path.parent / f"{data.path.name}.abcdefgh").symlink_to(precious)
    (data.path / "train.arrow").write_bytes(b"damaged")
    cached(encoder, tmp_path)
    assert (precious / "file").read_text() == "kept"
    lock = data.path.with_name(f"{data.path.name}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious / "file")
    (data.path / "train.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="--data_cache_dir .* cannot be written"):
        cached(encoder, tmp_path)
    assert (precious / "file").read_text() == "kept"


def test_file_names_that_leave_a_prepared_folder_are_not_followed(encoder, tmp_path, capfd):
    data = cached(encoder, tmp_path)
    (data.path.parent / "outside").write_text("x")
    contents = json.loads((data.path / CONTENTS).read_text())
    contents["../outside"] = file_entry(data.path.parent / "outside")
    (data.path / CONTENTS).write_text(json.dumps(contents))
    cached(encoder, tmp_path)
    assert "is damaged and will be prepared again" in capfd.readouterr().err


def test_no_pickle_is_read_from_prepared_data(encoder, tmp_path):
    data, marker = cached(encoder, tmp_path), tmp_path / "unpickled"
    file = data.path / "train.order.npy"
    np.save(file, np.array([Malicious(marker)], dtype=object), allow_pickle=True)
    contents = json.loads((data.path / CONTENTS).read_text()) | {file.name: file_entry(file)}
    (data.path / CONTENTS).write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="Python objects in dtype"):
        cached(encoder, tmp_path)
    assert not marker.exists()
