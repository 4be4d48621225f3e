"""A bucket of Google Cloud Storage in this process: as much of its JSON interface as ``gs://`` paths ask for.

The clients are the real ones: gcsfs, google-cloud-storage and TensorStore, told by `ENVIRONMENT` where to look. It has
no folders and no rename, as the real one. What only a real one has: logins, limits, and answers that are late.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o(?:/(?P<name>[^/]+))?/?)?")
MOVE = re.compile(r"/storage/v1/b/[^/]+/o/([^/]+)/moveTo/o/([^/]+)")
STAMP = "2026-01-01T00:00:00.000Z"


class Bucket:
    """Objects by name.

    Attributes:
      objects: the bytes of each.
      generations: how often one was written.
      before_put: called with the name of an object that is to be written.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.before_put: Callable[[str], None] = lambda name: None
        self.lock = threading.RLock()

    def put(self, name: str, data: bytes) -> None:
        self.before_put(name)
        with self.lock:
            self.objects[name] = data
            self.generations[name] = self.generations.get(name, 0) + 1

    def copy_to(self, folder: Path) -> Path:
        """Write all objects as files."""
        for name, data in self.objects.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def describe(self, name: str) -> dict[str, str]:
        size, generation = str(len(self.objects[name])), str(self.generations[name])
        stamps = dict.fromkeys(("updated", "timeCreated"), STAMP)
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "size": size,
            "generation": generation,
            **stamps,
        }


class Handler(BaseHTTPRequestHandler):
    """One request."""

    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one(self) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.answer(url.path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = handle_one

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path.startswith("/batch"):
            self.delete_some(body)
        elif path.startswith("/upload"):
            self.upload(query, body)
        elif moved := MOVE.fullmatch(path):
            source, target = (unquote(name) for name in moved.groups())
            self.bucket.put(target, self.bucket.objects.pop(source))
            self.reply(200, self.bucket.describe(target))
        elif (found := OBJECT.fullmatch(path)) and found["bucket"] == NAME:
            name = unquote(found["name"] or "")
            if name:
                self.one(name, query.get("alt") == "media")
            elif found["objects"]:
                self.list(query.get("prefix", ""), query.get("delimiter", ""))
            else:
                self.reply(200, {"kind": "storage#bucket", "name": NAME, "id": NAME})
        else:
            self.reply(404, {"error": {"code": 404, "message": f"there is no {path}"}})

    def one(self, name: str, content: bool) -> None:
        """Describe, read or delete an object."""
        if name not in self.bucket.objects:
            self.reply(404, {"error": {"code": 404, "message": f"there is no {name}"}})
        elif self.command == "DELETE":
            del self.bucket.objects[name]
            self.reply(204)
        elif not content:
            self.reply(200, self.bucket.describe(name))
        else:
            data = self.bucket.objects[name]
            headers = {"x-goog-generation": str(self.bucket.generations[name])}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if not asked:
                self.reply(200, data, **headers)
                return
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.reply(206, data[first : last + 1], **headers, **part)

    def list(self, prefix: str, delimiter: str) -> None:
        names = sorted(name for name in list(self.bucket.objects) if name.startswith(prefix))
        rests = {name: name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "") for name in names}
        items = [self.bucket.describe(name) for name, (_, more, _) in rests.items() if not more]
        folders = sorted({prefix + first + more for first, more, _ in rests.values() if more})
        self.reply(200, {"kind": "storage#objects", "items": items, "prefixes": folders})

    def upload(self, query: dict[str, str], body: bytes) -> None:
        """Write an object; one that is resumable is first asked for, and then comes whole."""
        if query["uploadType"] == "resumable" and "upload_id" not in query:
            again = f"http://{self.headers['Host']}{self.path}&upload_id=1"
            self.reply(200, {}, Location=again)
            return
        try:
            self.bucket.put(query["name"], body)
        except PermissionError as error:
            self.reply(403, {"error": {"code": 403, "message": str(error)}})
        else:
            self.reply(200, self.bucket.describe(query["name"]))

    def delete_some(self, body: bytes) -> None:
        names = [unquote(name.decode()) for name in re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+)", body)]
        answers = ""
        for name in names:
            status = "204 No Content" if self.bucket.objects.pop(name, None) is not None else "404 Not Found"
            answers += f"--x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n"
        self.reply(200, (answers + "--x--").encode(), **{"Content-Type": "multipart/mixed; boundary=x"})


class Server(ThreadingHTTPServer):
    """It says nothing of connections that a killed process leaves."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """An empty bucket, and the environment of programs that are to find it."""
    bucket = Bucket()
    server = Server(("127.0.0.1", 0), type("Served", (Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_CLOUD_PROJECT": "none",
                "FSSPEC_GCS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask over gRPC what kind of bucket this is
            },
        )
    finally:
        server.shutdown()
        server.server_close()
