"""A W&B server on loopback, for tests: it answers what a client of one run asks, or misbehaves."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeWandb(ThreadingHTTPServer):
    """Keeps the rows that clients send. `mode` may change while it runs.

    good; slow: each answer takes 0.4 s; hole: takes requests and never answers; hang_rows:
    starts a run but never answers its rows; deny_rows: HTTP 403 to its rows; broken: HTTP 500 to
    everything; dead: cuts each connection.
    """

    daemon_threads = True

    def __init__(self, mode: str = "good") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode, self.rows = mode, dict[int, dict[str, Any]]()
        self.asked: list[str] = []
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing of a client that has left."""

    @property
    def env(self) -> dict[str, str]:
        """What points a client here."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_MODE": "online",
        }


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[FakeWandb]]:
    """What runs a server until its context ends."""
    return _serving


@contextmanager
def _serving(mode: str = "good") -> Iterator[FakeWandb]:
    server = FakeWandb(mode)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        """Answer a GraphQL query or take the rows of a run."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        mode, rows = self.server.mode, "file_stream" in self.path
        if mode == "hole" or (mode == "hang_rows" and rows):
            while self.server.mode == mode and not self.server.closing.wait(0.1):
                pass
            return
        if mode == "dead":
            return
        if mode == "deny_rows" and rows:
            self._answer({"error": "no"}, 403)
            return
        if mode == "slow":
            time.sleep(0.4)
        if mode == "broken":
            self._answer({"error": "broken"}, 500)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if not body.startswith(b"{"):
            self._answer({})  # A file, or the client's report on itself.
            return
        sent = json.loads(body)
        if rows:
            self._take(sent)
            self._answer({})
            return
        self._answer({"data": self._data(sent)})

    do_GET = do_PUT = do_POST

    def _take(self, sent: dict[str, Any]) -> None:
        history = (sent.get("files") or {}).get("wandb-history.jsonl") or {}
        for line in history.get("content", []):
            row = json.loads(line)
            self.server.rows[row["_step"]] = row

    def _data(self, sent: dict[str, Any]) -> dict[str, Any]:
        query, known = sent.get("query", ""), sent.get("variables") or {}
        self.server.asked.append(query.split("(")[0].strip())
        project = {"id": "p", "name": known.get("project") or "p"}
        project["entity"] = {"id": "e", "name": "me"}  # type: ignore[assignment]
        bucket = {
            "id": "b", "name": known.get("name") or known.get("run") or "run", "displayName": "x",
            "config": "{}", "sweepName": None, "historyLineCount": len(self.server.rows),
            "project": project,
        }  # fmt: skip
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.server.rows}}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "p", "bucket": self._resumed(bucket)}}
        if "createRunFiles" in query:
            url = f"{self.server.env['WANDB_BASE_URL']}/upload"
            files = [{"name": name, "uploadUrl": url} for name in known.get("files", [])]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        return {}

    def _resumed(self, bucket: dict[str, Any]) -> dict[str, Any] | None:
        rows = [self.server.rows[step] for step in sorted(self.server.rows)]
        if not rows:
            return None
        tail = json.dumps([json.dumps(rows[-1])])
        return bucket | {
            "historyTail": tail, "eventsTail": "[]", "summaryMetrics": json.dumps(rows[-1]),
            "logLineCount": 0, "eventsLineCount": 0, "wandbConfig": "{}", "tags": [],
        }  # fmt: skip

    def _answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""
