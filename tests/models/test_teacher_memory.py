"""Loading a sharded 1 GB teacher: no rank ever holds more than its share and one tensor."""

import json
import sys

import pytest
from processes import start, succeed

MAKE = """
import sys, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights
torch.set_default_dtype(torch.bfloat16)
config = Qwen2Config(
    vocab_size=32_000, hidden_size=1280, intermediate_size=3584, num_hidden_layers=26,
    num_attention_heads=20, num_key_value_heads=4, tie_word_embeddings=False,
)
with no_init_weights():
    model = Qwen2ForCausalLM(config)
for parameter in model.parameters():
    parameter.data.fill_(0.01)
model.save_pretrained(sys.argv[1], max_shard_size="400MB")
print(sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.slow
def test_peak_memory_of_loading_is_a_shard_and_one_tensor(tmp_path):
    folder = tmp_path / "teacher"
    numbers = int(succeed(sys.executable, "-c", MAKE, folder).splitlines()[-1])
    job = start("torchrun", "--nproc-per-node", 2, "tests/jobs/teacher_memory.py", folder, tmp_path)
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), job.stdout[-4000:]
    for found in [json.loads(file.read_text()) for file in files]:
        assert found["checkpoint"] == 2 * numbers > 1e9
        assert found["shard"] <= found["checkpoint"] / 2 + 4 * 1000
        assert found["peak"] < 1.2 * found["shard"] + found["largest"], found
        # read(2) calls; DeepSpeed and Python read a few other files.
        assert found["counted"] <= found["asked"] < found["counted"] + 2e7, found
        assert found["counted"] <= found["checkpoint"] / 2 + 4 * 1000
        assert found["mapped"] < 1e8, found  # nothing is read through memory mapping
