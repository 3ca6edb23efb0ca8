"""A corpus that every machine has, as token ids in one small file: the Python sources that are installed there.

Two kinds of source, so that one can be trained on and the other tuned on: `python`, the standard library and the
packages beside torch, and `torch`, the package of that name. Files are split by a hash of their content into training
and held-out ones, equal files are taken once, and no package gives more than its share, because generated ones would
fill the rest. The ids are those of Pylon's own byte-level BPE, learnt from the training files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pylon_trainer.data.bpe import train_bpe
from pylon_trainer.data.tokenizer import END_OF_TEXT

VOCABULARY = 8192
PACKAGE_BYTES = 25_000_000
HELD_OUT = 0.03
"""Share of the files."""
TOKENS = {"python": 26_000_000, "torch": 6_000_000}
"""Training tokens of each kind, at most."""
HELD_OUT_TOKENS = 600_000
BPE_EVERY = 6
"""The BPE learns from every sixth training file."""

Ids = npt.NDArray[np.uint16]


class Source(NamedTuple):
    kind: str
    text: str
    order: int
    """Hash of the content: a shuffle that is the same everywhere."""

    @property
    def is_held_out(self) -> bool:
        return self.order % 1000 < HELD_OUT * 1000


def prepare(path: Path) -> None:
    """Read this machine's sources, learn the BPE, encode, and write the corpus to `path` (.npz)."""
    sources = sorted(read_sources(), key=lambda source: source.order)
    training = [source for source in sources if not source.is_held_out]
    tokenizer = train_bpe((source.text for source in training[::BPE_EVERY]), VOCABULARY)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    arrays: dict[str, Ids] = {}
    for kind, limit in TOKENS.items():
        for split, tokens in (("train", limit), ("held_out", HELD_OUT_TOKENS)):
            wanted = (s.text for s in sources if s.kind == kind and s.is_held_out == (split == "held_out"))
            ids = array("H")
            while len(ids) < tokens and (text := next(wanted, None)) is not None:
                ids.extend([*tokenizer.encode(text, add_special_tokens=False).ids, end])
            arrays[f"{kind}_{split}"] = np.array(ids[:tokens], dtype=np.uint16)
            print(f"{kind} {split}: {min(len(ids), tokens):,} tokens", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes one array type for all keywords


def read_corpus(path: Path) -> dict[str, Ids]:
    """`<kind>_train` and `<kind>_held_out`, as `prepare` wrote them."""
    with np.load(path) as corpus:
        return {name: corpus[name] for name in corpus.files}


def read_sources() -> Iterator[Source]:
    """Every distinct readable source file, package by package."""
    seen: set[int] = set()
    for package in _packages():
        size = 0
        for file in [package] if package.is_file() else sorted(package.rglob("*.py")):
            if "site-packages" in file.relative_to(package.parent).parts:
                continue
            content = file.read_bytes()
            order = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
            if not content or order in seen or (size := size + len(content)) > PACKAGE_BYTES:
                continue
            seen.add(order)
            kind = "torch" if package.name == "torch" else "python"
            yield Source(kind, content.decode("utf-8", errors="replace"), order)


def _packages() -> list[Path]:
    """Top-level modules and packages of the standard library and of site-packages."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), *{Path(paths["purelib"]), Path(paths["platlib"])}]
    return [entry for root in roots for entry in sorted(root.iterdir()) if entry.suffix == ".py" or entry.is_dir()]
