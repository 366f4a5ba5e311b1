"""Keep tokens, keys and passwords out of files and messages.

They come from the environment (HF_TOKEN, OPENAI_API_KEY). On a command line or in a recipe they
would also be in the shell's history and in the list of processes, so they are refused there.
"""

import os
import re
from collections.abc import Iterable

HIDDEN = "***"
# The last word of the name of a flag or a URL parameter with a secret.
NAMES = r"(?:token|api[_-]?key|secret|secret[_-]?key|password|passwd|authorization|signature)"
SETTING = re.compile(rf"(?:\w+[_-])?{NAMES}", re.IGNORECASE)
VARIABLE = re.compile(r"\w*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)")
SHORTEST = 16  # characters of a variable's value that counts as a secret; "disabled" does not
VALUE = r"[^\s'\"\\,;&#}\]]"
PATTERNS = (  # what precedes a secret is group 1
    re.compile(r"(://)[^/\s@:'\"\\]*(?::[^/\s@'\"\\]*)?(?=@[\w\[])"),  # a user in a URL
    re.compile(rf"([?&;][\w.-]*(?:{NAMES}|sig)=){VALUE}+", re.IGNORECASE),
    re.compile(rf"(authorization['\"]?\s*[:=]\s*['\"]?){VALUE}{{16,}}", re.IGNORECASE),
    re.compile(rf"(\b(?:bearer|basic)\s+){VALUE}{{16,}}", re.IGNORECASE),
    re.compile(rf"(--(?:\w+[_-])?{NAMES}(?:['\"]?,?\s+['\"]?|=)){VALUE}+", re.IGNORECASE),
    re.compile(r"(\b)(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|gh[posu]_[A-Za-z0-9]{20,})\b"),
)


def without_credentials(text: str) -> str:
    """The text with *** in place of every token, key and password that it contains.

    Those are: the values of environment variables such as HF_TOKEN and OPENAI_API_KEY, the user of
    a URL and its parameters such as token, `Authorization` headers, the values of flags such as
    --hub_token, and the formats of Hugging Face's, OpenAI's and GitHub's tokens.
    """
    for value in environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def environment_secrets() -> list[str]:
    """The secrets in the environment, longest first."""
    values = {value for name, value in os.environ.items() if VARIABLE.fullmatch(name)}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def check_key_variable(name: str, default: str = "OPENAI_API_KEY") -> None:
    """Raise ValueError if `name` is no variable of the environment; it may be the key itself."""
    if name != default and name not in os.environ:
        raise ValueError(
            "key_variable: the environment has no variable of the given name; wanted the name of "
            "the variable that holds the key, not the key"
        )


def refuse_credentials(tokens: Iterable[str]) -> None:
    """Raise ValueError if one of the command-line tokens is a key or holds one.

    `tokens` are those of the command line and of the recipe.
    """
    for token in tokens:
        flag = token[2:].split("=")[0] if token.startswith("--") else ""
        if flag and SETTING.fullmatch(flag):
            raise ValueError(
                f"{flag}: found a secret in the recipe or on the command line, where others can "
                "read it; wanted it in the environment. Set HF_TOKEN (or run hf auth login) for "
                "the hub; for a server's key, set a variable and name it in key_variable"
            )
        hidden = without_credentials(token)
        if hidden != token:
            raise ValueError(
                f"found a secret in {hidden[:200]}, in the recipe or on the command line; such "
                "text is recorded in run.json. Wanted it in the environment: HF_TOKEN for the hub, "
                "OPENAI_API_KEY or the variable that key_variable names for a server"
            )
