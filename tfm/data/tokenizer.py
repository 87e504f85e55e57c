"""SentencePiece: text to token ids and back, one vocabulary for both languages.

Text is not normalised (rule "identity"): NFKC would turn "m²" into "m2" and "…" into "...", on the target side too, and
a reference that was never normalised would count each as an error. Byte fallback spells what the vocabulary lacks, so
that no text is ever unknown. Only blanks are folded, since a line of output must stay one line.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from etils import epath
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tfm.config import InputError
from tfm.data.corpus import single_line
from tfm.data.permutation import hash64
from tfm.files import write_atomically

PAD, EOS, BOS, UNK = 0, 1, 2, 3
_SPECIAL = {"pad_id": PAD, "eos_id": EOS, "bos_id": BOS, "unk_id": UNK}
NO_NORMALIZATION = "identity"
_BYTES = 256
_LEADING_TAG = re.compile(r"(<[^\s<>]+>) ?")
_THREADS = 16  # of training: fixed, since the order of its float sums, and so the pieces, depend on their number

_log = logging.getLogger(__name__)


class Tokenizer:
    """A trained SentencePiece model. Ids come without EOS and BOS; both are the caller's to add."""

    def __init__(self, model: bytes, origin: str = "tokenizer"):
        """Takes the bytes of a model file. Raises InputError where they are none, or lack what the project needs."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{origin}: not a SentencePiece model ({error}); give a .model file") from error
        processor = self._processor
        ids = {name: getattr(processor, name)() for name in _SPECIAL}
        if ids != _SPECIAL:
            given = " ".join(f"--{name}={value}" for name, value in _SPECIAL.items())
            raise InputError(
                f"{origin}: its special ids are {ids}; train it with {given} "
                f"--normalization_rule_name={NO_NORMALIZATION}, or leave data.tokenizer out"
            )
        self.vocab_size: int = processor.vocab_size()
        breaks = [processor.piece_to_id(piece) for piece in ("<0x0A>", "<0x0D>", "\n", "\r")]
        kinds = ModelProto.SentencePiece
        description = ModelProto.FromString(model)
        pieces = description.pieces
        self.normalization: str = description.normalizer_spec.name
        """The rule by which it rewrites text; `NO_NORMALIZATION` rewrites none."""
        # A learned piece may be in angle brackets, too, where a corpus has <1> or </b> in it.
        self._tags = {i for i, p in enumerate(pieces) if i > UNK and p.type in (kinds.USER_DEFINED, kinds.CONTROL)}
        self.banned_ids: tuple[int, ...] = tuple(sorted({PAD, BOS, UNK, *(i for i in breaks if i != UNK)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a model file. Raises InputError naming it."""
        try:
            model = epath.Path(path).read_bytes()
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: tokenizer cannot be read ({reason}); give a .model file") from error
        return cls(model, str(path))

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence, on all cores, without EOS.

        A line break within one counts as a blank; a tag that it begins with becomes the tag's id.
        """
        texts, tags = self._without_tags(sentences)
        rows = self._processor.encode(texts, out_type=int, num_threads=os.cpu_count() or 1)
        return _with_tags(rows, tags)

    def sample(self, sentences: Sequence[str], count: int, alpha: float, seed: int) -> list[list[list[int]]]:
        """`count` random segmentations of each sentence, as ids without EOS: [count, sentences, ...].

        Subword regularisation: unigram draws by probability to the power `alpha` (Kudo, 2018), BPE leaves out a merge
        with probability `alpha` (Provilkov et al., 2020). Equal arguments give equal draws.
        """
        texts, tags = self._without_tags(sentences)

        def draw() -> list[list[list[int]]]:
            encode = functools.partial(self._processor.encode, enable_sampling=True, nbest_size=-1, alpha=alpha)
            return [_with_tags([encode(text) for text in texts], tags) for _ in range(count)]

        # SentencePiece has one generator a thread, seeded when the thread first draws: only a new one starts afresh.
        sentencepiece.set_random_generator_seed(seed)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(draw).result()

    def _without_tags(self, sentences: Sequence[str]) -> tuple[list[str], dict[int, int]]:
        """The sentences as single lines without the tag that one begins with, and those tags' ids by index."""
        texts = [single_line(sentence) for sentence in sentences]
        tags: dict[int, int] = {}
        for index, text in enumerate(texts):
            if text.startswith("<"):
                texts[index], tag = self.split_tag(text)
                if tag is not None:
                    tags[index] = tag
        return texts, tags

    def split_tag(self, text: str) -> tuple[str, int | None]:
        """What follows the tag that the text begins with, and the tag's id, as a tagged corpus has them: no blank.

        The whole text and None where it begins with none.
        """
        found = _LEADING_TAG.match(text)
        token = self._processor.piece_to_id(found[1]) if found else UNK
        if found is None or token not in self._tags:
            return text, None
        return text[found.end() :], token

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each list of ids; bytes that are no UTF-8 become U+FFFD, and no result has a line break."""
        rows = [[int(token) for token in row] for row in ids]
        return [single_line(text) for text in self._processor.decode(rows, num_threads=os.cpu_count() or 1)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces that ids stand for, as the model spells them: `▁` begins a word, `<0xC3>` is a byte."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

    def ids(self, pieces: Sequence[str]) -> list[int]:
        """Ids of pieces. Raises InputError at one that isn't in the vocabulary, or that text is never made of."""
        ids = [self._processor.piece_to_id(piece) if _is_text(piece) else UNK for piece in pieces]
        for piece, token in zip(pieces, ids, strict=True):
            if token <= UNK:
                raise InputError(f"{piece!r} is no piece of this tokenizer: give pieces as it spells them, or text")
        return ids

    def tag_id(self, tag: str) -> int:
        """Id of a source tag such as <2de>. Raises InputError where the tokenizer doesn't know it."""
        token = self._processor.piece_to_id(tag)
        if token not in self._tags:
            raise InputError(
                f"tag {tag!r} is not in the tokenizer of {self.vocab_size} pieces: leave data.tokenizer (or "
                "training.initialize_from) out so that one is trained with it, or take the tag out of data.corpus"
            )
        return token


