"""Byte-pair encoding: captions of any world, in any language, as token ids (Sennrich et al. 2016).

Start with the 256 bytes; merge the pair that occurs most often into a new token; repeat. Frequent
words end as one token, rare ones as several pieces, and nothing is unknown, for every text is made
of bytes (Radford et al. 2019). The merging itself is the `tokenizers` library's; what is ours is
the frame that every caption gets, the same as for the shapes world's forty words (`captions`):

    t e x t  END  PAD … PAD        or        NULL  END  PAD … PAD    for no caption at all

Differs from the papers in: captions are lower-cased and normalised (NFKC), white space is one
blank; no token marks the start, since a prior has a start of its own.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from t2ilearn.data.captions import CaptionError, check_unicode
from t2ilearn.models.tokens import END, PAD
from t2ilearn.weights import ASSETS, write_atomically

SHARED = ASSETS / "tokenizer.json"  # learned from the captions of both worlds
SHARED_LENGTH = 28  # the longest caption of either grammar has 24 tokens, and END
SPECIAL = ("<pad>", "<end>", "<null>")  # in the order of `tokens`: 0, 1, 2
SMALLEST = len(SPECIAL) + 256  # the bytes and nothing merged
ROOM = 31  # tokens that a fitted tokenizer has room for at least: so many bytes of any text
LISTED = 20  # captions that an error spells out


class CaptionTokenizer:
    """Captions ⇄ rows of T ids.

    Args:
        bpe: a tokenizer of the `tokenizers` library whose first three tokens are `SPECIAL`.
        length: T, with END and padding.

    Raises:
        ValueError: if the tokenizer has other special tokens, or T leaves no room for text.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, length: int = 32) -> None:
        found = tuple(bpe.id_to_token(i) for i in range(len(SPECIAL)))
        if found != SPECIAL:
            raise ValueError(f"The first tokens must be {SPECIAL}, not {found}.")
        if length < 2:
            raise ValueError(f"A caption needs two ids at least, not {length}.")
        bpe.encode_special_tokens = True  # somebody who writes "<end>" means these five characters
        self._bpe, self.length = bpe, length

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self._bpe.get_vocab_size()

    @classmethod
    def train(
        cls, captions: Iterable[str], vocabulary: int = 2048, length: int = 32
    ) -> "CaptionTokenizer":
        """Learn merges from captions until there are `vocabulary` tokens or nothing recurs.

        Raises:
            ValueError: if the vocabulary has no room for the 256 bytes.
            CaptionError: if a caption holds half of a Unicode pair.
        """
        captions = list(captions)
        for caption in captions:
            check_unicode(caption)
        if vocabulary < SMALLEST:
            raise ValueError(f"The smallest vocabulary has {SMALLEST} tokens, not {vocabulary}.")
        bpe = tokenizers.Tokenizer(models.BPE())
        # White space of any kind becomes one blank, and every word, the first too, begins with it.
        bpe.normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Lowercase(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, length)

    def fitted(self, captions: Sequence[str], limit: int = 96) -> "CaptionTokenizer":
        """The same with a T, at most `limit`, that all these captions fit into, with room to spare.

        A word that was not learned from falls apart into as many pieces as it has bytes. So there
        is room for twice the tokens of the longest caption, and for `ROOM` tokens in any case. A
        prior trained on these captions alone learns nothing of the places beyond the longest.

        Raises:
            CaptionError: if some captions have more than `limit` − 1 tokens; the first are listed.
                Or if one holds half of a Unicode pair.
        """
        for caption in captions:
            check_unicode(caption)
        found = self._bpe.encode_batch(list(captions))
        counts = [len(each.ids) for each in found]
        over = {c: n for c, n in zip(captions, counts, strict=True) if n >= limit}
        if over:
            lines = [f"{n} tokens: {c[:60]!r} …" for c, n in over.items()]
            if len(lines) > LISTED:
                lines[LISTED:] = [f"… and {len(lines) - LISTED:,} more"]
            raise CaptionError(
                f"At most {limit - 1} tokens of a caption fit; say these shorter:\n  "
                + "\n  ".join(lines)
            )
        room = max(ROOM, 2 * max(counts, default=0))
        return CaptionTokenizer(self._bpe, min(room + 1, limit))

    def save(self, path: Path) -> dict[str, Any]:
        """Write a JSON file that `load` and the `tokenizers` library read.

        Returns:
            What a card says of it: its name, T and its SHA-256.

        Raises:
            OSError: if it cannot be written; an older file is then untouched.
        """
        data = self._bpe.to_str(pretty=True).encode("utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        digest = hashlib.sha256(data).hexdigest()
        return {"file": path.name, "length": self.length, "sha256": digest}

    @classmethod
    def load(cls, path: str | Path, length: int = 32) -> "CaptionTokenizer":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing, damaged or another kind of tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls(tokenizers.Tokenizer.from_str(text), length)
        except FileNotFoundError:
            raise ValueError(f"There is no tokenizer {path}.") from None
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise ValueError(f"{path} is not a tokenizer of ours: {error}") from None

    @classmethod
    def shared(cls) -> "CaptionTokenizer":
        """The one that ships, learned from the captions of both worlds."""
        return cls.load(SHARED, SHARED_LENGTH)

    def encode(self, captions: Sequence[str]) -> Int[Tensor, "b t"]:
        """Token ids of captions, each ended by END and padded with PAD.

        Raises:
            CaptionError: for an empty caption, one of more than T − 1 tokens, or one with half of a
                Unicode pair.
        """
        for caption in captions:
            check_unicode(caption)
        ids = torch.full((len(captions), self.length), PAD, dtype=torch.int64)
        for row, found in enumerate(self._bpe.encode_batch(list(captions))):
            if not found.ids:
                raise CaptionError("The caption is empty.")
            if len(found.ids) >= self.length:
                raise CaptionError(
                    f"The caption {captions[row][:40]!r} … has {len(found.ids)} tokens; at most "
                    f"{self.length - 1} fit. Say it shorter."
                )
            ids[row, : len(found.ids)] = torch.tensor(found.ids)
            ids[row, len(found.ids)] = END
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a row of ids, normalised, without special tokens."""
        return self._bpe.decode([i for i in ids if i >= len(SPECIAL)]).strip()

    def pieces(self, caption: str) -> list[str]:
        """How a caption falls apart, for people: blanks shown as they are. Raises CaptionError
        for half of a Unicode pair."""
        check_unicode(caption)
        ids = self._bpe.encode(caption).ids
        return [self._bpe.decode([i]) for i in ids]
