"""An S3 server in this process, and a proxy before it that drops connections."""

import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "lesions"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Credentials that the server accepts, as variables of the environment."""


class Bucket:
    """A bucket on the server, without the code under test."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Upload every file of a folder. Return its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return the content of every object below a prefix, by the rest of its key."""
        return {
            key.removeprefix(prefix).lstrip("/"): self._client.get_object(Bucket=BUCKET, Key=key)[
                "Body"
            ].read()
            for key in self.written(prefix)
        }

    def written(self, prefix: str = "") -> dict[str, object]:
        """Return the time at which each object below a prefix was written, by key."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {
            found["Key"]: found["LastModified"]
            for page in pages
            for found in page.get("Contents", [])
        }


@contextmanager
def serve() -> Iterator[Bucket]:
    """Run a server for the block."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield Bucket(f"http://{host}:{port}")
    finally:
        server.stop()


class Proxy:
    """Forwards connections to a server, and drops some of them in the middle of an answer."""

    def __init__(self, endpoint: str, drops: int, after: int) -> None:
        """Listen.

        Args:
            endpoint: URL of the server.
            drops: number of connections to drop.
            after: bytes of answers after which a connection is dropped.
        """
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port)
        self._drops = drops
        self._after = after
        self.num_dropped = 0
        self.ranges: list[tuple[int, int]] = []
        """First and last byte of each range that was asked for."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                for work in ((self._ask, client, server), (self._answer, server, client)):
                    threading.Thread(target=work[0], args=work[1:], daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                found = re.findall(rb"(?i)range: bytes=(\d+)-(\d+)", data)
                self.ranges += [(int(first), int(last)) for first, last in found]
                server.sendall(data)
        server.close()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := server.recv(4096):
                if self.num_dropped < self._drops and sent + len(data) > self._after:
                    self.num_dropped += 1
                    break
                client.sendall(data)
                sent += len(data)
            client.shutdown(socket.SHUT_RDWR)
        client.close()
        server.close()
