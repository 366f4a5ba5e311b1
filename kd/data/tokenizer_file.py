"""Check that a tokenizer reads text, and that it cuts text as its tokenizer.json does.

Transformers 5 builds many tokenizers from the vocabulary of tokenizer.json and the model type: the
pre-tokenizer and the normalizer of the file are then ignored. Programs that read the file itself
cut text in another way.
"""

import unicodedata
from collections import Counter
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from kd.distributed import print_rank0

FILE = "tokenizer.json"
# A tokenizer that reads none of these has no vocabulary for any text.
SENTENCES = (
    "The river was low that summer, and nobody measured it.",
    "Река обмелела тем летом, и никто её не измерял.",
    "那年夏天河水很浅，没有人测量过。",
    "その夏は川の水が少なく、誰も測らなかった。",
    "그해 여름 강물은 얕았고 아무도 재지 않았다.",
    "كان النهر منخفضا ذلك الصيف ولم يقسه أحد.",
    "उस गर्मी में नदी उथली थी और किसी ने नहीं नापा।",
)
# Each begins with a word, because tokenizers rightly differ in the space before the first one.
PROBES = (
    "Code: def f(x_1, *args):\n\tif x_1[0] != 'a':\n        return {x_1: -1.5e-3}  # don't\r\n",
    "Digits: 1234567 3.14159 2024-12-31 0x7f",
    "Cyrillic: Привет, мир! Объём вырос.",
    "Chinese: 你好，世界。今天是2024年。",
    "Spaces:  two   three\n\n\n  indented \t tab ",
    "Emoji: \U0001f642\U0001f469\u200d\U0001f4bb naïve cafe\u0301 (foo)_bar don'T",
)


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a loaded tokenizer reads text, and compare it with the tokenizer.json of its name.

    Prints a note on rank 0 if the file cuts a probe differently. A space before the first word and
    special tokens around the text are no difference.

    Raises ValueError if the tokenizer can read hardly any text, or if it loses characters that the
    file keeps.
    """
    check_readable(name, tokenizer)
    file = tokenizer_file(name)
    if file is None or not tokenizer.is_fast:
        return
    by_file = Tokenizer.from_file(str(file))
    by_file.no_truncation()
    by_file.no_padding()
    for text in PROBES:
        here = tokenizer(text, add_special_tokens=False)["input_ids"]
        there = by_file.encode(text, add_special_tokens=False).ids
        if same_cut(text, here, there, by_file):
            continue
        ours, theirs = (
            kept(text, back) for back in (read_back(tokenizer, text), by_file.decode(there))
        )
        found = difference(here, there, by_file)
        if ours < theirs - 0.1:
            raise ValueError(
                f"{name}: {type(tokenizer).__name__} keeps {ours:.0%} of the characters of "
                f"{text!r}, but {FILE} {theirs:.0%} ({found}); wanted the same: the model type in "
                "config.json does not fit the tokenizer"
            )
        print_rank0(
            f"note: {name}: Transformers cuts text in another way than {FILE}: {found}. This run "
            "and the models that it saves cut as Transformers does; a model that was pre-trained "
            "as the file cuts then reads unusual tokens"
        )
        return


def check_readable(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if less than half of every sentence in `SENTENCES` can be read back."""
    share = max(kept(text, read_back(tokenizer, text)) for text in SENTENCES)
    if share < 0.5:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and keeps {share:.0%} of a plain "
            f"sentence; wanted one with its vocabulary: fetch {FILE} again"
        )


def tokenizer_file(name: str) -> Path | None:
    """The tokenizer.json of a folder, or of a hub name in the cache; None if there is none."""
    if Path(name).is_dir():
        file = Path(name) / FILE
        return file if file.is_file() else None
    cached = try_to_load_from_cache(name, FILE)
    return Path(cached) if isinstance(cached, str) else None


def same_cut(text: str, here: list[int], there: list[int], by_file: Tokenizer) -> bool:
    """Whether two lists of ids differ at most in the space before the first word."""
    same = 0
    while same < min(len(here), len(there)) and here[-1 - same] == there[-1 - same]:
        same += 1
    first_word = len(text.split()[0])
    heads = (by_file.decode(ids[: len(ids) - same]).strip() for ids in (here, there))
    return all(len(head) <= first_word for head in heads)


def difference(here: list[int], there: list[int], by_file: Tokenizer) -> str:
    """The first few pieces that differ, as words."""
    pairs = zip(here, there, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here), len(there)))
    ours, theirs = (
        [by_file.decode([i], skip_special_tokens=False) for i in ids[start : start + 4]]
        for ids in (here, there)
    )
    return f"{ours} instead of {theirs}"


def read_back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text of the ids of a text, without unknown ones."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    known = [i for i in ids if i != tokenizer.unk_token_id]
    return tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def kept(text: str, back: str) -> float:
    """The share of a text's characters that another text has, too, whatever their case."""
    wanted, found = (
        Counter("".join(unicodedata.normalize("NFKC", one).casefold().split()))
        for one in (text, back)
    )
    return (wanted & found).total() / wanted.total()
