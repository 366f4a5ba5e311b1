"""The built-in judge prompts; a file in FastChat's format (judge_prompts.jsonl) replaces them.

The names are FastChat's: single-... asks for a grade, pair-... for the better of two answers;
-math- shows a reference, -multi-turn the whole conversation. `token-v1` asks for one token, like
AlpacaEval 2.0.
"""

from kd.evaluation.judge.questions import read_rows

SCORE = (
    "You grade an assistant's answer. Weigh whether it is correct, helps with what was asked, goes "
    "deep enough and is clear. Explain your judgement in a few sentences, then end with a grade "
    'from 1 (useless) to 10 (excellent) in double square brackets, such as "Grade: [[4]]".'
)
SECOND = " Grade the answer to the second question; the first turn is there as its context."
REFERENCE = " A reference answer is given: where the assistant differs from it, find who is right."
PAIR = (
    "You compare two assistants' answers to the same question. Decide which one follows the "
    "question and helps the user more; weigh correctness, depth and clarity. Neither the order in "
    "which they stand, nor their length, nor their names may count. Explain your judgement in a "
    "few sentences, then end with [[A]] if assistant A is better, [[B]] if assistant B is better, "
    "[[C]] if they are equally good."
)
PAIR_SECOND = " Compare the answers to the second question; the first turn is their context."
TOKEN = (
    "Two models, m and M, were given the same instruction. Decide which output a careful human "
    "would prefer. Answer with the one letter m or M and nothing else."
)


def _conversation(who: str, answer: str) -> str:
    """The template of two turns; `answer` is the prefix of the names of the answer fields."""
    turns = "\n\n".join(f"Question: {{question_{i}}}\n\n{who}: {{{answer}_{i}}}" for i in (1, 2))
    return f"=== {who} ===\n\n{turns}\n\n=== end of {who} ==="


def default_prompts() -> dict[str, dict[str, str]]:
    """{name: {"system_prompt", "prompt_template"}} with FastChat's field names in braces."""
    question = "Question: {question}\n\n"
    reference = "Reference answer: {ref_answer_1}\n\n"
    two = "Answer of assistant A: {answer_a}\n\nAnswer of assistant B: {answer_b}"
    references = _conversation("Reference", "ref_answer") + "\n\n"
    one = _conversation("Assistant", "answer")
    both = "\n\n".join(_conversation(f"Assistant {x.upper()}", f"answer_{x}") for x in "ab")
    written = {
        "single-v1": (SCORE, question + "Answer: {answer}"),
        "single-math-v1": (SCORE + REFERENCE, question + reference + "Answer: {answer}"),
        "single-v1-multi-turn": (SCORE + SECOND, one),
        "single-math-v1-multi-turn": (SCORE + SECOND + REFERENCE, references + one),
        "pair-v2": (PAIR, question + two),
        "pair-math-v1": (PAIR + REFERENCE, question + reference + two),
        "pair-v2-multi-turn": (PAIR + PAIR_SECOND, both),
        "pair-math-v1-multi-turn": (PAIR + PAIR_SECOND + REFERENCE, references + both),
        "token-v1": (
            TOKEN,
            "Instruction: {question}\n\nOutput of m:\n{answer_a}\n\nOutput of M:\n{answer_b}\n\n"
            "Which one is better, m or M?",
        ),
    }
    return {n: {"system_prompt": s, "prompt_template": t} for n, (s, t) in written.items()}


def read_prompts(file: str | None) -> dict[str, dict[str, str]]:
    """The built-in prompts, overridden by those of `file`. Raises ValueError for an invalid row."""
    prompts = default_prompts()
    for row in read_rows("judge_prompts", file) if file else []:
        if not {"name", "system_prompt", "prompt_template"} <= set(row):
            raise ValueError(
                f"judge_prompts: {file}: fields {sorted(row)}; wanted name, system_prompt and "
                "prompt_template"
            )
        prompts[row["name"]] = {k: row[k] for k in ("system_prompt", "prompt_template")}
    return prompts
