"""Whole training steps: ours, TRL's GKDTrainer or SFTTrainer, and a plain loop with whole logits.

python benchmarks/step.py --quick --json benchmarks/results/step_cpu.json

All train the same student from the same weights on the same rows in the same batches, in the same
precision, with the same optimizer; each in a process of its own, in turns, and the fastest turn of
each counts. For fine-tuning TRL packs the rows in its own way; its GKDTrainer cannot, so in
distil_packed it takes them one by one. Target tokens a second are of whole steps, from the
rows to the updated weights; memory is the most that a process held, on a CPU of the machine's. The
losses of the first steps must agree. TRL 1.16.0 is measured where it is installed (pip install
--no-deps trl==1.16.0); without it its columns are null. On a CPU the models have the depth and the
vocabulary of the real pair and a quarter of its width, on a GPU the real shapes; weights are random.
The break-down is of our steps, its operators of one more under torch.profiler.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.profiler import profile
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, set_seed

from kd.data.docstrings import read_docstrings, source_files
from kd.data.masks import IGNORED
from kd.data.packing import Collator
from kd.losses.divergences import DIVERGENCES
from kd.models.heads import head_of, target_positions
from kd.models.load import load_trained
from kd.models.random_checkpoint import qwen_config, write_random
from kd.models.throughput import counted_work, matrix_rate
from kd.recipe import parse, setting
from kd.settings import DataSettings, ModelSettings, ObjectiveSettings, TeacherSettings
from kd.teachers.load import load_whole
from kd.training.checkpoint import commit
from kd.training.figures import memory_bytes
from kd.training.preparation import Prepared, prepare
from kd.training.session import load_trainer
from kd.training.settings import TrainingSettings
from kd.training.step_times import StepTimes

TOKENIZER = Path(__file__).parents[1] / "data/quickstart/student/tokenizer.json"
# No character follows an answer's end, which TRL's collator would take for a target.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRL_MIXTURE = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
SHAPES = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary, tied: Qwen2.5's
    "32B": (5120, 27648, 64, 40, 8, 152_064, False),
    "14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "1.5B": (1536, 8960, 28, 12, 2, 152_064, True),
    "0.5B": (896, 4864, 24, 14, 2, 152_064, True),
    "1.5B/4": (384, 2240, 28, 6, 2, 152_064, True),
    "0.5B/4": (224, 1216, 24, 4, 2, 152_064, True),
    "tiny teacher": (48, 96, 2, 2, 1, 8192, True),
    "tiny": (32, 64, 2, 2, 1, 8192, True),
}
IMPLEMENTATIONS = ("ours", "trl", "naive")
WARM_UP = 1  # steps


@dataclass(frozen=True)
class Case:
    """What is trained, and how; without a teacher it is fine-tuned."""

    name: str
    student: str
    teacher: str | None
    divergence: str = "forward_kl"
    lora_rank: int = 16
    quantization: str = "none"  # of the student
    teacher_format: str = "plain"  # of its checkpoint
    packing: bool = False
    checkpointing: bool = False
    rows: int = 4  # a step
    micro: int = 4  # rows a micro-batch
    max_length: int = 256

    @property
    def accumulation(self) -> int:
        return self.rows // self.micro


ON_GPU = {"rows": 16, "micro": 4, "max_length": 2048, "checkpointing": True}
CPU_CASES = [
    Case("distil_lora", "0.5B/4", "1.5B/4"),
    Case("distil_full", "0.5B/4", "1.5B/4", "jensen_shannon", lora_rank=0),
    Case("distil_accumulated", "0.5B/4", "1.5B/4", rows=8, micro=2),
    Case("distil_packed", "0.5B/4", "1.5B/4", packing=True),
    Case("sft_lora", "0.5B/4", None, packing=True),
    Case("sft_full", "0.5B/4", None, lora_rank=0, packing=True),
]
GPU_CASES = [
    Case("distil_0.5b_lora", "0.5B", "1.5B", **ON_GPU),
    Case("distil_1.5b_qlora", "1.5B", "7B", quantization="nf4", **ON_GPU),
    Case("distil_14b_qlora", "14B", "32B", quantization="nf4", teacher_format="awq", **ON_GPU),
    Case("sft_0.5b_lora", "0.5B", None, packing=True, **ON_GPU),
]
TINY = {"rows": 4, "micro": 2, "max_length": 64}
TINY_CASES = [
    Case("tiny_distil", "tiny", "tiny teacher", **TINY),
    Case("tiny_sft", "tiny", None, lora_rank=0, packing=True, **TINY),
]


@dataclass
class BenchmarkSettings:
    quick: bool = setting(
        False, "the first case alone, in one turn: about three minutes on two cores"
    )
    cases: list[str] = field(
        default_factory=list,
        metadata={
            "help": "of the device's: "
            + ", ".join(case.name for case in [*CPU_CASES, *GPU_CASES, *TINY_CASES])
            + "; rows of other cases stay in the file"
        },
    )
    steps: int = setting(4, "steps of a process, the first of which is not timed")
    turns: int = setting(2, "processes of each implementation")
    implementations: list[str] = field(
        default_factory=lambda: list(IMPLEMENTATIONS),
        metadata={"help": f"of {', '.join(IMPLEMENTATIONS)}; ours is always measured"},
    )
    label: str = setting("", "put behind the cases' names: of a measurement before a change, say")
    json: str | None = setting(None, "file for the rows")
    worker: str | None = setting(None, "internal: what one process measures, as JSON")

    def __post_init__(self) -> None:
        if self.steps <= WARM_UP:
            raise ValueError(f"steps: {self.steps}; wanted {WARM_UP + 1} or more, one is not timed")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.worker:
        work = json.loads(settings.worker)
        print(json.dumps(measured(Case(**work.pop("case")), **work)))
        return
    for case in chosen_cases(settings):
        turns = 1 if settings.quick else settings.turns
        row = measure(case, settings.steps, turns, settings.implementations)
        row["name"] += settings.label
        print_row(row)
        if settings.json:
            write_row(Path(settings.json), row)


def chosen_cases(settings: BenchmarkSettings) -> list[Case]:
    own = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    if not settings.cases:
        return own[:1] if settings.quick else own
    known = {case.name: case for case in [*own, *TINY_CASES]}
    for name in settings.cases:
        if name not in known:
            raise ValueError(f"cases: {name}; wanted some of {', '.join(known)}")
    return [known[name] for name in settings.cases]


def measure(case: Case, steps: int, turns: int, wanted: list[str]) -> dict[str, Any]:
    """One row: the fastest turn of each implementation, and where our step spends its time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(case, folder, steps)
        found: dict[str, list[dict]] = {name: [] for name in IMPLEMENTATIONS}
        left_out = {"naive", "trl"} - set(wanted)
        not_run: dict[str, str] = dict.fromkeys(sorted(left_out), "not asked for")
        if "trl" in wanted and importlib.util.find_spec("trl") is None:
            not_run["trl"] = "TRL is not installed"
        for _ in range(turns):
            for implementation in IMPLEMENTATIONS:
                if implementation in not_run:
                    continue
                result = in_process(case, implementation, folder, steps)
                if isinstance(result, str):
                    not_run[implementation] = result
                else:
                    found[implementation].append(result)
    assert found["ours"], not_run
    require_agreement(case, found)
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items() if runs}
    peak = {name: max(run["peak_mib"] for run in runs) for name, runs in found.items() if runs}
    row = asdict(case) | {
        "accumulation": case.accumulation,
        "vocabulary": SHAPES[case.student][5],
        "timed_steps": steps - WARM_UP,
        "turns": turns,
        "target_tokens_a_step": best["ours"]["targets"] / (steps - WARM_UP),
        "positions_a_step": best["ours"]["positions"] / (steps - WARM_UP),
    }
    for name in IMPLEMENTATIONS:
        run = best.get(name)
        row[f"{name}_tokens_s"] = run and run["targets"] / run["seconds"]
        row[f"{name}_step_s"] = run and run["seconds"] / (steps - WARM_UP)
        row[f"{name}_mib"] = peak.get(name)
        row[f"{name}_losses"] = run and run["losses"]
    for name in ("trl", "naive"):
        other = row[f"{name}_tokens_s"]
        row[f"ours_over_{name}"] = other and row["ours_tokens_s"] / other
        row[f"{name}_mib_over_ours"] = row[f"{name}_mib"] and row[f"{name}_mib"] / row["ours_mib"]
    row |= {key: best["ours"][key] for key in ("matrix_peak_share", "break_down_s", "operators_s")}
    return row | {"not_run": not_run} | machine()


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": names[0] if names else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def make_inputs(case: Case, folder: Path, steps: int) -> None:
    """student/, teacher/ and rows.jsonl in a folder."""
    tokenizer = make_tokenizer(SHAPES[case.student][5])
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    for role, shape, form in (
        ("student", case.student, case.quantization),
        ("teacher", case.teacher, case.teacher_format),
    ):
        if shape:
            write_random(qwen_config(*SHAPES[shape], dtype), form, folder / role)
            tokenizer.save_pretrained(folder / role)
    count = case.rows * (steps + 1) * (4 if case.packing else 1)
    rows = make_rows(tokenizer, count, case.max_length)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The shipped tokenizer, with ids up to `vocabulary` that no text has."""
    described = json.loads(TOKENIZER.read_text())
    ids = described["model"]["vocab"]
    ids |= {f"unused {i}": i for i in range(len(ids), vocabulary)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(described, file)
        file.flush()
        return PreTrainedTokenizerFast(
            tokenizer_file=file.name,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=TEMPLATE,
        )


def make_rows(tokenizer: PreTrainedTokenizerFast, count: int, max_length: int) -> list[dict]:
    """Questions on docstrings, half of them with one to read; the answers are docstrings.

    Lengths are spread evenly between an eighth of max_length and all of it.
    """
    draw, rows = random.Random(0), []
    docs = [doc for source in source_files()[:60] for doc in read_docstrings(source)]
    lengths = [len(ids) for ids in tokenizer([doc.text for doc in docs])["input_ids"]]
    while len(rows) < count:
        room = draw.randint(max_length // 8, max_length) - 16  # the template's own tokens
        question, answer = "What do you know of it?", []
        for i in draw.sample(range(len(docs)), 40):
            if lengths[i] > room:
                continue
            if not answer and len(rows) % 2 and question[0] == "W":
                question = f"{docs[i].text}\n\n{question}"
            else:
                answer.append(docs[i].text)
            room -= lengths[i] + 1
        messages = [{"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": "\n".join(answer)})
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        if answer and len(ids) <= max_length:
            rows.append({"messages": messages})
    return rows


def in_process(case: Case, implementation: str, folder: Path, steps: int) -> dict | str:
    """What `measured` returns in a process of its own, or why there is nothing."""
    work = {"implementation": implementation, "folder": str(folder), "steps": steps}
    work = json.dumps(work | {"case": asdict(case)})
    command = [sys.executable, __file__, "--worker", work]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    print(f"{case.name}: {implementation} ended with {done.returncode}: {last}", file=sys.stderr)
    return f"ended with {done.returncode}: {last}"


def measured(case: Case, implementation: str, folder: str, steps: int) -> dict:
    """Seconds, targets, positions, losses, peak of one implementation in this process."""
    run, training, teacher = prepared(case, folder, steps + (implementation == "ours"))
    watch = Watch(training.device, case.accumulation, steps)
    set_seed(training.seed)
    run_it = {"ours": ours, "naive": naive, "trl": trl_distil if case.teacher else trl_sft}
    work = run_it[implementation](case, folder, run, training, teacher, watch)
    found = watch.figures()
    if work:  # last, because measuring the rate takes memory too
        position, target = work
        operations = position * found["positions"] + target * found["targets"]
        rate = matrix_rate(training.device.type, getattr(torch, run.plan.layout.half or "float32"))
        found["matrix_peak_share"] = operations / found["seconds"] / rate
    return found


def prepared(
    case: Case, folder: str, steps: int
) -> tuple[Prepared, TrainingSettings, TeacherSettings | None]:
    """A run as train/distill.py and train/sft.py prepare it."""
    cuda = torch.cuda.is_available()
    flags = {
        "data": json.dumps([{"path": f"{folder}/rows.jsonl"}]),
        "data_cache": f"{folder}/cache",
        "packing": case.packing,
        "max_length": case.max_length,
        "lora_rank": case.lora_rank,
        "quantization": case.quantization,
        "output_dir": tempfile.mkdtemp(dir=folder),
        "global_batch_size": case.rows,
        "per_device_train_batch_size": case.micro,
        "max_steps": steps,
        "learning_rate": 1e-3 if case.lora_rank else 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": case.checkpointing,
        "bf16": cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    kinds: list[type] = [ModelSettings, DataSettings, TrainingSettings]
    if case.teacher:
        kinds += [TeacherSettings, ObjectiveSettings]
        flags |= {"teacher": f"{folder}/teacher", "divergence": case.divergence}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    model, data, training, *distil = parse(*kinds, argv=argv)
    teacher, objective = distil or (None, None)
    run = prepare(f"{folder}/student", model, data, training, teacher, objective)
    return run, training, teacher


def ours(case, folder, run: Prepared, training, teacher, watch: "Watch") -> tuple[float, float]:
    trainer = load_trainer(f"{folder}/student", run, training, teacher)
    watch.times, watch.profile = trainer.times, profile()
    watch.train(trainer)
    return counted_work(run.plan.layout)


def trl_distil(case, folder, run: Prepared, training, teacher, watch: "Watch") -> None:
    """Off-policy: the rows' own answers. Its loss is the mean over the step's target tokens, too."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student = load_trained(f"{folder}/student", run.model, run.tokenizer)
    whole = load_whole(teacher, run.model, training.device)
    del whole.forward  # it shall return logits again
    mixture = {"lmbda": 0.0, "seq_kd": False, "beta": TRL_MIXTURE[case.divergence]}
    args = GKDConfig(**shared(case, training), **mixture, temperature=1.0)
    rows = rows_for_trl(folder)
    watch.train(
        GKDTrainer(student, whole, args, train_dataset=rows, processing_class=run.tokenizer)
    )


