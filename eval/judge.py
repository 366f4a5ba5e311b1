"""Let an LLM judge grade answers (MT-Bench), or compare them with a baseline's (AlpacaEval).

python eval/judge.py --questions mt_bench/question.jsonl --models student=runs/student \
    --judge gpt-4o --server https://api.openai.com/v1

With --mode pair --baseline NAME the result is a win rate. Results are in OUT_DIR/judge/BENCHMARK. A
rerun requests only what is missing. Results of different judges are not comparable.
"""

from kd.distributed import rank, start_gloo
from kd.recipe import parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.judge import JudgeSettings


def main() -> None:
    (settings,) = parse(JudgeSettings, description=__doc__)
    check_writable("out_dir", settings.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.judge.judge_record import describe_judgements, print_result
    from kd.evaluation.judge.judge_requests import open_client, request_missing
    from kd.evaluation.judge.judge_results import summarize
    from kd.evaluation.judge.judged_answers import collect_answers
    from kd.evaluation.judge.judgements import make_judge, plan_judgements
    from kd.evaluation.judge.questions import read_difficulties, read_questions, read_references
    from kd.evaluation.results import write_result

    questions = read_questions(settings.questions)
    references = read_references(settings.references, questions)
    judge = make_judge(settings, questions)
    difficulties = read_difficulties(settings.instruction_difficulty, questions)
    client = open_client(settings)  # a wrong URL or a missing key fails before any model answers
    start_gloo()
    answers = collect_answers(settings, questions)
    if rank():
        return
    plan = plan_judgements(judge, questions, answers, references, settings.baseline)
    verdicts = request_missing(settings, client, plan)
    for name, judgements in plan.items():
        result = summarize(judge, judgements, verdicts, answers, settings.baseline, difficulties)
        file = settings.folder / "results" / f"{name}.json"
        description = describe_judgements(settings, judge, questions, references, judgements)
        write_result(file, description, result)
        print_result(name, result, file)


if __name__ == "__main__":
    run(main)
