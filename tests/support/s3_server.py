"""A real S3 server on loopback, in a process of its own: moto's, which keeps objects in memory and multipart uploads as
S3 does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTSTESTSTESTS1",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/of+the/tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
"""What a client of it needs, besides AWS_ENDPOINT_URL; nothing of the user's own comes in."""


@contextmanager
def serve_s3() -> Iterator[str]:
    """The URL of an empty server."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    environment = {**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1"}  # so that a few bytes have many parts
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                    # What it logs from here on must go somewhere, or it would wait for a reader.
                    threading.Thread(target=server.stderr.read, daemon=True).start()
                    yield match[0]
                    return
            raise AssertionError(f"moto.server ended with code {server.wait()}")
        finally:
            server.kill()