def trl_sft(case, folder, run: Prepared, training, teacher, watch: "Watch") -> None:
    """Its own packing, best-fit decreasing, which makes one long row of a micro-batch."""
    from trl import SFTConfig, SFTTrainer

    student = load_trained(f"{folder}/student", run.model, run.tokenizer)
    args = SFTConfig(**shared(case, training), packing=True, assistant_only_loss=True)
    rows = rows_for_trl(folder)
    watch.train(SFTTrainer(student, args, train_dataset=rows, processing_class=run.tokenizer))


def rows_for_trl(folder: str):
    from datasets import Dataset  # TRL needs it, ours does not

    return Dataset.from_json(f"{folder}/rows.jsonl", cache_dir=f"{folder}/datasets")


def shared(case: Case, training: TrainingSettings) -> dict[str, Any]:
    """The arguments of TRL's trainers that make their run equal to ours."""
    names = [
        "output_dir",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
    ]
    names += ["learning_rate", "lr_scheduler_type", "train_sampling_strategy", "bf16", "seed"]
    names += ["gradient_checkpointing", "save_strategy", "report_to", "disable_tqdm", "optim"]
    names += ["logging_steps", "dataloader_num_workers"]
    return {name: getattr(training, name) for name in names} | {
        "max_length": case.max_length,
        "use_cpu": training.device.type == "cpu",
    }


