"""What is chosen for keys that are `auto`, by whom, and why."""

import itertools
from pathlib import Path

import one_run
import pytest
from published import save_config
from transformers import Qwen2Config

from kd.planning.choices import PLANNED, choose, lines
from kd.planning.fitting import SHARDED, TYPICAL, ZERO2, ZERO3, fit, layout_of
from kd.planning.layout import GIB, SPARE, Plan
from kd.planning.machine import Machine
from kd.planning.memory import loss_tile, plan_training
from kd.planning.throughput import duration
from kd.settings.machine_file import MachineFile, Preferences, read_machine_file
from kd.settings.training_recipe import Recipe, parse_distillation

LENGTH = 512  # of the rows of `pair`
SMALL = {"gradient_checkpointing": True}
PLENTY = 800 * 2.0**30
GPUS = {"processes": 4, "device": "cuda", "memory": PLENTY, "per_machine": 4, "bfloat16": True}


@pytest.fixture
def recipe(models, tmp_path):
    """A function that parses a distillation with further flags."""

    def parsed(**changes) -> Recipe:
        given = {"global_batch_size": 4, "max_length": 64} | changes
        return parse_distillation(argv=one_run.flags(models, tmp_path / "run", **given))

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
    assert found.chosen["deepspeed"].startswith("it fits without ZeRO-3, ")
    assert found.chosen["gradient_checkpointing"].startswith("the run fits, ")
    # Less memory than the smallest layout under ZeRO-2 needs, if SPARE is to stay free.
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
        / (1 - SPARE)
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
        needed(recipe(), machine(file, **nodes), teacher_sharded_over=over) / (1 - SPARE)
        for over in ("node", "all")
    )
    assert over_all < within
    found = choose(recipe(), machine(file, memory=(within + over_all) / 2, **nodes), {})
    assert found.teacher.teacher_sharded_over == "all"
    assert "teacher_sharded_over" in found.chosen
    single = choose(recipe(), machine(file), {})  # of one node: no choice, and nothing to tell
    assert single.teacher.teacher_sharded_over == "all"
    assert "teacher_sharded_over" not in single.chosen


def pair(folder: Path, vocab_size: int, hidden: int) -> dict:
    """Flags of a student and a teacher, of which only the configurations exist."""
    flags = {"global_batch_size": 16, "max_length": LENGTH}
    for role, width in (("student", hidden), ("teacher", 2 * hidden)):
        config = Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=24,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        config.save_pretrained(folder / role)
        flags[role] = folder / role
    return flags


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict:
    """Models whose vocabulary is so large that tiles matter."""
    return pair(tmp_path_factory.mktemp("wide"), vocab_size=151_936, hidden=128)


