"""Distil one causal language model into another: the library behind train/ and eval/."""

import logging

# On a CPU, bitsandbytes warns in every process of an optional package, for which it has a fallback.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