def naive(case, folder, run: Prepared, training, teacher, watch: "Watch") -> None:
    """Both models' logits at all positions, in float32 at the targets, and autograd."""
    student = load_trained(f"{folder}/student", run.model, run.tokenizer).to(training.device)
    if case.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.enable_input_require_grads()
    whole = load_whole(teacher, run.model, training.device) if teacher else None
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, training.learning_rate, weight_decay=0.0, fused=True)
    collate = Collator(run.tokenizer.pad_token_id)
    batches = iter(DataLoader(run.rows, case.micro, collate_fn=collate))
    half = getattr(torch, run.plan.layout.half or "float32")
    student.train()
    for step in range(watch.steps):
        step_batches = [next(batches) for _ in range(case.accumulation)]
        count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in step_batches)
        for batch in step_batches:
            batch = {name: value.to(training.device) for name, value in batch.items()}
            watch.count(batch)
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            with torch.autocast(training.device.type, half, enabled=half != torch.float32):
                logits = student(**inputs, use_cache=False).logits  # (B, T, V)
                positions, labels = target_positions(batch["labels"])
                loss = naive_loss(logits[positions].float(), labels, whole, inputs, positions, case)
            loss = loss / count
            loss.backward()
            watch.losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.step_done(step + 1)


def naive_loss(
    student: Tensor, labels: Tensor, teacher, inputs: dict, positions: Tensor, case: Case
) -> Tensor:
    """The sum over target tokens, from (N, V) logits of the student."""
    if teacher is None:
        return cross_entropy(student, labels, reduction="sum")
    with torch.no_grad():
        hidden = teacher(**inputs)  # (B, T, H)
        logits = head_of(teacher).logits(hidden, student.shape[1])[positions].float()  # (N, V)
    if case.divergence == "forward_kl":
        log_q, log_p = log_softmax(student, -1), log_softmax(logits, -1)
        return kl_div(log_q, log_p, log_target=True, reduction="sum")
    return DIVERGENCES[case.divergence](logits, student).sum()