def keys_of(values: dict) -> dict:
    """The searched keys of a command line with these values."""
    rows = values["per_device_train_batch_size"]
    return values | {"gradient_accumulation_steps": 16 // 4 // rows}


def enumerated(recipe, flags, **fixed) -> list[tuple[Plan, float, dict]]:
    """Plan, time of a step and values of all layouts with some `fixed` values, given by flags."""
    found = []
    options = {key: values for key, values in PLANNED.items() if key != "teacher_sharded_over"}
    options["per_device_train_batch_size"] = [1, 2, 4]
    options |= {key: [value] for key, value in (flags | fixed).items() if key in options}
    for combination in itertools.product(*options.values()):
        values = dict(zip(options, combination, strict=True))
        chosen = choose(recipe(**flags | keys_of(values)), machine(), {})
        plan = plan_training(layout_of(chosen, LENGTH, machine()))
        found.append((plan, duration(plan.layout, TYPICAL).step, values))
    return found


def test_the_choice_is_the_fastest_of_all_layouts_that_leave_memory_to_spare(recipe, wide):
    layouts = enumerated(recipe, wide)
    totals = sorted(plan.total for plan, *_ in layouts)
    found = set()
    for place in (0, 5, 20, 40, 70, 100, len(totals) - 1):
        memory = totals[place] / (1 - SPARE) + 1
        fitting = [
            (values["deepspeed"] == ZERO3, seconds)  # ZeRO-3 is a last resort
            for plan, seconds, values in layouts
            if plan.total <= (1 - SPARE) * memory
        ]
        chosen = choose(recipe(**wide), machine(memory=memory), {})
        plan = plan_training(layout_of(chosen, LENGTH, machine(memory=memory)))
        assert plan.fits
        step = duration(plan.layout, TYPICAL).step
        assert (chosen.training.deepspeed == ZERO3, step) == min(fitting), place
        values = chosen.to_dict()
        found.add(tuple(values[key] for key in (*PLANNED, "per_device_train_batch_size")))
        assert {"loss_workspace_mb", "per_device_train_batch_size"} <= chosen.chosen.keys()
    assert len(found) > 3  # the memory decides


def test_a_smaller_micro_batch_without_checkpointing_is_chosen_where_it_is_faster(recipe, tmp_path):
    given = pair(tmp_path, vocab_size=1024, hidden=512)
    given |= {"deepspeed": ZERO2, "teacher_deepspeed": "none", "lora_rank": 8}

    def total(**keys) -> float:
        chosen = choose(recipe(**given, **keys), machine(), {})
        return plan_training(layout_of(chosen, LENGTH, machine())).total

    small = total(gradient_checkpointing=False, per_device_train_batch_size=2)
    large = total(gradient_checkpointing=True, per_device_train_batch_size=4)
    assert total(gradient_checkpointing=False, per_device_train_batch_size=4) > max(small, large)
    on = machine(memory=max(small, large) / (1 - SPARE) + 1)
    found = choose(recipe(**given), on, {})
    assert found.training.gradient_checkpointing is False
    assert found.training.per_device_train_batch_size == 2
    assert found.training.gradient_accumulation_steps == 2
    why = found.chosen["gradient_checkpointing"]
    assert why.startswith("the fastest that fits, ") and "otherwise a step takes 1." in why
    kept = choose(recipe(**given, gradient_checkpointing=True), on, {})
    assert kept.training.per_device_train_batch_size == 4


def test_a_run_that_leaves_too_little_memory_free_gets_its_smallest_plan(recipe, wide):
    given = wide | {"deepspeed": ZERO2, "teacher_deepspeed": "none", "teacher_workspace_mb": 1024}
    layouts = enumerated(recipe, given, loss_workspace_mb=128)
    smallest = min(plan.total for plan, *_ in layouts)
    on = machine(memory=1.02 * smallest)
    found = choose(recipe(**given), on, {})
    plan = fit(layout_of(found, LENGTH, on), fixed_batch=False)
    assert plan.total == smallest and not plan.fits and not plan.exceeds
    assert "leaves less than 8% free" in str(plan)
    why = "nothing leaves 8% of the memory free; this is the smallest, "
    assert found.chosen["gradient_checkpointing"].startswith(why)
    found = choose(recipe(**given), machine(memory=0.99 * smallest), {})
    assert found.chosen["gradient_checkpointing"].startswith("nothing fits; this is the smallest, ")


@pytest.mark.parametrize("name", ["a100", "h100"])
def test_tiles_of_the_loss_exceed_the_ridge_of_a_card_with_80_gb(recipe, wide, name):
    """A product of n tokens with a head does n operations per byte of its bfloat16 weights."""
    file = read_machine_file(name)
    on = Machine(**GPUS | {"memory": file.memory_gb * GIB}, file=file)
    long = wide | {"global_batch_size": 32}
    chosen = choose(recipe(**long), on, {})
    assert chosen.objective.loss_workspace_mb == 2048
    ridge = 1000 * file.tflops / file.memory_gb_s
    assert loss_tile(layout_of(chosen, LENGTH, on)) > 2 * ridge
    small = choose(recipe(**long, loss_workspace_mb=512), on, {})
    assert loss_tile(layout_of(small, LENGTH, on)) < 2 * ridge
