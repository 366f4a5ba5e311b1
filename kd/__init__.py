"""Distil one causal language model into another: the library behind train/ and eval/."""

import logging
import os
import sys
import warnings

# On a CPU, bitsandbytes warns in every process of an optional package, for which it has a fallback.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Transformers, PEFT and DeepSpeed call what Transformers and torch have renamed.
for message, module in (
    (r"`\w+` is deprecated and will be removed in v6", r"transformers\."),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\."),
):
    warnings.filterwarnings("ignore", message, FutureWarning, module)
# CUDA's memory then consists of segments that grow, which fragment less. Torch reads the variable
# when it is imported; a CPU has no use for it.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Only rank 0 shows progress bars. A log file keeps every update, so it gets one every 30 s.
# Transformers and datasets, which show several at a time, show theirs on a terminal.
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_MININTERVAL", "30")
    os.environ.setdefault("TQDM_DELAY", "30")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