class Watch(TrainerCallback):
    """Time, targets, losses of the steps after the first; nothing is read inside of them.

    Of our trainer also the phases of these steps, and the operators of one more.
    """

    def __init__(self, device: torch.device, accumulation: int, steps: int):
        self.device, self.accumulation, self.steps = device, accumulation, steps
        self.counts: list[tuple[Tensor, int]] = []  # (targets, positions) of every micro-batch
        self.losses: list[Tensor] = []  # of every micro-batch
        self.found: dict[str, Any] = {}
        self.times: StepTimes | None = None
        self.profile: profile | None = None

    def train(self, trainer: Trainer) -> None:
        compute_loss = trainer.compute_loss

        def noted_loss(model, inputs, *args, **kw):
            self.count(inputs)
            loss = compute_loss(model, inputs, *args, **kw)
            self.losses.append(loss.detach().clone())
            return loss

        trainer.compute_loss = noted_loss
        trainer.add_callback(self)  # the last one: a step's other callbacks are timed, too
        trainer.train()

    def count(self, batch: dict[str, Tensor]) -> None:
        targets = (batch["labels"][:, 1:] != IGNORED).sum()
        self.counts.append((targets, batch["input_ids"].numel()))

    def on_step_end(self, args, state, control, **_) -> None:
        self.step_done(state.global_step)

    def step_done(self, step: int) -> None:
        if step < WARM_UP or WARM_UP < step < self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun if step > WARM_UP else 0.0
        if step == self.steps:
            peak = memory_bytes(self.device) / 2**20
            self.found |= {"seconds": seconds, "peak_mib": peak}
        if step == self.steps and self.times:
            phases, inside, steps = self.times.read()
            shares = {name: value / steps for name, value in phases.items()}
            shares["rest of the step"] = (inside - sum(phases.values())) / steps
            shares["between steps"] = (seconds - inside) / steps
            self.found["break_down_s"] = shares
        if step == self.steps and self.profile:
            self.profile.start()
        if step > self.steps:
            self.profile.stop()
            self.found["operators_s"] = operators(self.profile, seconds)
        if step == WARM_UP and self.times:
            self.times.read()
        self.begun = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        timed = self.counts[WARM_UP * self.accumulation : self.steps * self.accumulation]
        losses = torch.stack(self.losses[: self.steps * self.accumulation])
        return self.found | {
            "targets": sum(int(targets) for targets, _ in timed),
            "positions": sum(positions for _, positions in timed),
            "losses": losses.view(self.steps, self.accumulation).sum(1).tolist(),
        }


