"""Every logged metric in one table: what it means, what it averages over, when and where it shows.

The fused loss sums the token metrics, the trainer divides them by the number of tokens, TensorBoard
groups them into charts. All three read this table, so a new metric is one new entry (plus the code
that computes its value).
"""

from dataclasses import dataclass
from typing import Literal

PHASES = ("data", "generation", "teacher", "student", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Chart:
    """A chart on one of TensorBoard's custom-scalars pages; `splits` prefix the metric names."""

    page: str
    title: str
    splits: tuple[str, ...] = ("train",)


OVERVIEW, SPEED = "Read this first", "Speed"
LOSS = Chart(OVERVIEW, "loss and its two terms")
HELD_OUT = Chart(OVERVIEW, "held out: loss and its two terms", ("eval",))
TOP1 = Chart(OVERVIEW, "top-1 agreement with the teacher", ("train", "eval"))
ENTROPY = Chart(OVERVIEW, "entropy of student and teacher")
LABEL = Chart(OVERVIEW, "teacher's probability of the label")
ON_POLICY = Chart(OVERVIEW, "loss on student-generated answers")
GENERATED = Chart(OVERVIEW, "length of student-generated answers")
GRADIENT = Chart(OVERVIEW, "gradient norm")
SECONDS = Chart(SPEED, "seconds per step")
THROUGHPUT = Chart(SPEED, "target tokens per second")
PEAK_SHARE = Chart(SPEED, "share of peak matrix throughput")
MEMORY = Chart(SPEED, "peak memory of the fullest process (GiB)")
PADDING = Chart(SPEED, "share of padding")
CHARTS = (
    LOSS, HELD_OUT, TOP1, ENTROPY, LABEL, ON_POLICY, GENERATED, GRADIENT,
    SECONDS, THROUGHPUT, PEAK_SHARE, MEMORY, PADDING,
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One logged number.

    Attributes:
        name: Its name in the log.
        meaning: One line for a reader of the log.
        source: Where its value comes from. "logits": a sum over tokens by the fused loss;
            "hidden states": a sum over tokens by the hidden-state loss; "step": not a sum over
            tokens, measured by the trainer.
        value: The per-token value that is summed; the same for data and on-policy tokens.
        tokens: The metric that counts the tokens it is summed over, which is its denominator.
        shown: With which runs it is logged.
        charts: Where TensorBoard shows it.
        machine: Whether it depends on the machine, so that a repeated run logs another number.
    """

    name: str
    meaning: str
    source: Literal["logits", "hidden states", "step"] = "step"
    value: str | None = None
    tokens: Literal["tokens", "on_policy_tokens"] | None = None
    shown: Literal["always", "with a teacher", "with hidden states", "never"] = "always"
    charts: tuple[Chart, ...] = ()
    machine: bool = False


def _data(name: str, meaning: str, shown: str, *charts: Chart, source: str = "logits") -> Metric:
    """A mean over the target tokens of the data."""
    return Metric(name, meaning, source, name, "tokens", shown, charts)


def _on_policy(value: str, shown: str, *charts: Chart, source: str = "logits") -> Metric:
    """The same mean over the tokens of student-generated answers."""
    meaning = f"{value} over the tokens of student-generated answers"
    name = f"on_policy_{value}"
    return Metric(name, meaning, source, value, "on_policy_tokens", shown, charts)


def _measured(name: str, meaning: str, *charts: Chart, machine: bool = False) -> Metric:
    return Metric(name, meaning, charts=charts, machine=machine)


TEACHER, HIDDEN = "with a teacher", "with hidden states"
METRICS: tuple[Metric, ...] = (
    _measured("loss", "training loss; under eval/, the same loss on held-out rows", LOSS, HELD_OUT),
    _data("cross_entropy", "-log q(label) of the student, in nats", "always", LOSS, HELD_OUT),
    _data("divergence", "divergence of the objective, with its scale", TEACHER, LOSS, HELD_OUT),
    _data("teacher_cross_entropy", "-log p(label) of the teacher, in nats", TEACHER),
    _data("teacher_label_probability", "p(label) of the teacher", TEACHER, LABEL),
    _data("top1_agreement", "share of tokens with equal argmax of p and q", TEACHER, TOP1),
    _data("student_entropy", "entropy of q, in nats", "always", ENTROPY),
    _data("teacher_entropy", "entropy of p, in nats", TEACHER, ENTROPY),
    _data("tokens", "target tokens of the data", "never"),
    _data("hidden", "hidden-state loss, without its weight", HIDDEN, source="hidden states"),
    _on_policy("divergence", TEACHER, ON_POLICY),
    _on_policy("teacher_cross_entropy", TEACHER, ON_POLICY),
    _on_policy("top1_agreement", TEACHER),
    _on_policy("student_entropy", TEACHER),
    _on_policy("teacher_entropy", TEACHER),
    _on_policy("hidden", HIDDEN, source="hidden states"),
    _on_policy("tokens", "never"),
    _measured("generated_length", "mean tokens per student-generated answer", GENERATED),
    _measured("generated_cut_share", "share of those answers that reached the length limit"),
    _measured("grad_norm", "norm of the gradient before clipping", GRADIENT),
    _measured("seconds_step", "seconds per step on the slowest rank", SECONDS, machine=True),
    *(
        _measured(f"seconds_{phase}", f"of these in {phase}, mean rank", SECONDS, machine=True)
        for phase in PHASES
    ),
    _measured("target_tokens_per_second", "over all ranks", THROUGHPUT, machine=True),
    _measured("matrix_peak_share", "of the GPU's measured rate", PEAK_SHARE, machine=True),
    _measured("model_flop_utilization", "of the vendor's peak", PEAK_SHARE, machine=True),
    _measured("memory_gib", "peak memory of the fullest process", MEMORY, machine=True),
    _measured("padding_share", "share of padding among the positions", PADDING),
)

BY_NAME = {metric.name: metric for metric in METRICS}
REPORTED = tuple(metric.name for metric in METRICS if metric.source != "step")
"""Names of the token sums that a call of the student returns, in this order."""

TOKEN_METRICS = tuple(
    metric.name for metric in METRICS if metric.source == "logits" and metric.tokens == "tokens"
)
"""Names of the values that the fused loss sums over its tokens, in this order.

Probabilities are at temperature 1, except in `divergence`. `tokens` is the number of tokens.
"""


def shown_metrics(teacher: bool, hidden: bool) -> list[str]:
    """Names of the token metrics that a run with a teacher, with a hidden-state loss, logs."""
    shown = {"always"} | ({TEACHER} if teacher else set())
    shown |= {HIDDEN} if teacher and hidden else set()
    return [name for name in REPORTED if BY_NAME[name].shown in shown]


def chart_layout() -> dict[str, dict[str, list[str]]]:
    """{page: {chart title: tags}} for TensorBoard's custom scalars, in the order of CHARTS."""
    layout: dict[str, dict[str, list[str]]] = {}
    for chart in CHARTS:
        tags = [f"{s}/{m.name}" for s in chart.splits for m in METRICS if chart in m.charts]
        layout.setdefault(chart.page, {})[chart.title] = tags
    return layout
