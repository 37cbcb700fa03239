"""--push_to_hub True against a local stand-in for the hub: which files are uploaded."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load

from tests.launching import launch

TOKEN = "hf_SeCrEtOfTheHub"


class Hub(ThreadingHTTPServer):
    """A stand-in hub that accepts commits, or answers them with the HTTP status `fails`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.created: list[str] = []
        self.fails: int | None = None
        self.delay = 0.0


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body)["name"])
            self._answer({"url": f"{self.server.url}/someone/run"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
            self._answer({"files": modes})
        elif self.server.fails is not None:
            self._answer({"error": "no room here"}, self.server.fails)
        else:
            time.sleep(self.server.delay)
            lines = [json.loads(line) for line in body.splitlines()]
            (summary,) = [line["value"]["summary"] for line in lines if line["key"] == "header"]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append(
                (summary, {file["path"]: base64.b64decode(file["content"]) for file in files})
            )
            self._answer({"commitUrl": f"{self.server.url}/someone/run/commit/1", "commitOid": "1"})

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        return content

    def _answer(self, content: dict[str, object], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(example, hub: Hub, output, **flags):
    words = example.words(
        output, max_steps=2, save_strategy="steps", save_steps=1, report=True, eval_strategy="steps",
        eval_steps=1, push_to_hub=True, per_device_train_batch_size=16, **flags,
    )  # fmt: skip
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return launch(words, folder=example.folder, env=env)


def test_only_the_model_and_its_card_are_pushed(example, hub, tmp_path):
    output = tmp_path / "run"
    finished = pushed(example, hub, output, hub_strategy="checkpoint", hub_always_push=True)
    assert finished.code == 0, finished.output
    assert hub.created == ["run"]
    model = {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "report.png", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    summaries = [summary for summary, _ in hub.commits]
    assert summaries == [
        "Training in progress, step 1", "Training in progress, step 1, checkpoint",
        "Training in progress, step 2", "Training in progress, step 2, checkpoint", "Model save",
    ]  # fmt: skip
    for summary, files in hub.commits:
        if summary.endswith("checkpoint"):
            assert {"last-checkpoint/optimizer.pt", "last-checkpoint/manifest.json"} <= files.keys()
        else:
            assert files.keys() == model, summary
        assert not any(TOKEN.encode() in content for content in files.values())
        assert not any(name.endswith(".bin") for name in files)
    _, last = hub.commits[-1]
    assert last["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert load(last["model.safetensors"]) and b"Saved after step 2 of 2." in last["README.md"]
    assert (output / "report.json").is_file(), "report.json contains conversations and must not be uploaded"


def test_a_rejected_push_keeps_the_local_files(example, hub, tmp_path):
    hub.fails = 403
    finished = pushed(example, hub, tmp_path / "run", hub_always_push=True)
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    assert finished.output.count("warning     ") == 2 and "checkpoint-1 was not pushed: " in finished.output
    assert finished.output.count("error: --push_to_hub True: someone/run cannot be pushed: ") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file() and (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_an_unreachable_hub_is_an_error_before_training(example, tmp_path):
    words = example.words(tmp_path / "run", push_to_hub=True, max_steps=1)
    finished = launch(words, folder=example.folder, env={"HF_HUB_OFFLINE": "1"})
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    assert "error: --push_to_hub True: the repository on the hub cannot be created" in finished.output
    assert "train step" not in finished.output


@pytest.mark.slow
def test_a_hub_slower_than_the_timeout_of_the_ranks_does_not_end_the_run(example, hub, tmp_path):
    """Neither the watchdog nor a collective waits for the upload: training continues meanwhile."""
    hub.delay = 45
    words = example.words(
        tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, ddp_timeout=20,
        per_device_train_batch_size=8,
    )  # fmt: skip
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    finished = launch(words, folder=example.folder, launcher="torchrun", ranks=2, env=env)
    assert finished.code == 0, finished.output
    assert [summary for summary, _ in hub.commits] == ["Training in progress, step 1", "Model save"]
    assert "checkpoint-2 is not pushed: the previous push is still running" in finished.output
