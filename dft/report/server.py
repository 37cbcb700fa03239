"""A web server that shows runs while they go on. It only reads, and serves nothing but the pages it makes."""

import errno
import hashlib
import threading
from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from dft.errors import UserError
from dft.report.live_runs import find_runs, fingerprint, key_of, load_run
from dft.report.pages.live import POLICY, SCRIPT, Refreshing, live_run_page, runs_page

MAX_SHOWN = 7
"""Number of runs whose curves are shown unless some are ticked: the runs with the newest changes."""
MAX_CACHED = 16
"""Number of pages that are kept until their runs change."""
NAMES_OF_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class Answer(NamedTuple):
    """A response: status, type and content. `version` changes with the content; "" if it never changes."""

    status: HTTPStatus
    kind: str
    content: str
    version: str = ""


class LivePages:
    """Makes the pages of the runs below some folders, and keeps each until its runs change.

    Args:
        folders: where to look for runs.
        seconds: time between two requests of a page that is open in a browser.
    """

    def __init__(self, folders: Sequence[Path], seconds: int) -> None:
        self.folders, self.seconds = list(folders), seconds
        self._pages: dict[tuple[str, ...], tuple[str, str]] = {}  # version and page
        self._lock = threading.Lock()  # matplotlib's settings are global

    def answer(self, address: str, version: str = "") -> Answer:
        """Return the answer to a request.

        Args:
            address: path and query of the requested address. It never names a file: runs have keys.
            version: version of the page that the browser has.
        """
        path, query = urlsplit(address).path, urlsplit(address).query
        if path == "/live.js":
            return Answer(HTTPStatus.OK, "text/javascript", SCRIPT)
        with self._lock:
            runs = {key_of(folder): folder for folder in find_runs(self.folders)}
            if path == "/":
                asked = [key for key in parse_qs(query).get("run", []) if key in runs]
                return self._page(("/", *asked), runs, version)
            key = path.removeprefix("/run/")
            if path == f"/run/{key}" and key in runs:
                return self._page(("/run/", key), {key: runs[key]}, version)
        return Answer(HTTPStatus.NOT_FOUND, "text/plain", "not found\n")

    def _page(self, name: tuple[str, ...], runs: dict[str, Path], version: str) -> Answer:
        state = repr([fingerprint(folder) for folder in runs.values()])
        current = hashlib.sha256(state.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        if version == current:
            return Answer(HTTPStatus.NOT_MODIFIED, "text/html", "", current)
        cached, html = self._pages.get(name, ("", ""))
        if cached != current:
            html = self._make(name, list(runs.values()), current)
            self._pages.pop(name, None)
            self._pages[name] = current, html
            if len(self._pages) > MAX_CACHED:
                del self._pages[next(iter(self._pages))]
        return Answer(HTTPStatus.OK, "text/html", html, current)

    def _make(self, name: tuple[str, ...], folders: Sequence[Path], version: str) -> str:
        refreshing = Refreshing(self.seconds, version, datetime.now().strftime("%H:%M:%S"))
        runs = sorted(map(load_run, folders), key=lambda run: -run.updated)
        if name[0] == "/run/":
            return live_run_page(runs[0], refreshing)
        with_curves = [run for run in runs if run.report["log"]]
        asked = set(name[1:]) or {run.key for run in with_curves[:MAX_SHOWN]}
        # In the order of their folders, so that a run keeps its color when another one is updated.
        shown = sorted((run for run in with_curves if run.key in asked), key=lambda run: str(run.folder))
        return runs_page(runs, shown, self.folders, refreshing)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD requests; the base class refuses all others."""

    server: "ReportServer"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dft-report", ""
    timeout = 60  # seconds that a connection may be idle

    def do_GET(self) -> None:
        self._respond(with_content=True)

    def do_HEAD(self) -> None:
        self._respond(with_content=False)

    def _respond(self, with_content: bool) -> None:
        version = self.headers.get("If-None-Match", "").strip('"')
        if not self.server.accepts(self.headers.get("Host", "")):
            answer = Answer(HTTPStatus.FORBIDDEN, "text/plain", "this server is for this machine\n")
        else:
            try:
                answer = self.server.pages.answer(self.path, version)
            except OSError as error:  # a file was removed while it was read
                answer = Answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"try again: {error}\n")
        content = answer.content.encode("utf-8", "backslashreplace")
        self.send_response(answer.status)
        self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in (
            ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY"),
        ):  # fmt: skip
            self.send_header(name, value)
        if answer.version:
            self.send_header("ETag", f'"{answer.version}"')
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content and content:
            self.wfile.write(content)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the browser closed the page
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing; errors of a request are answered."""


class ReportServer(ThreadingHTTPServer):
    """The server. Closing it ends it; threads that still answer do not keep the program alive.

    Args:
        pages: makes the pages.
        host: address to listen on.
        port: port to listen on, 0 for a free one.

    Raises:
        UserError: the port is in use or not allowed, or the address is not one of this machine.
    """

    daemon_threads = True

    def __init__(self, pages: LivePages, host: str, port: int) -> None:
        self.pages = pages
        try:
            self.is_local = ip_address(host).is_loopback
        except ValueError:
            self.is_local = host == "localhost"
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port}: in use by another program; name another one, or --port 0 for a free one"
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UserError(f"--port {port}: not allowed for this user; name one above 1023") from None
            raise UserError(f"--host {host}: cannot be listened on ({error.strerror})") from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def accepts(self, host: str) -> bool:
        """Return whether a request names this machine.

        A web page elsewhere could let its own name point to 127.0.0.1, and read the runs through the browser
        of the user. Its requests still have its name as their host.
        """
        if not self.is_local:
            return True
        try:
            return urlsplit(f"//{host}").hostname in NAMES_OF_THIS_MACHINE
        except ValueError:
            return False
