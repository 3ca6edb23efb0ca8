"""An S3 server for the tests of checkpoints, behind a proxy that can spoil its answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_faults import FaultyStore


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultyStore]:
    pytest.importorskip("moto", reason="moto[server], of the dev extra, is not installed")
    pytest.importorskip("s3fs", reason="s3fs, of the s3 extra, is not installed")
    from s3_faults import spoil
    from s3_server import serve_s3

    with ExitStack() as stack:
        yield stack.enter_context(spoil(stack.enter_context(serve_s3())))


@pytest.fixture
def s3(s3_proxy: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    """A store without faults and with an empty bucket, s3://bucket, that the environment points to."""
    import s3fs
    from s3_server import ENVIRONMENT

    s3_proxy.reset()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_proxy.url}.items():
        monkeypatch.setenv(name, value)
    client = s3fs.S3FileSystem(use_listings_cache=False)
    if client.exists("bucket"):
        client.rm("bucket", recursive=True)
    client.call_s3("create_bucket", Bucket="bucket")
    client.clear_multipart_uploads("bucket")
    s3_proxy.reset()
    return s3_proxy
