"""Both ends of Weights & Biases for tests: offline files read back byte by byte, and a service on this machine.

An offline file is a 7-byte header and a LevelDB log: 32 KiB blocks of chunks (crc, length, type), whose payloads
are protobuf records.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[pb.Record]:
    """All protobuf records of an offline file; the checksum of every chunk is checked."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, partial, position = [], b"", HEADER
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload = data[position + 7 : position + 7 + length]
        if len(payload) < length:
            break
        assert checksum == zlib.crc32(bytes([kind]) + payload), f"damaged chunk at {position}"
        position += 7 + length
        partial = payload if kind in (FULL, FIRST) else partial + payload
        if kind in (FULL, LAST):
            record = pb.Record()
            record.ParseFromString(partial)
            records.append(record)
    return records


def items_of(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


class Offline:
    """The run that the one file below `run_dir` describes: offline, or as an online session leaves it on the disk.

    `finished=False` for one whose program was killed: it may have no end.
    """

    def __init__(self, run_dir: Path, pattern: str = "wandb/offline-run-*", *, finished: bool = True) -> None:
        (path,) = sorted(Path(run_dir).glob(f"{pattern}/run-*.wandb"))
        # The service closes the file in its own time.
        deadline, records = time.monotonic() + 20, read_records(path)
        while finished and not any(r.WhichOneof("record_type") == "exit" for r in records):
            assert time.monotonic() < deadline, f"{path} was never finished"
            time.sleep(0.02)
            records = read_records(path)
        of_kind = {
            kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
            for kind in ("history", "run", "config", "summary", "exit", "metric", "preempting")
        }
        self.folder = path.parent
        self.history = [items_of(entry.item) for entry in of_kind["history"]]
        self.numbers = [row["_step"] for row in self.history]
        self.run = of_kind["run"][0]
        self.config = {}
        for update in (self.run.config, *of_kind["config"]):
            self.config.update(items_of(update.update))
        self.summary: dict[str, Any] = {}
        for entry in of_kind["summary"]:
            self.summary.update(items_of(entry.update))
        self.exit_code = of_kind["exit"][-1].exit_code if of_kind["exit"] else None
        self.preempting = bool(of_kind["preempting"])

    def column(self, name: str) -> list[Any]:
        """The values of `name` in the rows of mixture or baseline; the service adds `step` to others."""
        wanted = name.startswith("baseline/")
        rows = [row for row in self.history if any(key.startswith("baseline/") for key in row) == wanted]
        tables = ("examples", "baseline/examples")
        return [row[name] for row in rows if name in row and not any(key.startswith(tables) for key in row)]


class Service:
    """As much of the service as wandb asks for: it keeps the lines of one run, and fails when told to.

    Attributes:
        url: for WANDB_BASE_URL.
        lines: file -> line number -> text, as uploaded; wandb-history.jsonl holds the rows.
        ended: what sessions said at their ends: {"exitcode": ..., ...}; preempting: whether one said so.
        fail: (path, body) -> None, or the status and the text to answer with.
        received: everything that came, as text.
    """

    def __init__(self) -> None:
        self.lines: dict[str, dict[int, str]] = {}
        self.ended: list[dict[str, Any]] = []
        self.preempting = False
        self.fail: Callable[[str, str], tuple[int, str] | None] = lambda path, body: None
        self.received: list[str] = []
        self._known: set[str] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                text = body.decode(errors="replace")
                service.received.append(f"{self.path}\n{text}")
                status, answer = service.fail(self.path, text) or (200, service.answer(self.path, text))
                content = answer.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _serve

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                # Clients leave without a word.
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """From here on connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, in the order of their lines."""
        lines = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]

    def forget(self, count: int) -> None:
        """As if no more than `count` rows had arrived."""
        lines = self.lines["wandb-history.jsonl"]
        for number in [number for number in lines if number >= count]:
            del lines[number]
        self.lines["wandb-summary.json"] = {0: lines[count - 1] if count else "{}"}

    def answer(self, path: str, text: str) -> str:
        if path.endswith("/file_stream"):
            return self._stream(json.loads(text))
        if not path.endswith("/graphql"):
            return "{}"
        asked = json.loads(text)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        if operation and operation[1] == "CreateArtifact":
            # Tables are artifacts, whose upload is another protocol; the row that refers to them is not.
            return json.dumps({"data": None, "errors": [{"message": "no artifacts here"}]})
        variables = asked.get("variables") or {}
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": lambda v: {"viewer": {"id": "v", "entity": "e", "username": "somebody", "flags": "{}"}},
            "ArtifactType": lambda v: {"project": None},
            "UpsertBucket": self._upsert,
            "RunResumeStatus": self._resume,
            "CreateRunFiles": lambda v: {
                "createRunFiles": {
                    "runID": "b",
                    "uploadHeaders": [],
                    "files": [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in v["files"]],
                }
            },
        }
        return json.dumps({"data": answers.get(operation[1] if operation else "", lambda v: {})(variables)})

    def _stream(self, sent: dict[str, Any]) -> str:
        for name, chunk in (sent.get("files") or {}).items():
            for i, line in enumerate(chunk["content"]):
                self.lines.setdefault(name, {})[chunk["offset"] + i] = line
        self.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            self.ended.append({key: value for key, value in sent.items() if key != "files"})
        return "{}"

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        fresh = name not in self._known
        self._known.add(name)
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "somebody"}}
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": fresh}}

    def _resume(self, variables: dict[str, Any]) -> dict[str, Any]:
        bucket = None
        if variables["name"] in self._known:
            lines = self.lines.get("wandb-history.jsonl", {})
            bucket = {
                "id": "b",
                "name": variables["name"],
                "summaryMetrics": self.lines.get("wandb-summary.json", {}).get(0, "{}"),
                "displayName": variables["name"],
                "logLineCount": 0,
                "historyLineCount": len(lines),
                "eventsLineCount": len(self.lines.get("wandb-events.jsonl", {})),
                "historyTail": json.dumps([lines[number] for number in sorted(lines)][-1:]),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "notes": "",
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "somebody"}, "bucket": bucket}}
