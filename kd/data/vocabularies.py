"""The bytes of every token of two vocabularies, and classes of tokens that both vocabularies share.

Teacher and student tokenize text differently, so their next-token distributions are compared over a
partition that both share: one class for every pair of tokens with equal bytes. A token without such
a partner joins the class of its first token under the other tokenizer. For example, where a teacher
may go on with " distillation" and a student must first write " dist", both are in the class
" dist". Tokens without text (special tokens without a partner) join the class of the end of a turn.
So no class is empty on either side, and each distribution is mapped by a function of the token. A
divergence between the mapped distributions is therefore a true divergence, at most that of the text
itself (data processing inequality). Equal vocabularies, whatever their ids, give one class per
token.
"""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd.data.tokenizer import special_ids, turn_end

BLANK = "\u2581"  # SentencePiece's symbol for a space
Key = tuple[bool, bytes]  # whether a token is special, and its bytes


@dataclass(frozen=True)
class VocabularySide:
    """One of two vocabularies, V ids in K classes. Each class has one main id."""

    class_of: np.ndarray  # (V,)
    main: np.ndarray  # (K,) the id with the same bytes as the main id of the other side
    pieces: list[bytes]  # (V,) the bytes of each id


@dataclass(frozen=True)
class SharedVocabulary:
    """Student and teacher vocabulary with common classes."""

    student: VocabularySide
    teacher: VocabularySide

    @property
    def twin(self) -> np.ndarray:
        """(V of the student,) the teacher's id with the same bytes, or -1."""
        twin = np.full(len(self.student.class_of), -1, np.int64)
        twin[self.student.main] = self.teacher.main
        return twin

    def __str__(self) -> str:
        sizes = len(self.student.class_of), len(self.teacher.class_of)
        return (
            f"tokenizers: {len(self.student.main)} tokens map one to one; the student has "
            f"{sizes[0]}, the teacher {sizes[1]}"
        )


