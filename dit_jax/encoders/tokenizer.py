"""Captions to token ids, with CLIP's byte-pair vocabulary, through transformers' tokenizer.

    [BOS, token, ..., token, EOS, PAD, ..., PAD]      S ids; the mask is true from BOS to EOS

A caption of more than S - 2 tokens is cut, never in silence: a warning shows the words that were lost. Or it is read
in pieces, each S ids long and between a BOS and an EOS of its own, which stand side by side: ``[B, pieces * S]``.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from dit_jax.files import read_bounded, read_json

LongPrompt = Literal["truncate", "error", "chunk"]

# Of a tokenizer's folder, what decides which ids a caption gets.
FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHOWN_CAPTIONS = 3  # of those cut, in one warning
SHOWN_CHARACTERS = 200  # of what each of them lost

# Characters that a vocabulary may lack: it then needs a token for them.
UNUSUAL = "".join(map(chr, range(256))) + "\u4e00"


class Tokenizer:
    """A CLIP tokenizer with a fixed length.

    Args:
      folder: holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; the padding token is the one
        that its config files name.
      length: S, BOS and EOS included.

    Attributes:
      length: S.
      vocab_size: one more than the largest id.

    Raises:
      ValueError: the files are damaged, or those of another tokenizer.
    """

    def __init__(self, folder: Path, length: int):
        # transformers greets everyone who has no torch with a warning; here nobody needs it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import CLIPTokenizerFast  # a second to import, and only prompts need it

        try:
            for file in tokenizer_files(folder):
                if file.suffix == ".json":
                    read_json(file)
                else:
                    read_bounded(file)
            self._tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
            marks = [getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
            if not all(type(mark) is int and 0 <= mark < self.vocab_size for mark in marks):
                raise ValueError(f"ids of begin, end and padding are {marks}")
            self._split(["a word", UNUSUAL])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the tokenizers library raises nothing more special, and its panics are bare
            raise ValueError(f"the tokenizer in {folder} is damaged: {' '.join(str(error).split())}") from error
        self.length = length

    def __call__(self, texts: Sequence[str], long_prompt: LongPrompt = "truncate") -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of captions.

        Args:
          texts: B captions; "" is a caption of no tokens.
          long_prompt: what to do with a caption that is too long: ``truncate`` it with a warning that
            shows the words cut off, make it an ``error``, or ``chunk`` it into pieces of S - 2 tokens,
            with a warning.

        Returns:
          ids int32 ``[B, S]`` and mask bool ``[B, S]``; with ``chunk`` S times the pieces of the longest caption.
          Pieces that a shorter caption does not have are padding.

        Raises:
          ValueError: a caption is too long and ``long_prompt`` is ``error``, or has another value.
        """
        if long_prompt not in get_args(LongPrompt):
            raise ValueError(f"long_prompt={long_prompt!r}; valid: {', '.join(get_args(LongPrompt))}")
        if isinstance(texts, str):
            raise ValueError(f"expected a list of captions, got the single string {texts!r}")
        room = self.length - 2
        found = self._split(texts)
        longest = max((len(tokens) for tokens, _ in found), default=0)
        pieces = max(1, -(-longest // room)) if long_prompt == "chunk" else 1
        ids = np.full((len(texts), pieces, self.length), self._tokenizer.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        cut = []
        for i, (text, (tokens, offsets)) in enumerate(zip(texts, found, strict=True)):
            if len(tokens) > pieces * room:
                cut.append((len(tokens) + 2, _words_from(text, offsets[room][0])))
            for piece, first in enumerate(range(0, max(len(tokens), 1), room)[:pieces]):
                row = [self._tokenizer.bos_token_id, *tokens[first : first + room], self._tokenizer.eos_token_id]
                ids[i, piece, : len(row)] = row
                mask[i, piece, : len(row)] = True
        if cut:
            message = self._long_message(cut, len(texts))
            if long_prompt == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        if pieces > 1:
            count = int(mask[:, 1].any(1).sum())
            told = (
                f"{count} of {len(texts)} captions are longer than {self.length} tokens: read in pieces, up to {pieces}"
            )
            warnings.warn(f"{told}; training never showed more than one", stacklevel=2)
        shape = (len(texts), pieces * self.length)
        return ids.reshape(shape), mask.reshape(shape)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """How many tokens captions have, BOS and EOS included, before any is cut: int64 ``[B]``."""
        return np.array([len(tokens) + 2 for tokens, _ in self._split(texts)], np.int64)

    def has_tokens_of(self, other: "Tokenizer") -> bool:
        """Whether both have the same vocabulary and merges; which token pads, they may disagree on."""
        vocabulary, merges = (
            [json.loads(one._tokenizer.backend_tokenizer.to_str())["model"][key] for one in (self, other)]
            for key in ("vocab", "merges")
        )
        return vocabulary[0] == vocabulary[1] and merges[0] == merges[1]

    def _split(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Per caption its tokens, without BOS and EOS, and where in the text each begins and ends."""
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _long_message(self, cut: list[tuple[int, str]], total: int) -> str:
        """How many captions were too long, and of the first few how long they are and what they lost."""
        shown = []
        for count, lost in cut[:SHOWN_CAPTIONS]:
            dots = "..." if len(lost) > SHOWN_CHARACTERS else ""
            shown.append(f"one has {count}, cut off: {lost[:SHOWN_CHARACTERS] + dots!r}")
        if len(cut) > SHOWN_CAPTIONS:
            shown.append(f"and {len(cut) - SHOWN_CAPTIONS} more")
        return f"{len(cut)} of {total} captions are longer than {self.length} tokens: {'; '.join(shown)}"


def find_tokenizer(folder: Path) -> Path:
    """The folder of the tokenizer of the text encoder in ``folder``: itself, or its sibling.

    ``text_encoder`` goes with ``tokenizer``, ``text_encoder_2`` with ``tokenizer_2``.

    Raises:
      FileNotFoundError: neither holds a tokenizer.
    """
    sibling = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    candidates = [folder, sibling] if sibling != folder else [folder, folder.parent / "tokenizer"]
    for candidate in candidates:
        has_vocabulary = (candidate / "vocab.json").is_file() and (candidate / "merges.txt").is_file()
        if has_vocabulary or (candidate / "tokenizer.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"no tokenizer for {folder}: neither vocab.json with merges.txt nor tokenizer.json in "
        f"{' or '.join(str(candidate) for candidate in candidates)}"
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in ``folder``, without what else lies there."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def _words_from(text: str, start: int) -> str:
    """The rest of the text, from the beginning of the word that ``start`` lies in."""
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    return " ".join(text[start:].split())
