"""The part of S3 that fsspec does not offer: parts in any order and from any thread, exclusive creation, clean-up of
what was begun and never finished.

It speaks through botocore, which s3fs brings and is configured as: the same environment, files and endpoint. botocore's
client is called from threads and gives the interpreter free while it hashes, encrypts and sends, so parts scale over
cores where s3fs's single event loop does not. It tries nothing again: that is retries.Patience's to decide.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pylon_trainer.checkpoint.manifest import PART_BYTES
from pylon_trainer.checkpoint.retries import Patience, status_of

if TYPE_CHECKING:
    from s3fs import S3FileSystem

CONNECTIONS = 16
_CONNECT_SECONDS = 10
_SILENCE_SECONDS = 60
"""A connection on which nothing moves for this long is given up."""


class Bucket:
    """One bucket. Errors are botocore's, except FileExistsError, FileNotFoundError and EOFError."""

    def __init__(self, fs: S3FileSystem, name: str) -> None:
        self.name = name
        self.client = _client(fs, os.getpid())

    def create(self, key: str, data: bytes) -> None:
        """FileExistsError when the key is there."""
        self.exclusively(
            key, lambda condition: self.client.put_object(Bucket=self.name, Key=key, Body=data, **condition)
        )

    def exclusively(self, key: str, request: Callable[[dict[str, str]], object]) -> None:
        """Send a request that makes the key, on the condition that it is not there.

        A store that does not know the condition is asked beforehand instead, which leaves a gap that the names of
        checkpoints, unique by chance, fill.
        """
        try:
            request({"IfNoneMatch": "*"})
        except self.client.exceptions.ClientError as error:
            if status_of(error) == 412:
                raise FileExistsError(key) from error
            if status_of(error) != 501:
                raise
            if self.size(key) is not None:
                raise FileExistsError(key) from error
            request({})

    def size(self, key: str) -> int | None:
        """Bytes of an object, None when there is none."""
        try:
            return int(self.client.head_object(Bucket=self.name, Key=key)["ContentLength"])
        except self.client.exceptions.ClientError as error:
            if status_of(error) == 404:
                return None
            raise

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """EOFError when the object ends before the buffer is full."""
        end = offset + len(buffer)
        try:
            answer = self.client.get_object(Bucket=self.name, Key=key, Range=f"bytes={offset}-{end - 1}")
        except self.client.exceptions.ClientError as error:
            if status_of(error) == 404:
                raise FileNotFoundError(key) from error
            if status_of(error) == 416:
                raise EOFError(f"{key} ends before byte {offset}") from error
            raise
        with answer["Body"] as body:
            while buffer and (count := body.readinto(buffer)):
                buffer = buffer[count:]
        if buffer:
            size = self.size(key)
            if size is not None and size < end:
                raise EOFError(f"{key} ends at byte {size}")
            raise OSError(f"the answer ended {len(buffer)} bytes early")

    def unfinished(self, prefix: str) -> list[tuple[str, str]]:
        """Key and id of all uploads below the prefix that were begun and not finished; no listing of objects shows
        them."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix)
        return [(upload["Key"], upload["UploadId"]) for page in pages for upload in page.get("Uploads", [])]

    def abandon_uploads(self, prefix: str) -> None:
        """Drop all that are unfinished below the prefix."""
        for key, upload_id in self.unfinished(prefix):
            self.abandon(key, upload_id)

    def abandon(self, key: str, upload_id: str) -> None:
        """Drop one; nothing when it is gone."""
        try:
            self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)
        except self.client.exceptions.ClientError as error:
            if status_of(error) != 404:
                raise


@functools.lru_cache(maxsize=8)
def _client(fs: S3FileSystem, _: int) -> Any:
    """Clients are slow to make, and safe to share between threads, but not between processes."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=fs.endpoint_url,
        aws_access_key_id=fs.key,
        aws_secret_access_key=fs.secret,
        aws_session_token=fs.token,
        config=Config(
            retries={"total_max_attempts": 1},
            max_pool_connections=CONNECTIONS,
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_SILENCE_SECONDS,
            tcp_keepalive=True,
        ),
    )


class S3Upload:
    """An object sent in parts of PART_BYTES; one that is no longer than a part goes in a single request."""

    def __init__(self, bucket: Bucket, key: str, size_bytes: int, patience: Patience) -> None:
        self._bucket = bucket
        self._key = key
        self._size_bytes = size_bytes
        self._ask = patience.ask
        self._is_ours = True
        self._lock = threading.Lock()
        self._upload_id: str | None = None
        self._parts: dict[int, str] = {}

    def put(self, offset: int, data: memoryview) -> None:
        if self._size_bytes <= PART_BYTES:
            self._make(lambda condition: self._call("put_object", Body=_View(data), **condition))
            return
        number = offset // PART_BYTES + 1
        fields = {"UploadId": self._begun(), "PartNumber": number}
        answer = self._ask("write", lambda: self._call("upload_part", Body=_View(data), **fields))
        self._parts[number] = answer["ETag"]

    def finish(self) -> None:
        """Complete it and look that all of it is there."""
        if self._upload_id is not None:
            parts = [{"PartNumber": number, "ETag": self._parts[number]} for number in sorted(self._parts)]
            fields = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": parts}}
            self._make(lambda condition: self._call("complete_multipart_upload", **fields, **condition))
        self._ask("write", self._check)

    def abort(self) -> None:
        if self._upload_id is not None:
            upload_id = self._upload_id
            self._ask("remove", lambda: self._bucket.abandon(self._key, upload_id))
        if self._is_ours:
            self._ask("remove", lambda: self._call("delete_object"))

    def _begun(self) -> str:
        with self._lock:
            if self._upload_id is None:
                self._upload_id = str(self._ask("write", lambda: self._call("create_multipart_upload"))["UploadId"])
            return self._upload_id

    def _make(self, request: Callable[[dict[str, str]], object]) -> None:
        """A request whose answer was lost may have been done: the next try finds the object there, or no upload."""
        tries = iter(range(1_000))

        def once() -> None:
            is_first = next(tries) == 0
            try:
                self._bucket.exclusively(self._key, request)
            except (FileExistsError, self._bucket.client.exceptions.NoSuchUpload) as error:
                self._is_ours = not (is_first and isinstance(error, FileExistsError))
                if is_first or self._bucket.size(self._key) != self._size_bytes:
                    raise

        self._ask("write", once)

    def _check(self) -> None:
        size_bytes = self._bucket.size(self._key)
        if size_bytes != self._size_bytes:
            raise OSError(f"the store holds {size_bytes} bytes instead of {self._size_bytes}")

    def _call(self, request: str, **fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self._bucket.client, request)(
            Bucket=self._bucket.name, Key=self._key, **fields
        )
        return answer


class _View(io.RawIOBase):
    """Memory as a file, because botocore takes no memoryview and a copy of each part would cost as much again."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
