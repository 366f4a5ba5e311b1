"""Chat templates that behave like those of well-known families, and a reference for each.

`FAMILIES[name].pieces(messages)` does not use Jinja. It lists (text, whether it is the
assistant's), so that masks can be compared with an independent construction.
"""

from collections.abc import Callable
from dataclasses import dataclass

Pieces = list[tuple[str, bool]]
DEFAULT_SYSTEM = "You are a helpful assistant."
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|stop|>",
    "<|eot|>",
]


def chatml(messages: list[dict], default: str | None = None) -> Pieces:
    """Qwen1.5 and Qwen2.5; some begin with their own system prompt."""
    pieces = []
    if default and messages[0]["role"] != "system":
        pieces.append((f"<|im_start|>system\n{default}<|im_end|>\n", False))
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


def words_alone(messages: list[dict]) -> Pieces:
    """A template whose generation markers exclude the end-of-turn token."""
    pieces = []
    for text, target in chatml(messages):
        words, end, rest = text.rpartition("<|im_end|>") if target else ("", "", text)
        pieces += [(words, True), (end + rest, False)]
    return pieces


def with_system(messages: list[dict]) -> Pieces:
    return chatml(messages, DEFAULT_SYSTEM)


def thinking(messages: list[dict], enabled: bool = True) -> Pieces:
    """Qwen3: earlier thoughts are removed; a last turn without thoughts gets an empty one."""
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
    pieces = []
    for i, message in enumerate(messages):
        content, thought = message["content"], ""
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        if message["role"] != "assistant":
            pieces.append((content + "<|im_end|>\n", False))
            continue
        if "</think>" in content:
            parts = content.split("</think>")
            content = parts[-1].lstrip("\n")
            thought = parts[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        if i > asked and (i == len(messages) - 1 or thought):
            inner = thought.strip("\n")
            empty = not inner and not enabled  # the generation prompt has written it
            pieces.append((f"<think>\n{inner}\n</think>\n\n", not empty))
            content = content.lstrip("\n")
        pieces += [(content + "<|im_end|>", True), ("\n", False)]
    return pieces


def without_thinking(messages: list[dict]) -> Pieces:
    return thinking(messages, enabled=False)


def headers(messages: list[dict]) -> Pieces:
    """Llama 3: every message is trimmed."""
    pieces = [("<s>", False)]
    for message in messages:
        pieces.append((f"<|start|>{message['role']}<|stop|>\n\n", False))
        pieces.append((message["content"].strip() + "<|eot|>", message["role"] == "assistant"))
    return pieces


def turns(messages: list[dict]) -> Pieces:
    """Gemma: the system prompt is part of the first question; the assistant is called model."""
    pieces, prefix = [("<s>", False)], ""
    if messages[0]["role"] == "system":
        prefix, messages = messages[0]["content"] + "\n\n", messages[1:]
    for message in messages:
        name = "model" if message["role"] == "assistant" else message["role"]
        pieces.append((f"<|start|>{name}\n{prefix}", False))
        pieces.append((message["content"].strip() + "<|stop|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
        prefix = ""
    return pieces


def brackets(messages: list[dict]) -> Pieces:
    """Mistral: an answer has no header and begins with a blank."""
    pieces, prefix = [("<s>", False)], ""
    if messages[0]["role"] == "system":
        prefix, messages = messages[0]["content"] + "\n\n", messages[1:]
    for message in messages:
        if message["role"] == "user":
            pieces.append((f"[INST] {prefix}{message['content']}[/INST]", False))
            prefix = ""
        else:
            pieces.append((f" {message['content']}</s>", True))
    return pieces


def ends(messages: list[dict]) -> Pieces:
    """Phi-3: a text without a generation prompt ends with one more token."""
    pieces = []
    for message in messages:
        pieces.append((f"<|start|>{message['role']}<|stop|>\n", False))
        pieces.append((message["content"] + "<|eot|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return [*pieces, ("</s>", False)]


def plain(messages: list[dict]) -> Pieces:
    """No special token: only the next turn ends a turn."""
    pieces = []
    for message in messages:
        pieces.append((f"\n### {message['role'].upper()}:\n", False))
        pieces.append((message["content"], message["role"] == "assistant"))
        pieces.append(("\n### END", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


LOOP = "{%- for m in messages %}"
CHATML_LOOP = (
    LOOP + "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SYSTEM_FIRST = (
    "{%- set prefix = '' %}{%- set rest = messages %}{%- if messages[0].role == 'system' %}"
    "{%- set prefix = messages[0].content + '\\n\\n' %}{%- set rest = messages[1:] %}{%- endif %}"
)
THINKING = (
    "{%- set ns = namespace(asked=messages|length) %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}"
    "{%- endfor %}" + LOOP + "{{- '<|im_start|>' + m.role + '\\n' }}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n') %}"
    "{%- set thought = thought.split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- set content = content.lstrip('\\n') %}{%- endif %}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    template: str
    pieces: Callable[[list[dict]], Pieces]
    arguments: tuple = ()


FAMILIES = {
    "ChatML": Family(CHATML_LOOP, chatml),
    "ChatML with a system prompt of its own": Family(
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}{%- endif %}"
        + CHATML_LOOP,
        with_system,
    ),
    "ChatML with markers": Family(
        LOOP + "{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{%- else %}"
        "{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        chatml,
    ),
    "ChatML with markers around the words alone": Family(
        LOOP + "{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{- m.content }}{% endgeneration %}{%- else %}"
        "{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        words_alone,
    ),
    "thinking": Family(THINKING, thinking),
    "without thinking": Family(THINKING, without_thinking, (("enable_thinking", False),)),
    "headers": Family(
        "{{- '<s>' }}" + LOOP + "{{- '<|start|>' + m.role + '<|stop|>\\n\\n' }}"
        "{{- m.content | trim + '<|eot|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\\n\\n' }}{%- endif %}",
        headers,
    ),
    "turns": Family(
        SYSTEM_FIRST + "{{- '<s>' }}{%- for m in rest %}"
        "{{- '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{- (prefix if loop.first else '') + (m.content | trim) + '<|stop|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>model\\n' }}{%- endif %}",
        turns,
    ),
    "brackets": Family(
        SYSTEM_FIRST + "{{- '<s>' }}{%- for m in rest %}{%- if m.role == 'user' %}"
        "{{- '[INST] ' + (prefix if loop.first else '') + m.content + '[/INST]' }}{%- else %}"
        "{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}",
        brackets,
    ),
    "a token at the very end": Family(
        LOOP + "{{- '<|start|>' + m.role + '<|stop|>\\n' + m.content + '<|eot|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\\n' }}"
        "{%- else %}{{- '</s>' }}{%- endif %}",
        ends,
    ),
    "no special token": Family(
        LOOP + "{{- '\\n### ' + m.role | upper + ':\\n' + m.content + '\\n### END\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '\\n### ASSISTANT:\\n' }}{%- endif %}",
        plain,
    ),
}  # fmt: skip
