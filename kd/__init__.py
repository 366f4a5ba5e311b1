"""Distil one causal language model into another: the library behind train/ and eval/."""

import logging

# On a CPU it warns in every process of an optional package, for which it has a fallback of its own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