KINDS = {  # parts of the names of operators, and of CUDA kernels; the first that fits
    "communication": ("nccl", "c10d::", "gloo"),
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "matrix products": ("aten::mm", "addmm", "bmm", "gemm", "cutlass", "nvjet", "xmma"),
    "softmax": ("softmax", "logsumexp"),
    "optimizer": ("adam", "foreach", "multi_tensor"),
}


def operators(profiled: profile, seconds: float) -> dict[str, float]:
    """Seconds by kind of operator (on a GPU of kernel), and those in which none of them ran."""
    cuda = torch.cuda.is_available()
    found = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        if not cuda and not event.key.startswith(("aten::", "c10d::", "gloo")):
            continue  # autograd's nodes and other marks: what runs there is Python and C++
        name = event.key.lower()
        kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), None)
        found[kind or "other operators"] += spent / 1e6
    found["none (Python, idle)"] = seconds - sum(found.values())
    return found


def require_agreement(case: Case, found: dict[str, list[dict]]) -> None:
    """A time of other steps is no comparison."""
    wanted = found["ours"][0]
    for name, runs in found.items():
        if name == "trl" and case.teacher and case.packing:
            continue  # other rows a batch
        for run in runs:
            assert run["targets"] == wanted["targets"], (name, run, wanted)
            tolerance = 2e-2 if torch.cuda.is_available() else 1e-4
            for loss, own in zip(run["losses"], wanted["losses"], strict=True):
                assert abs(loss - own) <= tolerance * abs(own), (name, run, wanted)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """In place of an earlier row of the same case."""
    rows = json.loads(path.read_text()) if path.exists() else []
    names = [earlier["name"] for earlier in rows]
    at = names.index(row["name"]) if row["name"] in names else len(rows)
    rows[at : at + 1] = [row]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def print_row(row: dict[str, Any]) -> None:
    def shown(value: float | None, digits: int = 2) -> str:
        return "not run" if value is None else f"{value:.{digits}f}"

    def each(key: str, digits: int) -> str:
        return ", ".join(
            f"{name} {shown(row[f'{name}_{key}'], digits)}" for name in IMPLEMENTATIONS
        )

    print(
        f"{row['name']}: target tokens/s {each('tokens_s', 0)}; ours / TRL "
        f"{shown(row['ours_over_trl'])}, ours / naive {shown(row['ours_over_naive'])}; "
        f"peak MiB {each('mib', 0)}; share of the matrix peak {row['matrix_peak_share']:.2f}\n"
        f"  a step of ours: {parts(row['break_down_s'])}\n"
        f"  its operators: {parts(row['operators_s'])}",
        flush=True,
    )


def parts(seconds: dict[str, float]) -> str:
    whole = sum(seconds.values())
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items())


if __name__ == "__main__":
    main()
