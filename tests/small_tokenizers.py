"""Small tokenizers that split one text differently: byte-level BPE and SentencePiece-like."""

import json
from pathlib import Path

from small import CHATML, TEXT, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.data.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
HOSTILE = (
    "x = {\n\t'a': [1, 2.5e-3],\n    'b': f(*args)[0]}  # don't\r\n\r\n    return",
    "1234567890 3.14159 0x7fff 2024-12-31 \u00b2\u00bd \u0661\u0662",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u00ab\u0401\u00bb",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u662f2024\u5e74",
    " leading,  double,   triple \t tab \n\n\n \u00a0 no-break \u3000 wide   ",
    "\U0001f642\U0001f469\u200d\U0001f4bb caf\u00e9 cafe\u0301 \u202eright-to-left",
    "_foo (bar) DON'T it's '''quoted''' <|im_start|>user\nno<|im_end|>",
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(
    kind: str = "bpe", vocab_size: int = 300, front: bool = True, texts: list[str] = TEXT
) -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as U+2581 and unknown characters as bytes.

    `front` adds a space at the start of a text. Llama 2's kind is (bpe, front), Gemma's is (bpe, no
    front), and T5's and XLM's is unigram.
    """
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False,
            initial_alphabet=["\n"],
        )  # fmt: skip
    steps = [normalizers.Prepend("\u2581")] if front else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    if kind == "bpe":
        vocab |= {name: len(vocab) + i for i, name in enumerate(BYTES)}
    else:
        spec["model"]["byte_fallback"] = True
        vocab += [[name, -20.0] for name in BYTES]
    spec["pre_tokenizer"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        chat_template=CHATML,
    )


def permuted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens and merges with other ids."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, last = spec["model"]["vocab"], len(tokenizer) - 1
    spec["model"]["vocab"] = {token: last - i for token, i in vocab.items()}
    for added in spec["added_tokens"]:
        added["id"] = last - added["id"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


OTHER_TEXT = [
    *TEXT,
    "The list of the things that are kept in a dictionary of names, in order. " * 3,
]
TOKENIZERS = {
    "byte-level": small_tokenizer(),
    "larger byte-level": small_tokenizer(460, OTHER_TEXT, eos_token="<|endoftext|>"),
    "Llama 2's": sentencepiece(),
    "Gemma's": sentencepiece(front=False, vocab_size=400, texts=OTHER_TEXT),
    "unigram": sentencepiece("unigram", vocab_size=160),
}


def check_cuts_as_its_file(folder: Path) -> None:
    """Assert that a folder's tokenizer, as loaded, and its tokenizer.json cut all texts alike."""
    by_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokenizer in (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
        for text in HOSTILE:
            assert tokenizer(text)["input_ids"] == by_file.encode(text).ids, text
