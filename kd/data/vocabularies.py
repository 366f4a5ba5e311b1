"""Two vocabularies as two ways to cut the same bytes: what tokens stand for, and common classes.

Teacher and student cut text differently, so their next-token distributions are compared over a
partition that both know: a class for every token of equal bytes in both vocabularies. A token that
only one side has goes to the class of the token that its text begins with when the other side cuts
it: where a teacher may go on with " distillation" and a student must write " dist" first, both are
the class " dist". Tokens of no text (special ones without a partner) join the class of the end of a
turn. So no class is empty on one side, each distribution is mapped by a function of the token, and
a divergence of the two images is a true one, at most that of the text itself (data processing
inequality). Equal vocabularies, whatever their ids, give one class a token.
"""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd.data.tokenizer import special_ids, turn_end

BLANK = "\u2581"  # SentencePiece's sign for a space
Key = tuple[bool, bytes]  # whether the token is special; what it stands for


@dataclass(frozen=True)
class Side:
    """One of two vocabularies. Ids (V,) fall into K classes, each with one main token."""

    class_of: np.ndarray  # (V,)
    main: np.ndarray  # (K,) the id that has a partner of equal bytes on the other side
    pieces: list[bytes]  # what each id stands for

    @property
    def alone(self) -> np.ndarray:
        """(V,) True where a class has no second id."""
        return np.bincount(self.class_of, minlength=len(self.main))[self.class_of] == 1


@dataclass(frozen=True)
class SharedVocabulary:
    student: Side
    teacher: Side

    @property
    def twin(self) -> np.ndarray:
        """(V of the student,) the teacher's id of the same bytes, -1 where there is none."""
        twin = np.full(len(self.student.class_of), -1, np.int64)
        twin[self.student.main] = self.teacher.main
        return twin

    def __str__(self) -> str:
        sizes = len(self.student.class_of), len(self.teacher.class_of)
        return (
            f"tokenizers: {len(self.student.main)} tokens map one to one, of {sizes[0]} of the "
            f"student and {sizes[1]} of the teacher"
        )


@functools.lru_cache(maxsize=2)  # some seconds, and rows and loss both ask for it
def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> SharedVocabulary:
    """Raises ValueError where a tokenizer does not tell which bytes its tokens stand for."""
    tokenizers = (student, teacher)
    pieces = [token_bytes(tokenizer) for tokenizer in tokenizers]
    keys = [keys_of(tokenizer, found) for tokenizer, found in zip(tokenizers, pieces, strict=True)]
    pairs = end_pairs(student, teacher)
    pairs += equal_tokens(*keys, pairs)
    mains = np.array(pairs, np.int64).T  # (2, K)
    trees = [first_tokens(keys[i], pieces[i], tokenizers[1 - i], keys[1 - i]) for i in (0, 1)]
    end = 0  # the first pair ends a turn
    classes = [np.full(len(found), -1, np.int64) for found in pieces]
    for i in (0, 1):
        classes[i][mains[i]] = np.arange(len(pairs))
    # In order of length: what a token begins with is shorter, and has its class already.
    todo = [(len(pieces[i][x]), i, x) for i in (0, 1) for x in np.flatnonzero(classes[i] < 0)]
    for _, i, x in sorted(todo):
        first = trees[i].get(x)
        classes[i][x] = end if first is None else classes[1 - i][first]
    sides = [Side(classes[i], mains[i], pieces[i]) for i in (0, 1)]
    return SharedVocabulary(*sides)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each id stands for in a text; special tokens for their names, unused ids for nothing."""
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
            f"align_tokenizers: {tokenizer.name_or_path} does not tell which bytes its tokens stand "
            "for; wanted a byte-level BPE, or SentencePiece's blanks and bytes, in a tokenizer.json"
        )
    pieces = [b""] * len(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        pieces[i] = spell(token)
    for i, token in tokenizer.added_tokens_decoder.items():  # Gemma's runs of blanks are such
        name = token.content.encode()
        pieces[i] = name if token.special or BLANK not in found else spell(token.content)
    return pieces


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def keys_of(tokenizer: PreTrainedTokenizerBase, pieces: list[bytes]) -> dict[Key, list[int]]:
    """The ids of each meaning; where several have one, bytes of a fallback come last."""
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
    """The ends of a turn, and the ends of a text where those are others on both sides."""
    both = (student, teacher)
    text = tuple(tokenizer.eos_token_id for tokenizer in both)
    turns = map(turn_end, both)
    turn = tuple(eos if end is None else end for end, eos in zip(turns, text, strict=True))
    distinct = all(a != b for a, b in zip(turn, text, strict=True))
    return [turn, text] if distinct else [turn]


def equal_tokens(
    student: dict[Key, list[int]], teacher: dict[Key, list[int]], taken: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Pairs of ids with equal meaning, without those that have a partner already."""
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
    """The other side's id with which each text token begins, if that has no equal one or several.

    As the other tokenizer cuts it; where it cannot be asked, the longest that fits.
    """
    known = {piece: ids[0] for (special, piece), ids in other_keys.items() if not special}
    piece_of = {
        i: piece for (special, piece), ids in other_keys.items() if not special for i in ids
    }
    longest = max(map(len, known), default=0)
    begins = other("a", add_special_tokens=False)["input_ids"]
    blank = " " if piece_of.get(begins[0], b"").startswith(b" ") else ""  # that it puts in front
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
