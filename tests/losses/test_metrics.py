"""The table of metrics: its names, its denominators and its charts."""

from kd.losses.metrics import (
    BY_NAME,
    CHARTS,
    METRICS,
    REPORTED,
    TOKEN_METRICS,
    chart_layout,
    shown_metrics,
)


def test_every_metric_has_one_entry_and_a_denominator_if_it_is_a_token_sum():
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        is_token_sum = metric.source != "step"
        assert (metric.name in REPORTED) == is_token_sum == (metric.tokens in REPORTED)
        assert not is_token_sum or metric.value in (*TOKEN_METRICS, "hidden")


def test_a_run_shows_only_the_metrics_that_it_has():
    assert shown_metrics(teacher=False, hidden=False) == ["cross_entropy", "student_entropy"]
    with_teacher = shown_metrics(teacher=True, hidden=False)
    assert set(REPORTED) - set(with_teacher) == {
        "tokens", "on_policy_tokens", "hidden", "on_policy_hidden",
    }  # fmt: skip
    with_hidden = shown_metrics(teacher=True, hidden=True)
    assert set(with_hidden) - set(with_teacher) == {"hidden", "on_policy_hidden"}


def test_every_chart_shows_a_metric():
    charts = {title: tags for page in chart_layout().values() for title, tags in page.items()}
    assert list(charts) == [chart.title for chart in CHARTS] and all(charts.values())
    assert {chart for metric in METRICS for chart in metric.charts} == set(CHARTS)
