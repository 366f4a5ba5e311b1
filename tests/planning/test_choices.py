"""What is chosen for keys that are `auto`, by whom, and why."""

import pytest
from one_run import flags
from published import save_config

from kd.planning.choices import SPARE, Choices, Tried, choose, lines
from kd.planning.fitting import SHARDED, ZERO2, ZERO3, layout_of
from kd.planning.machine import Machine
from kd.planning.memory import plan_training
from kd.settings.machine_file import MachineFile, Preferences
from kd.settings.training_recipe import Recipe, parse_distillation

SMALL = {"gradient_checkpointing": True}
PLENTY = 800 * 2.0**30
GPUS = {"processes": 4, "device": "cuda", "memory": PLENTY, "per_machine": 4, "bfloat16": True}


@pytest.fixture
def recipe(models, tmp_path):
    """A function that parses a distillation with further flags."""

    def parsed(**changes) -> Recipe:
        given = {"global_batch_size": 4, "max_length": 64} | changes
        return parse_distillation(argv=flags(models, tmp_path / "run", **given))

    return parsed


def machine(file: dict | None = None, **changes) -> Machine:
    """Four GPUs of one machine; `file` holds the preferences of a machine file."""
    found = MachineFile()
    object.__setattr__(found, "preferences", Preferences(**file or {}))
    return Machine(**GPUS | changes, file=found)


def needed(recipe: Recipe, on: Machine, **values) -> float:
    """The planned memory of a recipe with explicit values."""
    for part in (recipe.training, recipe.teacher):
        vars(part).update({key: value for key, value in values.items() if key in vars(part)})
    return plan_training(layout_of(choose(recipe, on, {}), 64, on)).total


def test_explicit_values_win_then_the_earlier_run_then_the_machine_file(recipe):
    file = {"precision": "float16", "gradient_checkpointing": True, "attn_implementation": "eager"}
    earlier = {"precision": "float32", "gradient_checkpointing": False}
    found = choose(recipe(precision="bfloat16"), machine(file), earlier)
    assert found.training.precision == "bfloat16" and "precision" not in found.chosen
    assert found.training.gradient_checkpointing is False
    assert found.chosen["gradient_checkpointing"] == "as in the run that is resumed"
    assert found.model.attn_implementation == "eager"
    assert found.chosen["attn_implementation"] == "machine none"
    assert "attn_implementation: eager (machine none)" in lines(found).splitlines()


@pytest.mark.parametrize(
    ("device", "precision", "why"),
    [
        ({"device": "cpu"}, "float32", "on a CPU"),
        ({"bfloat16": False}, "float16", "the GPU has no bfloat16"),
        ({}, "bfloat16", "the GPU has it"),
    ],
)
def test_the_device_decides_on_the_precision(recipe, device, precision, why):
    found = choose(recipe(), machine(**device), {})
    assert (found.training.precision, found.chosen["precision"]) == (precision, why)
    assert found.training.use_cpu == (device == {"device": "cpu"})


@pytest.mark.parametrize(
    ("device", "attention"), [({"flash_attention": True}, "flash_attention_2"), ({}, "sdpa")]
)
def test_flash_attention_is_used_where_it_can_run(recipe, device, attention):
    assert choose(recipe(), machine(**device), {}).model.attn_implementation == attention
    alone = choose(recipe(precision="float32"), machine(**device), {})
    assert alone.model.attn_implementation == "sdpa"


def test_one_process_shards_nothing(recipe):
    file = {"deepspeed": ZERO3, "teacher_deepspeed": SHARDED}
    found = choose(recipe(), machine(file, processes=1, per_machine=1), {})
    assert (found.training.deepspeed, found.teacher.teacher_deepspeed) == ("none", "none")
    assert found.chosen["deepspeed"] == found.chosen["teacher_deepspeed"] == "one process"


