"""Size and error of a teacher cache, by the number of top-k ids that it keeps per token.

python benchmarks/cache.py --json benchmarks/results/cache_cpu.json

Measured with the quickstart's held-out conversations, its untrained student and its teacher: bytes
per token, the probability mass of the kept ids, and forward KL and gradient with respect to the
student's hidden states, compared with those of the live teacher. This command writes the data:

python data/quickstart/docstrings.py --out_dir runs/quickstart/data
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from kd.data.encoding import encode_rows
from kd.data.sources import load_rows
from kd.data.tokenizer import load_tokenizer
from kd.recipe import parse, setting
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.cache_error import UntrainedStudent
from kd.teachers.cache_files import record_type
from kd.teachers.cached import outputs_of
from kd.teachers.live import LiveTeacher
from kd.teachers.scoring import score_batch


@dataclass
class BenchmarkSettings:
    teacher: str = setting("data/quickstart/teacher", "Hub name or folder of the teacher.")
    student: str = setting("data/quickstart/student", "Hub name or folder of the student.")
    data: str = setting("runs/quickstart/data/chat_heldout.jsonl", "File of rows.")
    count: int = setting(64, "Number of rows.")
    top_k: list[int] = setting([4, 16, 64, 256, 0], "Ids kept per token; 0: all.")
    json: str | None = setting(None, "Output file.")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    tokenizer = load_tokenizer(settings.teacher)
    rows = load_rows([{"path": settings.data, "count": settings.count}], 0)
    documents, report = encode_rows(rows, tokenizer, 1024)
    print(report)
    cpu, exact = torch.device("cpu"), ModelSettings(dtype="float32")
    teacher = LiveTeacher(
        TeacherSettings(teacher=settings.teacher, teacher_dtype="float32"), exact, cpu
    )
    student = UntrainedStudent(settings.student, exact, tokenizer, cpu)

    def scored(top_k: int, dtype: str) -> tuple[list[np.ndarray], dict]:
        manifest = {
            "vocabulary": len(tokenizer),
            "top_k": top_k or len(tokenizer),
            "dtype": dtype,
            "temperature": 1.0,
        }
        pad = tokenizer.pad_token_id
        return [score_batch(teacher, [row], manifest, pad, cpu)[0] for row in documents], manifest

    live, form = scored(0, "float32")
    whole = [outputs_of(records, form) for records in live]
    table = []
    for top_k in settings.top_k:
        for dtype in ("float16", "float32"):
            records, manifest = scored(top_k, dtype)
            known = [outputs_of(part, manifest) for part in records]
            error = student.error(
                Objective(soft_weight=0.0), zip(documents, known, whole, strict=True)
            )
            tail = np.concatenate([part["scalars"][:, 0] for part in records]).astype(np.float64)
            size = record_type(manifest).itemsize
            table.append(
                {
                    "top_k": manifest["top_k"],
                    "dtype": dtype,
                    "bytes_a_token": size,
                    "bytes_an_entry": size / manifest["top_k"],
                    "mass": 1 - float(np.exp(tail).mean()),
                    **asdict(error),
                }
            )
            print(f"k {manifest['top_k']}, {dtype}: {size} bytes a token; {error}", flush=True)
    if settings.json:
        about = {"settings": asdict(settings), "torch": torch.__version__, "rows": table}
        Path(settings.json).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
