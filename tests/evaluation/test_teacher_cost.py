"""The cost of quantizing a teacher equals that of full logits in float64."""

import json
import math

import pytest
import torch
from held_out import MAX_LENGTH, command, inside, sources
from scripts import quantize
from transformers import AutoModelForCausalLM

from kd.data.encoding import encode_rows
from kd.data.sources import load_rows
from kd.data.tokenizer import load_tokenizer
from kd.models.sharding import load_unsharded


@torch.no_grad()
def expected(house) -> dict[str, float]:
    tokenizer = load_tokenizer(str(house / "teacher"))
    rows, _ = encode_rows(load_rows(sources(house), 0), tokenizer, MAX_LENGTH)
    one = AutoModelForCausalLM.from_pretrained(house / "teacher")
    other = load_unsharded(str(house / "teacher-awq"), "sdpa", "float32", torch.device("cpu"))
    sums = torch.zeros(4, dtype=torch.float64)
    for row in rows:
        ids, labels = torch.tensor(row.input_ids)[None], torch.tensor(row.labels[1:])
        target = labels[labels != -100]
        p, q = (
            model(input_ids=ids).logits[0, :-1, : len(tokenizer)][labels != -100].double()
            for model in (one, other)
        )
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        equal = (p.argmax(-1) == q.argmax(-1)).sum()
        hard = [-x.gather(-1, target[:, None]).sum() for x in (p, q)]
        sums += torch.stack([(p.exp() * (p - q)).sum(), equal, *hard])
    kl, equal, theirs, ours = (sums / sum(row.targets for row in rows)).tolist()
    return {
        "forward_kl": kl,
        "top1_agreement": equal,
        "teacher_perplexity": math.exp(theirs),
        "perplexity": math.exp(ours),
    }


def test_the_cost_equals_that_of_full_logits_in_float64(house, tmp_path):
    quantize(house / "teacher", house / "teacher-awq", 16)
    arguments = [
        *("--teacher", house / "teacher", "--models", f"awq={house / 'teacher-awq'}"),
        *("--data", json.dumps(sources(house)), "--max_length", MAX_LENGTH),
        *("--dtype", "float32", "--out_dir", tmp_path),
    ]
    done = command("teacher_cost.py", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "teacher_cost" / "awq.json").read_text())
    wanted = expected(house)
    assert wanted["forward_kl"] > 1e-3 and wanted["top1_agreement"] < 1.0
    for name, value in wanted.items():
        assert result["overall"][name] == pytest.approx(value, rel=1e-4), name
    assert result["bytes"] < 0.8 * result["teacher_bytes"]  # its tied embeddings are not quantized
    again = inside("teacher_cost.py", *arguments)
    assert "is measured already" in again.stdout
