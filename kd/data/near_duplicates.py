"""Find near-duplicate texts (MinHash of word trigrams) and long word n-grams in common."""

import hashlib
import re

from datasketch import MinHash, MinHashLSH

# Chinese and Japanese have no spaces between words, so each character counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
NGRAM = 13  # words; Brown et al. 2020 (GPT-3), appendix C
MIN_WORDS = 5  # shorter texts occur in one another by chance


def words(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return WORD.findall(text.lower())


def repeated_share(text: str) -> float:
    """Return the share of word 4-grams that repeat an earlier one; 0 if the text is too short."""
    found = words(text)
    grams = [tuple(found[i : i + 4]) for i in range(len(found) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class NearDuplicates:
    """Remembers texts and recognizes near-duplicates of them.

    Two texts are near-duplicates if the Jaccard similarity of their word trigrams reaches
    `similarity`, as estimated from `permutations` hashes.
    """

    def __init__(self, similarity: float, permutations: int = 128) -> None:
        self.index = MinHashLSH(threshold=similarity, num_perm=permutations)
        self.permutations = permutations
        self.exact: set[str] = set()

    def seen(self, text: str) -> bool:
        """Whether the text is a near-duplicate of an earlier one; if not, remember it."""
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
    """Recognizes texts that share a word n-gram with one of `texts`.

    n is NGRAM, or the length of a shorter text, which must then occur as a whole. A text of fewer
    than MIN_WORDS words must be equal.
    """

    def __init__(self, texts: list[str]) -> None:
        self.ngrams: dict[int, set[str]] = {}  # n -> n-grams
        self.short: set[str] = set()
        for found in map(words, texts):
            if len(found) < MIN_WORDS:
                self.short.add(" ".join(found))
                continue
            n = min(len(found), NGRAM)
            self.ngrams.setdefault(n, set()).update(ngrams(found, n))
        self.short.discard("")

    def found_in(self, text: str) -> bool:
        """Whether the text overlaps with one of the texts."""
        found = words(text)
        return " ".join(found) in self.short or any(
            not known.isdisjoint(ngrams(found, n)) for n, known in self.ngrams.items()
        )


def ngrams(found: list[str], n: int) -> list[str]:
    """Return the n-grams of a list of words."""
    return [" ".join(found[i : i + n]) for i in range(len(found) - n + 1)]


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
