"""A GGUF file by llama.cpp's own converter, and what Transformers reads back out of it."""

import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedModel

CONVERTER = "convert_hf_to_gguf.py"
PROBE = 256  # tokens
LARGEST_KL = 0.05  # nats a token: q8_0 stays far below it, a mixed-up tensor far above


def check_llama_cpp(folder: str) -> None:
    if not (Path(folder) / CONVERTER).is_file():
        raise ValueError(
            f"llama_cpp: no {CONVERTER} in {folder}; wanted a checkout of llama.cpp (the source "
            "package of llama-cpp-python has one in vendor/llama.cpp)"
        )


def write_gguf(folder: str, llama_cpp: str, kind: str) -> Path:
    """FOLDER/model-KIND.gguf. Raises ValueError with the converter's last words."""
    file = Path(folder) / f"model-{kind}.gguf"
    converter = Path(llama_cpp) / CONVERTER
    command = [sys.executable, converter, folder, "--outfile", file, "--outtype", kind]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not file.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ValueError(
            f"llama_cpp: {CONVERTER} could not convert {folder}; the merged model itself is "
            f"complete. Its last words: {last}"
        )
    return file


@torch.no_grad()
def compare_gguf(model: PreTrainedModel, file: Path) -> dict:
    """Load the file back and compare next-token distributions on drawn tokens.

    Raises ValueError where it is another model.
    """
    back = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    vocabulary = min(len(m.get_output_embeddings().weight) for m in (model, back))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROBE), generator=draw)
    ours, theirs = (
        m(input_ids=ids.to(m.device), use_cache=False).logits[0, :, :vocabulary].float().cpu()
        for m in (model.eval(), back)
    )  # (PROBE, V) each
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = float(kl_div(q, p, reduction="sum", log_target=True)) / PROBE
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    if not kl < LARGEST_KL:
        raise ValueError(
            f"{file}: loaded back, it is another model (KL {kl:.3g} nats a token); the converter "
            "and this architecture do not fit together"
        )
    largest = float((ours - theirs).abs().max())
    return {
        "file": file.name,
        "forward_kl": kl,
        "top1_agreement": same,
        "largest_logit_difference": largest,
        "text": (
            f"{file.name} loaded back: KL {kl:.2g} nats a token, top-1 agreement {same:.1%}, "
            f"logits at most {largest:.2g} apart on {PROBE} drawn tokens"
        ),
    }
