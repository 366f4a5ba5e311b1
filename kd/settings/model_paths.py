"""Check the names and folders of models that a recipe gives; nothing is loaded."""

from pathlib import Path

from kd.model_files import is_path, similar
from kd.recipe import mistake, will_exist

WANTED_MODEL = "wanted a hub name or a folder"


def require_model(key: str, path: str) -> None:
    """Note a model that is not given or that `check_path` refuses.

    Raises ValueError outside of `all_mistakes`.
    """
    if path:
        check_path(key, path)
    else:
        mistake(f"{key}: not given; {WANTED_MODEL}")


def check_path(name: str, path: str) -> None:
    """Note a `path` that looks like a folder and holds no model.

    Raises ValueError outside of `all_mistakes`.
    """
    folder = Path(path)
    if will_exist(path):
        return
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            mistake(
                f"{name}: {path} has neither config.json nor adapter_config.json; wanted the "
                "folder of a finished training run or of one of its checkpoints"
            )
        return
    if is_path(path):
        mistake(
            f"{name}: no folder {path}{similar(folder)}; wanted the folder of a model or a hub name"
        )
