"""Settings are checked and --help is shown before torch or Transformers is imported."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

FOLDERS = ("train", "eval")
SCRIPTS = sorted(f"{name}/{file.name}" for name in FOLDERS for file in (ROOT / name).glob("*.py"))
HEAVY = {"torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "pandas"}
STARTS = {
    "--help": ["--help"],
    "--help-all": ["--help-all"],
    "mistakes": ["--config", "RECIPE", "--no_such_key", "1"],
}
# One fresh interpreter for all scripts; that of pytest has imported torch.
PROGRAM = """
import contextlib, io, json, runpy, sys
told = []
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(script)["main"]()
    except SystemExit as exit:
        told.append([exit.code, printed.getvalue()])
    except ValueError as error:
        told.append([2, str(error)])
print(json.dumps([told, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What each script printed for each of STARTS, and the modules that were imported."""
    recipe = tmp_path_factory.mktemp("light") / "recipe.yaml"
    recipe.write_text("no_key_of_any_script: 1\n")
    flags = {name: [str(recipe) if f == "RECIPE" else f for f in STARTS[name]] for name in STARTS}
    keys = [(script, name) for script in SCRIPTS for name in STARTS]
    commands = json.dumps([[script, *flags[name]] for script, name in keys])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, commands], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, modules = json.loads(done.stdout)
    return dict(zip(keys, told, strict=True)), {name.split(".")[0] for name in modules}


def test_no_start_imports_torch_or_transformers(started):
    assert not HEAVY & started[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_of_the_recipe_and_of_the_command_line_are_told_together(started, script):
    code, text = started[0][script, "mistakes"]
    assert code == 2
    assert "recipe.yaml: unknown key no_key_of_any_script" in text
    assert "\n  unknown key no_such_key" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_our_keys_and_help_all_the_rest(started, script):
    (code, short), (_, long) = started[0][script, "--help"], started[0][script, "--help-all"]
    assert code == 0 and "--config" in short
    shown, all_shown = (
        {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
        for text in (short, long)
    )
    assert shown <= all_shown
    trains = "--learning_rate" in shown
    assert trains == ("--adam_beta1" in all_shown) and "--adam_beta1" not in shown
    assert ("more keys" in short) == trains and "more keys" not in long
