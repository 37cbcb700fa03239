"""The live pages: their content, what the server refuses, and a page that refreshes itself in a browser."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
from http import HTTPStatus

import pytest

from dft.errors import UserError
from dft.report.live_runs import key_of
from dft.report.log_file import LOG
from dft.report.server import LivePages, ReportServer
from tests.report.reports import Page, train_record
from tests.report.test_live_runs import lock, save_run  # noqa: F401

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path, lock):  # noqa: F811
    """A running, a crashed and a finished run."""
    lock(save_run(tmp_path / "going"))
    save_run(tmp_path / "crashed", steps=2)
    save_run(tmp_path / "done", "finished")
    return tmp_path


@pytest.fixture
def pages(runs):
    return LivePages([runs], 10)


@pytest.fixture
def server(pages):
    with ReportServer(pages, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)
        assert not thread.is_alive()


def request(server, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    answer = response.status, response.read().decode(), dict(response.getheaders())
    connection.close()
    return answer


def test_one_page_shows_all_runs_with_their_states_and_curves(pages, runs):
    page = Page(pages.answer("/").content)
    text = page.text
    assert "3 runs" in text and str(runs) in text
    assert "▶ running" in text and "✓ finished" in text and "✕ crashed or killed" in text
    assert "3 of 10" in text and "2 of 10" in text
    labels = [label for label in page.values("aria-label") if label.startswith("training-nll: ")]
    assert len(labels) == 1 and all(name in labels[0] for name in ("going", "crashed", "done"))
    links = [value for value in page.values("href") if value.startswith("/run/")]
    assert set(links) == {f"/run/{key_of(runs / name)}" for name in ("going", "crashed", "done")}


def test_ticked_runs_are_the_ones_with_curves(pages, runs):
    keys = [key_of(runs / name) for name in ("going", "done")]
    page = Page(pages.answer(f"/?run={keys[0]}&run={keys[1]}&run=other").content)
    (label,) = (label for label in page.values("aria-label") if label.startswith("training-nll: "))
    assert "going" in label and "done" in label and "crashed" not in label
    boxes = [attributes for tag, attributes in page.tags if tag == "input"]
    assert {box["value"] for box in boxes if "checked" in box} == set(keys) and len(boxes) == 3


def test_a_run_has_its_own_page(pages, runs):
    answer = pages.answer(f"/run/{key_of(runs / 'crashed')}")
    page = Page(answer.content)
    assert page.row("folder") == [str(runs / "crashed")] and "All runs" in page.text
    assert ["nll", "2.0000", "1.0000"] in page.rows and "crashed or killed" in page.text


def test_pages_load_and_run_nothing_but_the_script_of_the_server(pages, runs):
    for address in ("/", f"/run/{key_of(runs / 'done')}"):
        page = Page(pages.answer(address).content)
        assert page.values("src") == ["/live.js"]
        assert all(link.startswith(("/", "#")) for link in page.values("href"))
        policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
        assert policy.startswith("default-src 'none'; ") and "script-src 'self'; " in policy


def test_a_page_is_made_again_only_when_a_run_has_changed(pages, runs, monkeypatch):
    first = pages.answer("/")
    monkeypatch.setattr(LivePages, "_make", lambda *_: pytest.fail("nothing has changed"))
    assert pages.answer("/") == first
    unchanged = pages.answer("/", first.version)
    assert (unchanged.status, unchanged.content) == (HTTPStatus.NOT_MODIFIED, "")
    monkeypatch.undo()
    with open(runs / "going" / LOG, "a") as stream:
        stream.write("\n" + json.dumps(train_record(4)) + "\n")
    second = pages.answer("/", first.version)
    assert second.status == HTTPStatus.OK and "4 of 10" in second.content and "4 of 10" not in first.content


def test_runs_that_appear_later_are_shown(tmp_path):
    pages = LivePages([tmp_path], 10)
    empty = pages.answer("/")
    assert "None yet" in empty.content
    save_run(tmp_path / "later")
    assert "later" in pages.answer("/", empty.version).content


def test_an_address_never_names_a_file(pages, runs):
    key = key_of(runs / "done")
    (runs / "done/secret.txt").write_text("secret")
    for address in (
        "/../../etc/passwd", "/run/../done/secret.txt", f"/run/{key}/secret.txt", "/run/", f"/run/{key}x",
        "/run/done", f"//run/{key}", "/live.js/..", "/%2e%2e/done/secret.txt", "/done/report.json",
    ):  # fmt: skip
        assert pages.answer(address).status == HTTPStatus.NOT_FOUND, address


def test_the_server_answers_over_http(server):
    status, html, headers = request(server, "/")
    assert status == 200 and html.startswith("<!doctype html>") and headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert request(server, "/", **{"If-None-Match": headers["ETag"]})[:2] == (304, "")
    assert request(server, "/", "HEAD")[:2] == (200, "")
    assert request(server, "/live.js")[2]["Content-Type"] == "text/javascript; charset=utf-8"
    assert request(server, "/../../etc/passwd")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_server_only_reads(server, method):
    assert request(server, "/", method)[0] == 501


def test_requests_under_the_name_of_another_site_are_refused(server):
    port = server.server_address[1]
    for host, status in (
        ("evil.example", 403),
        (f"localhost:{port}", 200),
        (f"127.0.0.1:{port}", 200),
        ("[", 403),
    ):
        assert request(server, "/live.js", Host=host)[0] == status, host


def test_a_port_in_use_is_one_clear_error(server, pages):
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"^--port {port}: in use by another program; name another one"):
        ReportServer(pages, "127.0.0.1", port)
    with pytest.raises(UserError, match="^--host 192.0.2.1: cannot be listened on"):
        ReportServer(pages, "192.0.2.1", 0)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_an_open_page_shows_what_is_logged_later(runs, tmp_path_factory):
    """The run goes on right after the browser has its page; the page asks again one second later."""

    class GoingOn(LivePages):
        def answer(self, address, version=""):
            answer = super().answer(address, version)
            if address == "/" and not version:
                with open(runs / "going" / LOG, "a") as stream:
                    stream.write("\n" + json.dumps(train_record(7)) + "\n")
            return answer

    profile = tmp_path_factory.mktemp("profile")
    with ReportServer(GoingOn([runs], 1), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--virtual-time-budget=5000", "--dump-dom", server.url,
        ]  # fmt: skip
        browser = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            env={**os.environ, "HOME": str(profile)},
        )  # fmt: skip
        try:
            html, _ = browser.communicate(timeout=120)
        finally:
            if browser.poll() is None:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
            server.shutdown()
            thread.join(10)
    assert "7 of 10" in html, "the content after the change"
    assert "No answer" not in html and html.count("<main>") == 1
