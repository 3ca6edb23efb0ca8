"""`pylon tokenizer`: train a tokenizer on a corpus, and look at what one makes of it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from pylon_api.training import DataFormat, TokenizerKind, TokenizerSpec
from pylon_trainer.command_line import errors_for_people
from pylon_trainer.data.bpe import texts_of, train_bpe
from pylon_trainer.data.documents import Piece, cut
from pylon_trainer.data.entropy import ngram_entropies
from pylon_trainer.data.sources import list_files
from pylon_trainer.data.tokenizer import load_tokenizer

globs_argument = click.argument("globs", nargs=-1, required=True, metavar="GLOB...")
format_option = click.option(
    "--format",
    "data_format",
    type=click.Choice([kind.value for kind in DataFormat]),
    default=DataFormat.AUTO.value,
    show_default=True,
    help="What the files hold; Auto goes by their ending.",
)
text_field_option = click.option(
    "--text-field", default="text", show_default=True, help="Field of JSONL or column of Parquet with the text."
)


@click.group()
def tokenizer() -> None:
    """Train a tokenizer, or measure one."""


@tokenizer.command()
@globs_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The tokenizer.json to write.")
@click.option("--vocab-size", type=int, default=8192, show_default=True, help="Most tokens it may have.")
@format_option
@text_field_option
def train(globs: tuple[str, ...], out: Path, vocab_size: int, data_format: str, text_field: str) -> None:
    """Train a byte-level BPE on the text of all GLOBs (any fsspec URI)."""
    if not out.parent.is_dir():  # said before the work, not after it
        raise click.ClickException(f"--out: there is no directory {out.parent}")
    with errors_for_people():
        pieces = _pieces(globs, data_format)
        with _progress(pieces, "reading") as progress:
            backend = train_bpe(texts_of(progress, text_field), vocab_size)
        _write_atomically(out, backend.to_str(pretty=True))
    click.echo(f"{out}: {backend.get_vocab_size()} tokens")


@tokenizer.command()
@globs_argument
@click.option("--tokenizer", "uri", help="A tokenizer.json, any fsspec URI; bytes if left out.")
@format_option
@text_field_option
def inspect(globs: tuple[str, ...], uri: str | None, data_format: str, text_field: str) -> None:
    """Tell how many bytes of the GLOBs' text a token stands for."""
    with errors_for_people():
        kind = TokenizerKind.FILE if uri else TokenizerKind.BYTES
        loaded = load_tokenizer(TokenizerSpec(kind=kind, uri=uri))
        size = tokens = documents = 0
        with _progress(_pieces(globs, data_format), "encoding") as progress:
            for text in texts_of(progress, text_field):
                size += len(text.encode())
                tokens += len(loaded.encode(text))
                documents += 1
    click.echo(f"vocabulary       {loaded.vocab_size}")
    click.echo(f"documents        {documents}")
    click.echo(f"bytes            {size}")
    click.echo(f"tokens           {tokens}")
    click.echo(f"bytes per token  {size / max(tokens, 1):.3f}")


@tokenizer.command()
@globs_argument
@format_option
@text_field_option
def entropy(globs: tuple[str, ...], data_format: str, text_field: str) -> None:
    """Print the unigram, bigram and trigram entropies of the GLOBs' bytes: marks to judge a byte-level loss by."""
    with errors_for_people(), _progress(_pieces(globs, data_format), "counting") as progress:
        found = ngram_entropies(texts_of(progress, text_field))
    for name, measured in zip(("unigram", "bigram", "trigram"), found, strict=True):
        click.echo(f"{name:8} {measured.nats_per_byte:.3f} nats a byte")


def _pieces(globs: tuple[str, ...], data_format: str) -> list[Piece]:
    return cut(list_files(globs, "GLOB"), DataFormat(data_format))


@contextmanager
def _progress(pieces: list[Piece], verb: str) -> Iterator[Iterable[Piece]]:
    """A bar on a terminal; nothing where the output is read by a program."""
    with click.progressbar(pieces, label=verb, file=sys.stderr) as bar:
        yield bar


def _write_atomically(path: Path, content: str) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError as error:
        raise click.ClickException(f"--out: {path} cannot be written ({os.strerror(error.errno or 0)})") from error