def test_a_teacher_that_fills_its_cache_is_planned_without_the_student(recipe, tmp_path):
    filling = recipe(teacher_cache=tmp_path / "cache")
    found = choose(filling, machine(), {}, trains=False)
    assert found.chosen["deepspeed"] == "no student is trained"
    assert found.teacher.teacher_deepspeed == "none"
    assert found.chosen["teacher_deepspeed"].startswith("the run fits, ")
    sharded = choose(filling, machine({"teacher_deepspeed": SHARDED}), {}, trains=False)
    assert sharded.teacher.teacher_deepspeed == SHARDED
    reading = choose(filling, machine(), {})
    why = "no teacher is loaded beside the student"
    assert reading.chosen["teacher_deepspeed"] == why


def test_sharding_and_checkpointing_are_for_what_does_not_fit_otherwise(recipe, tmp_path):
    llama, qwen = "meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
    sizes = {"student": save_config(tmp_path / "8B", llama)}
    sizes["teacher"] = save_config(tmp_path / "1.5B", qwen)
    found = choose(recipe(**sizes), machine(), {})
    assert found.training.deepspeed == ZERO2 and found.teacher.teacher_deepspeed == "none"
    assert found.training.gradient_checkpointing is False
    assert found.chosen["deepspeed"].startswith("the run fits, ")
    # Less memory than the smallest layout under ZeRO-2 needs, if a tenth is to stay free.
    two, three = (
        min(
            needed(
                recipe(**sizes),
                machine(),
                deepspeed=stage,
                teacher_deepspeed=teacher,
                **SMALL,
            )
            for teacher in ("none", SHARDED)
        )
        / SPARE
        for stage in (ZERO2, ZERO3)
    )
    assert three < two
    found = choose(recipe(**sizes), machine(memory=(two + three) / 2), {})
    assert found.training.deepspeed == ZERO3
    assert found.chosen["deepspeed"].startswith("nothing else leaves memory to spare; ")
    found = choose(recipe(**sizes), machine(memory=1.001 * two), {})
    assert found.training.deepspeed == ZERO2
    assert found.chosen["deepspeed"].startswith("it fits without ZeRO-3, ")
    found = choose(recipe(**sizes), machine(memory=2.0**20), {})
    assert found.chosen["deepspeed"].startswith("nothing fits; this is the smallest, ")


def test_a_teacher_is_shared_within_a_node_where_that_fits(recipe):
    file = {"teacher_deepspeed": SHARDED, "gradient_checkpointing": True, "deepspeed": ZERO2}
    nodes = {"per_machine": 2}
    found = choose(recipe(), machine(file, **nodes), {})
    assert found.teacher.teacher_sharded_over == "node"
    within, over_all = (
        needed(recipe(), machine(file, **nodes), teacher_sharded_over=over) / SPARE
        for over in ("node", "all")
    )
    assert over_all < within
    found = choose(recipe(), machine(file, memory=(within + over_all) / 2, **nodes), {})
    assert found.teacher.teacher_sharded_over == "all"
    assert "teacher_sharded_over" in found.chosen
    single = choose(recipe(), machine(file), {})  # of one node: no choice, and nothing to tell
    assert single.teacher.teacher_sharded_over == "all"
    assert "teacher_sharded_over" not in single.chosen


@pytest.mark.parametrize(("seconds", "checkpointing"), [(1.09, True), (1.11, False)])
def test_a_smaller_layout_is_taken_if_its_step_is_at_most_a_tenth_longer(
    recipe, monkeypatch, seconds, checkpointing
):
    def tried(self, keys, options):
        large, small = self.planned(SMALL | {keys[-1]: False}), self.planned(SMALL)
        assert small.total < large.total and large.share <= SPARE
        return [Tried({keys[-1]: False}, large, 1.0), Tried(SMALL, small, seconds)]

    monkeypatch.setattr(Choices, "tried", tried)
    layout = {"deepspeed": ZERO2, "teacher_deepspeed": "none"}
    found = choose(recipe(**layout), machine(), {})
    assert found.training.gradient_checkpointing is checkpointing
