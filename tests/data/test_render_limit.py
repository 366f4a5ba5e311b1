"""A chat template that does not come to an end is cut off with one line."""

import pytest

from kd.data import render_limit
from kd.data.template import render, span_finder

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set text = namespace(it='a') %}"
    "{% for i in range(99) %}{% set text.it = text.it ~ text.it %}{% endfor %}"
)
DEEP = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
MARKED = "{% generation %}{% endgeneration %}"  # then another function renders
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("marked", ["", MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("template", "told"),
    [(ENDLESS, "for 1 s"), (GROWING, "beyond 0.25 GiB"), (DEEP, "without end")],
    ids=["endless", "growing", "deep"],
)
def test_template_without_an_end_is_cut_off(tokenizer, monkeypatch, template, told, marked):
    limits = {ENDLESS: ("CPU_SECONDS", 1.0), GROWING: ("MEMORY", 2**28)}
    if template in limits:
        monkeypatch.setattr(render_limit, *limits[template])
    monkeypatch.setattr(tokenizer, "chat_template", template + marked)
    with pytest.raises(ValueError, match=f"the chat template runs {told}"):
        span_finder(tokenizer)(MESSAGES, None)


def test_limits_end_with_the_rendering(tokenizer):
    before = render_limit.resource.getrlimit(render_limit.resource.RLIMIT_AS)
    assert render(MESSAGES, tokenizer)
    assert render_limit.resource.getrlimit(render_limit.resource.RLIMIT_AS) == before
    assert render_limit.signal.getitimer(render_limit.signal.ITIMER_PROF) == (0.0, 0.0)
