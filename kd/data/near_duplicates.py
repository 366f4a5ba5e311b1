"""Texts that repeat one another: nearly (MinHash of word trigrams), or in a long run of words."""

import hashlib
import re

from datasketch import MinHash, MinHashLSH

# Chinese and Japanese put no spaces between words: there a character counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
RUN = 13  # words; Brown et al. 2020 (GPT-3), appendix C
SHORTEST = 5  # words; shorter texts repeat one another by chance


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def repeated_share(text: str) -> float:
    """Share of the word 4-grams that occurred earlier in the text; 0 where it is too short."""
    found = words(text)
    grams = [tuple(found[i : i + 4]) for i in range(len(found) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class NearDuplicates:
    """Remembers texts; `seen` tells whether a text nearly repeats an earlier one.

    `similarity` is the Jaccard similarity of word trigrams at which two texts count as one,
    estimated from `permutations` hashes.
    """

    def __init__(self, similarity: float, permutations: int = 128) -> None:
        self.index = MinHashLSH(threshold=similarity, num_perm=permutations)
        self.permutations = permutations
        self.exact: set[str] = set()

    def seen(self, text: str) -> bool:
        found = words(text)
        key = " ".join(found)
        if key in self.exact:
            return True
        self.exact.add(key)
        shingles = {" ".join(found[i : i + 3]) for i in range(max(1, len(found) - 2))}
        sketch = MinHash(num_perm=self.permutations, seed=1, hashfunc=_hash32)
        sketch.update_batch([s.encode() for s in shingles])
        if self.index.query(sketch):
            return True
        self.index.insert(len(self.exact), sketch, check_duplication=False)
        return False


class Overlap:
    """Tells whether a text shares RUN words in a row with one of `texts`, or has it whole in it.

    A text of fewer than SHORTEST words must be equal.
    """

    def __init__(self, texts: list[str]) -> None:
        self.runs: dict[int, set[str]] = {}  # length -> runs of so many words
        self.whole: set[str] = set()
        for found in map(words, texts):
            if len(found) < SHORTEST:
                self.whole.add(" ".join(found))
                continue
            n = min(len(found), RUN)
            self.runs.setdefault(n, set()).update(runs(found, n))
        self.whole.discard("")

    def found_in(self, text: str) -> bool:
        found = words(text)
        return " ".join(found) in self.whole or any(
            not known.isdisjoint(runs(found, n)) for n, known in self.runs.items()
        )


def runs(found: list[str], n: int) -> list[str]:
    return [" ".join(found[i : i + n]) for i in range(len(found) - n + 1)]


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
