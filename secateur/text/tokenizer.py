"""Tokenizers: plain bytes, a JSON file of `tokenizers`, or a folder of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from secateur.errors import PlanError

BYTES = "bytes"
INSTALL = "install it with `pip install 'secateur[huggingface]'`"


class Tokenizer(Protocol):
    """Turns text into token ids.

    Attributes:
        size: one more than its largest token id.
        end: the id of its own end token, or None if it names none.
    """

    size: int
    end: int | None

    def encode(self, text: bytes, begin: bool) -> list[int]:
        """Return the ids of UTF-8 text.

        Args:
            begin: whether the text begins the sample, so that the tokenizer adds the special tokens
                that it is configured to add.

        Raises:
            UnicodeDecodeError: the text is not UTF-8.
        """
        ...

    def find(self, token: str) -> int | None:
        """Return the id of a token, or None if there is none."""
        ...


class ByteTokenizer:
    """Each byte is a token. Text need not be UTF-8. The end token is 256."""

    end: int | None = 256

    def __init__(self, with_end: bool) -> None:
        self.size = 257 if with_end else 256

    def encode(self, text: bytes, begin: bool) -> list[int]:
        return list(text)

    def find(self, token: str) -> int | None:
        return None


class FileTokenizer:
    """A tokenizer of the library `tokenizers`, from its JSON file. It names no end token."""

    end: int | None = None

    def __init__(self, path: str) -> None:
        try:
            from tokenizers import Tokenizer as Pipeline
        except ImportError as error:
            raise PlanError(f"the tokenizer {path} needs the package tokenizers; {INSTALL}") from (
                error
            )
        try:
            self._pipeline = Pipeline.from_file(path)
        except Exception as error:  # the library raises nothing more specific
            raise PlanError(
                f"the tokenizer {path} cannot be read ({error}); give a JSON file that "
                f"`tokenizers` saved"
            ) from error
        # The file may hold settings for both, but `length` and `pad` of the task decide.
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        self.size = 1 + max(self._pipeline.get_vocab().values(), default=-1)

    def encode(self, text: bytes, begin: bool) -> list[int]:
        ids: list[int] = self._pipeline.encode(text.decode(), add_special_tokens=begin).ids
        return ids

    def find(self, token: str) -> int | None:
        found: int | None = self._pipeline.token_to_id(token)
        return found


class FolderTokenizer:
    """A tokenizer of the library `transformers`, from a local folder."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise PlanError(
                f"the tokenizer {path} needs the package transformers; {INSTALL}"
            ) from (error)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of many types, by what the folder lacks
            raise PlanError(
                f"the tokenizer {path} cannot be read ({' '.join(str(error).split())[:200]}); give "
                f"a folder that save_pretrained of a tokenizer wrote"
            ) from error
        self.end: int | None = self._tokenizer.eos_token_id
        self._ids: dict[str, int] = self._tokenizer.get_vocab()
        self.size = 1 + max(self._ids.values(), default=-1)

    def encode(self, text: bytes, begin: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text.decode(), add_special_tokens=begin, verbose=False
        )
        return ids

    def find(self, token: str) -> int | None:
        return self._ids.get(token)


def load_tokenizer(name: str, eos: bool | str) -> tuple[Tokenizer, int | None]:
    """Return the tokenizer that a plan names, and the id of the token that ends a text.

    Args:
        name: `bytes`, a JSON file, or a folder.
        eos: the end token's name, whether to use the tokenizer's own, or False for none.

    Raises:
        PlanError: the tokenizer cannot be read, or has no such end token.
    """
    tokenizer: Tokenizer
    if name == BYTES:
        tokenizer = ByteTokenizer(with_end=bool(eos))
    elif Path(name).is_dir():
        tokenizer = FolderTokenizer(name)
    elif Path(name).is_file():
        tokenizer = FileTokenizer(name)
    else:
        raise PlanError(
            f"the tokenizer {name} is neither a file nor a folder; give `bytes`, a JSON file of "
            f"tokenizers, or a local folder of transformers (nothing is downloaded)"
        )
    if eos is False:
        return tokenizer, None
    end = tokenizer.end if eos is True else tokenizer.find(eos)
    if end is None and eos is True:
        raise PlanError(
            f"the tokenizer {name} names no end token; give its name, as in `eos: </s>`"
        )
    if end is None:
        raise PlanError(f"the tokenizer {name} has no token {eos}; correct `eos`")
    return tokenizer, end
