"""Compute length_control.json: alpaca_eval's length-controlled win rate on synthetic judgements.

alpaca_eval needs other versions of our packages, so it is installed into a temporary folder:

pip install --no-deps --target /tmp/alpaca alpaca_eval==0.6.6 fire termcolor patsy \
    python-dotenv rich markdown-it-py mdurl pygments tiktoken regex "setuptools<81"
PYTHONPATH=/tmp/alpaca python tests/evaluation/make_length_control.py
"""

import json
import random
import tempfile
from pathlib import Path

import pandas as pd
from alpaca_eval.metrics import glm_winrate

COUNT = 200


def judgements(seed: int, bias: float, taste: float) -> list[tuple[int, int, float]]:
    """Sample (length of the model's answer, length of the baseline's, preference).

    The judge prefers the model by `taste` and long answers by `bias`; some verdicts are ties.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(COUNT):
        model, baseline = draw.randint(5, 900), draw.randint(5, 700)
        wins = 1 / (
            1 + 2.718281828 ** -(taste + bias * (model - baseline) / 400 + draw.gauss(0, 1))
        )
        if draw.random() < 0.6:  # a verdict without log-probabilities
            wins = 0.5 if draw.random() < 0.1 else float(wins > 0.5)
        rows.append((model, baseline, round(wins, 4)))
    return rows


def package_result(rows: list[tuple[int, int, float]]) -> dict[str, float]:
    frame = pd.DataFrame(
        {
            "preference": [1 + preference for _, _, preference in rows],
            "output_1": ["x" * baseline for _, baseline, _ in rows],
            "output_2": ["x" * model for model, _, _ in rows],
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
            "index": range(len(rows)),
        }
    )
    # The package downloads this file for every variant, but "minimal" does not use it.
    difficulty = pd.DataFrame(
        {"index": range(len(rows)), "instruction_difficulty": 0.0, "model": "none"}
    )
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        difficulty.to_csv(file.name, index=False)
        glm_winrate.hf_hub_download = lambda **_: file.name
        found = glm_winrate.get_length_controlled_winrate(
            frame, glm_name="length_controlled_minimal", save_weights_dir=None
        )
    keys = ("win_rate", "standard_error", "length_controlled_winrate")
    return {key: float(found[key]) for key in keys}


def main() -> None:
    cases = []
    for seed, bias, taste in ((0, 1.0, 0.3), (1, 3.0, -1.0), (2, 0.0, 0.0), (3, -2.0, 1.5)):
        rows = judgements(seed, bias, taste)
        cases.append({"judgements": rows, "alpaca_eval": package_result(rows)})
    file = Path(__file__).with_name("length_control.json")
    file.write_text(json.dumps(cases) + "\n")
    print(*(case["alpaca_eval"] for case in cases), sep="\n")


if __name__ == "__main__":
    main()
