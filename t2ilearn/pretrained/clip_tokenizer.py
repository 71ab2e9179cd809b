"""The byte-pair tokenizer of the released CLIP models (Radford et al. 2021, section 2.4).

    caption  →  cleaned, lower case  →  words and marks  →  pieces by merges  →  START … END 0 … 0

The merges come from a file of the authors, `bpe_simple_vocab_16e6.txt.gz` (MIT licence), which does
not ship here: `download.download("clip-vocabulary")` fetches it, and the wheel of open_clip holds
it. A file `merges.txt` of Hugging Face serves as well. The merging is the `tokenizers` library's.

| name | what it is |
|---|---|
| `CLIPTokenizer.from_file` | path → tokenizer of 49,408 tokens and a context of 77 |
| `clean` | what is done to a caption before it is cut into words |

Differs from the authors' code in: their tokenizer first repairs text with the package `ftfy`; give
`repair=ftfy.fix_text` for that. Without it captions are put into Unicode's NFC only, and differ
where a caption holds curly quotes, ligatures, full-width letters or wrongly decoded text. And
somebody who writes "<end_of_text>" means these characters, not the token.
"""

import gzip
import html
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int
from tokenizers import models, pre_tokenizers
from torch import Tensor

from t2ilearn.data.captions import CaptionError
from t2ilearn.weights import WeightsError

MERGES = 49152 - 256 - 2  # of the file's merges only so many are used
TEXT_LENGTH = 77
START_TOKEN, END_TOKEN = MERGES + 512, MERGES + 513
# Contractions, words, single digits, runs of other marks; white space lies between them.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"


def byte_characters() -> list[str]:
    """The character that stands for each byte in the file of merges, in the vocabulary's order:
    visible bytes stand for themselves, the others for characters from 256 up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(len(hidden))]


def clean(caption: str, repair: Callable[[str], str] | None = None) -> str:
    """A caption as it is cut into words: entities such as &amp; read twice, as on web pages, white
    space joined, lower case.

    Args:
        repair: applied first; None for Unicode's NFC.
    """
    text = unicodedata.normalize("NFC", caption) if repair is None else repair(caption)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


class CLIPTokenizer:
    """Captions → rows of T ids. Implements `data.Tokenizer`.

    Args:
        merges: pairs of pieces, the first to be merged first.
        length: T, the start and the end included.
        repair: see `clean`.

    Raises:
        ValueError: if T leaves no room for text.
    """

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        length: int = TEXT_LENGTH,
        repair: Callable[[str], str] | None = None,
    ) -> None:
        if length < 3:
            raise ValueError(f"A caption needs three ids at least, not {length}.")
        pieces = byte_characters()
        pieces += [piece + _WORD_END for piece in pieces] + ["".join(pair) for pair in merges]
        bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece: number for number, piece in enumerate(pieces)},
                merges=list(merges),
                end_of_word_suffix=_WORD_END,
            )
        )
        words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        self._bpe, self.length, self._repair = bpe, length, repair
        self.start, self.end = len(pieces), len(pieces) + 1

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        length: int = TEXT_LENGTH,
        repair: Callable[[str], str] | None = None,
    ) -> "CLIPTokenizer":
        """The released models' tokenizer from the file of its merges.

        Args:
            path: `bpe_simple_vocab_16e6.txt.gz`, or the same as text.

        Raises:
            WeightsError: if the file is missing, damaged or another one.
        """
        return cls(read_merges(Path(path)), length, repair)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.end + 1

    def encode(self, captions: Sequence[str], truncate: bool = False) -> Int[Tensor, "b t"]:
        """Ids of captions: the start token, pieces, the end token, then 0.

        Args:
            truncate: cut captions that are too long, as the authors' code does. The end token
                stays, and what the caption says beyond is lost.

        Raises:
            CaptionError: for a caption of more than T − 2 pieces, unless `truncate`, or with a
                character that is not valid Unicode.
        """
        ids = torch.zeros(len(captions), self.length, dtype=torch.int64)
        texts = [clean(caption, self._repair) for caption in captions]
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise CaptionError(f"The caption {text[:40]!r} holds half of a Unicode pair.")
        for row, found in enumerate(self._bpe.encode_batch(texts, add_special_tokens=False)):
            pieces, most = found.ids, self.length - 2
            if len(pieces) > most and not truncate:
                raise CaptionError(
                    f"The caption {captions[row][:40]!r} … has {len(pieces)} pieces; at most "
                    f"{most} fit. Say it shorter, or encode it with truncate=True."
                )
            tokens = [self.start, *pieces[:most], self.end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of the released vocabulary, in order.

    Raises:
        WeightsError: if the file is missing, damaged or another one.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        raise WeightsError(
            f"There is no file {path}. Fetch bpe_simple_vocab_16e6.txt.gz: "
            'download("clip-vocabulary").'
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is no vocabulary of CLIP, or damaged: {error}.") from None
    lines = text.split("\n")[1 : MERGES + 1]  # the first line names the version
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) < MERGES or any(len(pair) != 2 for pair in pairs):
        raise WeightsError(
            f"{path} is not the vocabulary of CLIP: it has not {MERGES:,} lines of two pieces each "
            "below a first line."
        )
    return pairs  # type: ignore[return-value]
