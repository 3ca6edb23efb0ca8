"""Puts one object of that many bytes once its input ends: one of several raw writers, a process of its own.

    python benchmarks/put_object.py SIZE_BYTES URI

Run by checkpoint_limits.py. It imports no torch, so that many of them start soon.
"""

from __future__ import annotations

import os
import sys

import fsspec

BLOCK_BYTES = 2**20


def main(size_bytes: int, uri: str) -> None:
    fs, path = fsspec.core.url_to_fs(uri)
    data = (os.urandom(BLOCK_BYTES) * -(-size_bytes // BLOCK_BYTES))[:size_bytes]
    print("ready", flush=True)
    sys.stdin.read()
    fs.pipe_file(path, data)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
