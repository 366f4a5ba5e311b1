"""What a training shows on a terminal: readable lines, one bar at a time, no foreign warnings."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from processes import ROOT

SIZE = (40, 100)  # lines and columns
BARS = re.compile("TQDM_|HF_.*_PROGRESS_BARS")


def on_a_terminal(*command) -> str:
    """Run a command that must succeed, and return all that it writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    # This process, which may have no terminal, has set TQDM_DELAY and others for itself.
    env = {name: value for name, value in os.environ.items() if not BARS.match(name)}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 2**16):
            parts.append(part)
    except OSError:  # Linux's way to tell that the other end is closed
        pass
    finally:
        os.close(ours)
    written = b"".join(parts).decode()
    assert process.wait() == 0, written[-6000:]
    return written.replace("\r\n", "\n")


def test_a_training_shows_its_steps_one_bar_and_no_foreign_warning(tmp_path):
    rows = [{"text": f"The list holds {i} objects."} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    sources = json.dumps([{"path": str(data)}])
    command = ["train/sft.py", "--model", "data/quickstart/student", "--data", sources]
    command += ["--quantization", "nf4", "--lora_rank", "4", "--gradient_checkpointing", "true"]
    command += ["--eval_data", sources, "--eval_strategy", "steps", "--eval_steps", "2"]
    command += ["--max_length", "64", "--global_batch_size", "4", "--max_steps", "3"]
    command += ["--logging_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    command += ["--output_dir", tmp_path / "out"]
    written = on_a_terminal(*command)
    assert not re.search("deprecated|FutureWarning|gemm_4bit|Traceback|{'", written)
    lines = [line.split("\r")[-1].strip() for line in written.split("\n")]
    steps = [line for line in lines if re.match(r"step \d of 3: loss \d\.\d+, .* GiB$", line)]
    assert len(steps) == 3 and all(len(line) < SIZE[1] for line in steps)
    # Each bar is the only one, and nothing of it is left beside a line.
    bars = re.findall(r"(training|held-out rows): +(\d+)%\|", written)
    assert {("training", "0"), ("training", "100"), ("held-out rows", "0")} <= set(bars)
    assert "\x1b[A" not in written  # two bars would move the cursor up
    assert not [line for line in lines if re.search("(training|held-out rows): +\\d", line)]
