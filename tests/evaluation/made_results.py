"""Result files of models that do not exist: every metric is chosen here, so that it is known."""

import json
import math

import numpy as np

from kd.evaluation.judge.judge_results import means, means_by

# name: (text perplexity, chat perplexity, KL to teacher); None: not measured
METRICS = {
    "teacher": (20.0, 8.0, None),
    "start": (45.0, 60.0, 0.9),
    "distill-seed0": (30.0, 11.0, 0.20),
    "distill-seed1": (31.0, 11.5, 0.22),
    "distill-seed2": (30.5, 11.1, 0.21),
    "mix-seed0": (30.4, 12.0, 0.25),
    "mix-seed2": (31.4, 12.2, None),
    "sft-seed0": (50.0, 13.0, 0.50),
    "sft-seed1": (51.0, 13.3, 0.52),
    "sft-seed2": (52.0, 13.1, 0.51),
}
SETTINGS = {
    "rows_hash": "rows",
    "max_length": 64,
    "vocabulary_hash": "words",
    "chat_template_hash": "template",
    "dtype": "float32",
    "device": "cpu",
    "attn_implementation": "sdpa",
}
TEXT_TOKENS, CHAT_TOKENS, TEXT_BYTES, ROWS = 400, 100, 1500, 20
GRADED = ("teacher", "start", "distill-seed0")
BENCHMARKED = (
    "teacher",
    "start",
    "distill-seed0",
    "distill-seed1",
    "sft-seed0",
    "sft-seed1",
    "mix-seed0",
)


def models_of(setting):
    return [name for name in METRICS if name.split("-seed")[0] == setting]


def jitter(name, count):
    """Noise of a model that adds up to 0, so that the means stay those of METRICS."""
    draw = np.random.default_rng(sum(name.encode())).normal(0, 0.3, count)
    return draw - draw.mean()


def likelihood(name, text, chat):
    def means(tokens, perplexity, size):
        nats = tokens * math.log(perplexity)
        bits = nats / math.log(2) / size if size else None
        return {"tokens": tokens, "nats": nats, "perplexity": perplexity, "bits_per_byte": bits}

    kinds = {
        "text": means(TEXT_TOKENS, text, TEXT_BYTES),
        "chat": means(CHAT_TOKENS, chat, None),
    }
    overall = {"bits_per_byte": kinds["text"]["bits_per_byte"]}
    sources = {"docs": kinds["text"], "talk": kinds["chat"]}
    rows = [
        {
            **{"source": source, "kind": kind, "index": i, "tokens": tokens // ROWS},
            "nats": tokens // ROWS * (math.log(perplexity) + noise),
            "bytes": size and size // ROWS,
        }
        for source, kind, tokens, perplexity, size in (
            ("docs", "text", TEXT_TOKENS, text, TEXT_BYTES),
            ("talk", "chat", CHAT_TOKENS, chat, None),
        )
        for i, noise in enumerate(jitter(name + kind, ROWS))
    ]
    return {"sources": sources, "kinds": kinds, "overall": overall, "rows": rows}


def agreement(name, kl):
    means = {"forward_kl": kl, "top1_agreement": math.exp(-kl)}
    rows = [
        {
            **{"source": "talk", "kind": "chat", "index": i, "tokens": 5},
            **{"forward_kl": 5 * (kl + noise / 10), "top1_agreement": 5 * math.exp(-kl)},
        }
        for i, noise in enumerate(jitter(name, ROWS))
    ]
    return {"sources": {"talk": means}, "kinds": {"chat": means}, "overall": means, "rows": rows}


def benchmark(name):
    """40 documents of a task where guessing scores a half; better models answer more correctly."""
    better = {"teacher": 34, "start": 21, "distill": 31, "mix": 27, "sft": 24}[name.split("-")[0]]
    right = np.random.default_rng(sum(name.encode())).permutation(
        [1.0] * better + [0.0] * (40 - better)
    )
    items = {"hashes": [f"d{i}" for i in range(40)], "values": {"acc,none": right.tolist()}}
    task = {"metrics": {"acc,none": float(right.mean())}, "chance": 0.5, "items": items}
    return {"tasks": {"boolq": task | {"version": 2.0, "num_fewshot": 0}}, "groups": {}}


def graded(name):
    """Six questions of two turns each; one grade is missing."""
    grades = np.random.default_rng(sum(name.encode())).integers(1, 11, 12).astype(float).tolist()
    items = [
        {"question_id": str(i // 2), "category": "ab"[i // 6], "turn": 1 + i % 2, "score": g}
        for i, g in enumerate(grades)
    ]
    items[3]["score"] = None
    turns = means_by(items, "turn", "score")
    categories = {
        c: means(part, "score") | {"turns": means_by(part, "turn", "score")}
        for c in "ab"
        for part in [[item for item in items if item["category"] == c]]
    }
    return {
        "overall": means(items, "score"),
        "turns": turns,
        "categories": categories,
        "items": items,
    }


def speed(name):
    size = 1000 if name == "teacher" else 400
    numbers = {
        "prefill_tokens_per_second": 9000.0 / size,
        "decoding_tokens_per_second": 700.0 / size,
        "first_token_seconds": 0.01,
        "peak_memory_bytes": None,
    }
    return {"parameters": size, "bytes_on_disk": 2 * size, "batch_sizes": {"1": numbers}}


def write(folder, metrics=METRICS, **other):
    versions = {"versions": {"torch": "2"}, "commit": "abc"}
    for name, (text, chat, kl) in metrics.items():
        settings = SETTINGS | {"model": name, "model_files_hash": name} | other.get(name, {})
        measured = {"perplexity": likelihood(name, text, chat)}
        if kl is not None:
            measured["agreement"] = agreement(name, kl)
        if name in BENCHMARKED:
            measured["benchmarks/boolq"] = benchmark(name)
        if name in GRADED:
            measured["judge/mt_bench/results"] = graded(name)
            measured["speed"] = speed(name)
        for part, result in measured.items():
            more = {}
            if part.startswith("judge"):
                more = {
                    "benchmark": "mt_bench",
                    "mode": "score",
                    "judge": "gpt-4o",
                    "baseline": None,
                }
            (folder / part).mkdir(parents=True, exist_ok=True)
            record = {"settings": settings | more, **versions, **result}
            (folder / part / f"{name}.json").write_text(json.dumps(record))
