"""Write a GGUF file with llama.cpp's converter and compare it, loaded back, with the model."""

import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from kd.pretrained import load_model

CONVERTER = "convert_hf_to_gguf.py"
PROBE_TOKENS = 256
MAX_KL = 0.05  # nats per token: q8_0 stays far below it, a misplaced tensor far above


def check_llama_cpp(folder: str) -> None:
    """Raise ValueError if the folder does not contain llama.cpp's converter."""
    if not (Path(folder) / CONVERTER).is_file():
        raise ValueError(
            f"llama_cpp: no {CONVERTER} in {folder}; wanted a checkout of llama.cpp (the source "
            "package of llama-cpp-python has one in vendor/llama.cpp)"
        )


def write_gguf(folder: str, llama_cpp: str, kind: str) -> Path:
    """Write FOLDER/model-KIND.gguf from the model in the folder.

    Raises ValueError with the end of the converter's output if it fails.
    """
    file = Path(folder) / f"model-{kind}.gguf"
    converter = Path(llama_cpp) / CONVERTER
    command = [sys.executable, converter, folder, "--outfile", file, "--outtype", kind]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not file.is_file():
        end = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ValueError(
            f"llama_cpp: {CONVERTER} could not convert {folder}; the merged model itself is "
            f"complete. End of its output: {end}"
        )
    return file


@torch.no_grad()
def compare_gguf(model: PreTrainedModel, file: Path) -> dict:
    """Load the file back and compare next-token distributions on random tokens.

    Raises ValueError if the file holds a different model.
    """
    loaded = load_model(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    vocab_size = min(len(m.get_output_embeddings().weight) for m in (model, loaded))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator)
    expected, found = (
        m(input_ids=ids.to(m.device), use_cache=False).logits[0, :, :vocab_size].float().cpu()
        for m in (model.eval(), loaded)
    )  # (PROBE_TOKENS, V) each
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = float(kl_div(q, p, reduction="sum", log_target=True)) / PROBE_TOKENS
    agreement = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
    if not kl < MAX_KL:
        raise ValueError(
            f"{file}: loaded back, it is another model (KL {kl:.3g} nats per token); the converter "
            "does not support this architecture correctly"
        )
    largest = float((expected - found).abs().max())
    return {
        "file": file.name,
        "forward_kl": kl,
        "top1_agreement": agreement,
        "largest_logit_difference": largest,
        "text": (
            f"{file.name} loaded back: KL {kl:.2g} nats per token, top-1 agreement "
            f"{agreement:.1%}, largest logit difference {largest:.2g} on {PROBE_TOKENS} random "
            "tokens"
        ),
    }