@functools.lru_cache(maxsize=2)  # takes seconds; rows and loss both need it
def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> SharedVocabulary:
    """Match two vocabularies. Raises ValueError as `token_bytes` does."""
    tokenizers = (student, teacher)
    pieces = [token_bytes(tokenizer) for tokenizer in tokenizers]
    keys = [ids_by_key(*both) for both in zip(tokenizers, pieces, strict=True)]
    pairs = end_pairs(student, teacher)
    pairs += equal_tokens(*keys, pairs)
    mains = np.array(pairs, np.int64).T  # (2, K)
    firsts = [first_tokens(keys[i], pieces[i], tokenizers[1 - i], keys[1 - i]) for i in (0, 1)]
    end = 0  # the first pair is the end of a turn
    classes = [np.full(len(found), -1, np.int64) for found in pieces]
    for i in (0, 1):
        classes[i][mains[i]] = np.arange(len(pairs))
    # In order of length: the first token of a token is shorter, so it has its class already.
    todo = [(len(pieces[i][x]), i, x) for i in (0, 1) for x in np.flatnonzero(classes[i] < 0)]
    for _, i, x in sorted(todo):
        first = firsts[i].get(x)
        classes[i][x] = end if first is None else classes[1 - i][first]
    sides = [VocabularySide(classes[i], mains[i], pieces[i]) for i in (0, 1)]
    return SharedVocabulary(*sides)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of each of V ids: a special token has its name's, an unused id none.

    Raises ValueError if the tokenizer is neither a byte-level BPE nor of SentencePiece's form.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    parts = [spec.get(name) for name in ("decoder", "pre_tokenizer", "normalizer")]
    found = json.dumps(parts, ensure_ascii=False)
    if '"ByteLevel"' in found:
        alphabet = byte_alphabet()

        def spell(token: str) -> bytes:
            return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)
    elif BLANK in found:
        in_bytes = bool(spec["model"].get("byte_fallback"))

        def spell(token: str) -> bytes:
            if in_bytes and is_byte(token):
                return bytes([int(token[3:5], 16)])
            return token.replace(BLANK, " ").encode()
    else:
        raise ValueError(
            f"align_tokenizers: the bytes of the tokens of {tokenizer.name_or_path} are unknown; "
            "wanted a tokenizer.json with a byte-level BPE or SentencePiece's blanks and bytes"
        )
    pieces = [b""] * len(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        pieces[i] = spell(token)
    for i, token in tokenizer.added_tokens_decoder.items():  # such as Gemma's runs of blanks
        name = token.content.encode()
        pieces[i] = name if token.special or BLANK not in found else spell(token.content)
    return pieces


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that stands for one in byte-level vocabularies (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def is_byte(token: str) -> bool:
    """Whether a token is a byte of SentencePiece's byte fallback, such as <0x0A>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def ids_by_key(tokenizer: PreTrainedTokenizerBase, pieces: list[bytes]) -> dict[Key, list[int]]:
    """Return the ids of each key; ids of a byte fallback come last."""
    special = special_ids(tokenizer)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    keys = defaultdict(list)
    for i in sorted(names, key=lambda i: (is_byte(names[i]), names[i])):
        if pieces[i]:
            keys[i in special, pieces[i]].append(i)
    return dict(keys)


def end_pairs(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Return the pair of end-of-turn ids, and that of EOS ids if it differs on both sides."""
    both = (student, teacher)
    text = tuple(tokenizer.eos_token_id for tokenizer in both)
    turns = map(turn_end, both)
    turn = tuple(eos if end is None else end for end, eos in zip(turns, text, strict=True))
    distinct = all(a != b for a, b in zip(turn, text, strict=True))
    return [turn, text] if distinct else [turn]


def equal_tokens(
    student: dict[Key, list[int]], teacher: dict[Key, list[int]], taken: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return pairs of ids with equal keys, without the ids of the pairs in `taken`."""
    used = [set(side) for side in zip(*taken, strict=True)]
    pairs = []
    for key in student.keys() & teacher.keys():
        ours = [i for i in student[key] if i not in used[0]]
        theirs = [i for i in teacher[key] if i not in used[1]]
        pairs += zip(ours, theirs, strict=False)
    return sorted(pairs)


def first_tokens(
    keys: dict[Key, list[int]],
    pieces: list[bytes],
    other: PreTrainedTokenizerBase,
    other_keys: dict[Key, list[int]],
) -> dict[int, int]:
    """Return, by id, the other side's first token of the bytes of each text token.

    If the other side has a token of equal bytes, it is that one. Otherwise it is the first token
    of the other tokenizer's tokenization, or, if that does not fit, the longest token that fits.
    """
    known = {piece: ids[0] for (special, piece), ids in other_keys.items() if not special}
    piece_of = {
        i: piece for (special, piece), ids in other_keys.items() if not special for i in ids
    }
    longest = max(map(len, known), default=0)
    probe = other("a", add_special_tokens=False)["input_ids"]
    # Some tokenizers prepend a blank to a text.
    blank = " " if piece_of.get(probe[0], b"").startswith(b" ") else ""
    first, texts = {}, {}
    for (special, piece), ids in keys.items():
        for i in [] if special else ids:
            if piece in known:
                first[i] = known[piece]  # a second token of the same bytes
            else:
                texts[i] = piece.decode(errors="replace").removeprefix(blank)
    cut = other(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
    for i, ids in zip(texts, cut, strict=True):
        piece, start = pieces[i], piece_of.get(ids[0]) if ids else None
        if start and len(start) < len(piece) and piece.startswith(start):
            first[i] = ids[0]
            continue
        lengths = range(min(longest, len(piece) - 1), 0, -1)
        fitting = next((piece[:n] for n in lengths if piece[:n] in known), None)
        if fitting:
            first[i] = known[fitting]
    return first