def _with_tags(rows: list[list[int]], tags: Mapping[int, int]) -> list[list[int]]:
    for index, tag in tags.items():
        rows[index].insert(0, tag)
    return rows


class SentenceSample:
    """At most `limit` sentences of a stream of pairs, each pair as likely as its weight says, wherever it stands.

    Which ones depends on their positions in the stream alone: the pairs with the smallest keys stay, a key being
    exponential with rate `weight` (Efraimidis and Spirakis, 2006), made from a hash of the position.
    """

    def __init__(self, limit: int):
        self._limit = max(1, limit // 2)
        self._seen = 0
        self._threshold = np.inf
        self._keys = np.zeros(0)
        self._pairs: list[tuple[str, str]] = []

    def add(self, pairs: Sequence[tuple[str, str]], weight: float = 1.0) -> None:
        """Takes the next pairs of the stream into account."""
        positions = np.arange(self._seen, self._seen + len(pairs))
        self._seen += len(pairs)
        keys = -np.log(_uniform(positions)) / weight
        chosen = np.flatnonzero(keys < self._threshold)
        self._keys = np.concatenate([self._keys, keys[chosen]])
        self._pairs += [pairs[i] for i in chosen]
        if len(self._pairs) > 2 * self._limit:
            self._cut()

    def _cut(self) -> None:
        if len(self._pairs) > self._limit:
            chosen = np.sort(np.argpartition(self._keys, self._limit)[: self._limit])
            self._keys = self._keys[chosen]
            self._pairs = [self._pairs[i] for i in chosen]
            self._threshold = self._keys.max()

    def sentences(self) -> list[str]:
        """The sentences drawn, sources and targets, in the order of the stream."""
        self._cut()
        return [sentence for pair in self._pairs for sentence in pair]


def _uniform(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A hash of each position as a number in (0, 1]."""
    return ((hash64(positions + 1, key=0) >> np.uint64(11)).astype(np.float64) + 1) / (1 << 53)


def train_tokenizer(
    sentences: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    tags: Sequence[str] = (),
    model_type: str = "unigram",
) -> Tokenizer:
    """Trains a tokenizer on sentences of both languages and writes it to `path`.

    The same sentences give the same model on any machine. A vocabulary that the sentences can't fill is lowered to what
    they can, with a warning; one too small for the bytes, the tags and the characters raises InputError, as do no
    sentences. `model_type` is "unigram" or "bpe".
    """
    output = io.BytesIO()
    lines = (line for line in map(single_line, sentences) if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=output,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name=NO_NORMALIZATION,
            user_defined_symbols=sorted(set(tags)),
            max_sentence_length=1 << 20,  # bytes; the default would pass long lines over without a word
            num_threads=_THREADS,
            minloglevel=2,
            **_SPECIAL,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(error, vocab_size) from error
    tokenizer = Tokenizer(output.getvalue())
    if tokenizer.vocab_size < vocab_size:
        _log.warning(
            "data.vocab_size=%d is more than this corpus can fill: the vocabulary has %d pieces",
            vocab_size,
            tokenizer.vocab_size,
        )
    write_atomically(Path(path), tokenizer.model)
    return tokenizer


def _training_error(error: Exception, vocab_size: int) -> InputError:
    message = " ".join(str(error).split())
    if found := re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message):
        return InputError(
            f"data.vocab_size={vocab_size} has no room for the {_BYTES} bytes, the special ids and the characters of "
            f"this corpus: set it to more than {found[2]}"
        )
    return InputError(f"data.vocab_size={vocab_size}: no tokenizer can be trained on this corpus: {message}")


def _is_text(piece: object) -> bool:
    """JSON may hold half of a surrogate pair, which is none."""
    return isinstance(piece, str) and not re.search("[\ud800-\udfff]", piece)
