"""PEFT's adapters inside the base model, such as LoRA, which are trained together with a prefix.

PEFT puts their weights into the base's own modules, by ``peft.get_peft_model`` or by transformers'
``model.add_adapter``. The base stays the same transformers model. In the folder of one of our
adapters, the inner adapter has a sub-folder in PEFT's format.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.files import (
    read_json,
    read_safetensors,
    reason,
    write_safetensors,
    written_together,
)
from fastprefix.formats.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    checked_config,
    config_metadata,
    find,
    own_metadata,
)
from fastprefix.formats.source import Source, as_source

BASE_FOLDER = "base_model"
_PREFIX = "base_model.model."  # PEFT's names of tensors start at its wrapper
# Fields that make PEFT import a module or read a file.
_ELSEWHERE = ("adapters", "megatron_config")


def unwrap(model: Any) -> Any:
    """Returns the transformers model inside a PeftModel, with PEFT's layers; others as they are.

    Raises:
        ValueError: the model is a PeftModel, or a tuned model of ours, with a prompt or prefix of
            its own, which the model inside does not have.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"model: got a {type(model).__name__} with {kind} adapter {name!r}, takes a model "
                "whose adapters sit inside it, as LoRA's; load the prefix from its folder"
            )
    return model.get_base_model()


def has_base_adapters(model: PreTrainedModel) -> bool:
    """Whether PEFT has put adapters into a model."""
    return bool(getattr(model, "peft_config", None))


def is_adapted(module: nn.Module) -> bool:
    """Whether an adapter of PEFT trains a module or a part of it. PEFT must be installed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(part, kinds) for part in module.modules())


def freeze(model: PreTrainedModel) -> None:
    """Freezes a model. If it has PEFT's adapters inside, PEFT has frozen the rest already."""
    if not has_base_adapters(model):
        model.requires_grad_(False)


def check_base_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Checks that the active adapter inside a model can be saved in a folder.

    Raises:
        ValueError: several adapters are active; or there is none, and the folder holds one.
    """
    folder = folder / BASE_FOLDER
    if not has_base_adapters(model):
        if (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"folder: {folder} holds an adapter inside the base, this model has none; choose "
                "another folder"
            )
        return
    names = _active(model)
    if len(names) != 1:
        raise ValueError(
            f"base_model: got {names} as active PEFT adapters inside it, takes one to be saved"
        )


def save_base_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Writes the active adapter inside a model, if any, into a sub-folder, which PEFT can load.

    Raises:
        OSError: the files cannot be written.
        ValueError: see :func:`check_base_adapter`.
    """
    check_base_adapter(folder, model)
    if not has_base_adapters(model):
        return
    (name,) = _active(model)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    with written_together(folder / BASE_FOLDER) as partial:
        config.save_pretrained(partial)
        metadata = config_metadata(read_json(partial / CONFIG_FILE))
        write_safetensors(partial / WEIGHTS_FILE, _weights(model, name), metadata)


def find_base_adapter(name_or_folder: str | Path | Source) -> Path | None:
    """Finds the sub-folder that :func:`save_base_adapter` wrote; None if there is none."""
    place = as_source(name_or_folder)
    config = place.look_for(f"{BASE_FOLDER}/{CONFIG_FILE}")
    if config is None:
        return None
    if place.folder is None:  # download the weights into the same folder
        place.find(f"{BASE_FOLDER}/{WEIGHTS_FILE}")
    return config.parent


def is_base_adapter(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the active adapter inside a model has the same numbers as a saved one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    saved = _read(folder)
    if not has_base_adapters(model) or len(_active(model)) != 1:
        return False
    found = _weights(model, _active(model)[0])
    return saved.keys() == found.keys() and all(
        x.shape == found[name].shape and torch.equal(x.to(found[name].dtype), found[name])
        for name, x in saved.items()
    )


def load_base_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool) -> None:
    """Puts a saved adapter into a model, under the name "default".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model has adapters inside already, or the saved one does not fit. The model
            then stays as it was.
    """
    if has_base_adapters(model):
        raise ValueError(
            f"model: got one with PEFT adapters {list(model.peft_config)} inside, and {folder} "
            "holds another; pass the model without"
        )
    file = find(folder, WEIGHTS_FILE)
    saved = _read(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if not all(torch.isfinite(x).all() for x in saved.values()):
            raise ValueError("holds a NaN or infinity")
        _put_in(model, folder, saved, is_trainable=is_trainable)
    except Exception as error:
        if has_base_adapters(model):
            _take_out(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise ValueError(f"{file}: {error}") from error


def _read(folder: Path) -> dict[str, Tensor]:
    """Reads a saved adapter's tensors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the configuration names code or files outside of the
            folder.
    """
    config_file, file = find(folder, CONFIG_FILE), find(folder, WEIGHTS_FILE)
    config = read_json(config_file)
    for name in _ELSEWHERE:
        if config.get(name):
            raise ValueError(
                f"{config_file}: got {name} {config[name]!r}, takes none: it names what lies "
                "outside of this folder"
            )
    try:
        saved, metadata = read_safetensors(file)
        about = own_metadata(metadata)
    except Exception as error:
        raise ValueError(f"{file}: {reason(error)}") from error
    whole = checked_config(config, about, config_file, file)
    missing = sorted(whole.keys() - config.keys())
    if missing:  # PEFT reads the configuration itself, and would use its defaults
        raise ValueError(f"{config_file}: got no {missing[0]}, takes {whole[missing[0]]!r}")
    return saved


def _weights(model: PreTrainedModel, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's tensors, by the names that PEFT gives them in a file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {f"{_PREFIX}{name}": x.detach().cpu() for name, x in state.items()}


def _put_in(
    model: PreTrainedModel, folder: Path, saved: dict[str, Tensor], *, is_trainable: bool
) -> None:
    """Loads tensors by PEFT's own functions; transformers' functions need the newest PEFT."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    inject_adapter_in_model(config, model, "default")
    model._hf_peft_config_loaded = True  # transformers' own switches then find it
    found = _weights(model, "default")
    problem = saved.keys() ^ found.keys() or {
        name for name, x in saved.items() if x.shape != found[name].shape
    }
    if problem:
        raise ValueError(f"does not fit {type(model).__name__} in {sorted(problem)}")
    weights = {name.removeprefix(_PREFIX): x for name, x in saved.items()}
    set_peft_model_state_dict(model, weights, adapter_name="default")


def _take_out(model: PreTrainedModel) -> None:
    """Removes the only adapter, "default", and PEFT's layers with it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
    del model.peft_config
    model._hf_peft_config_loaded = False


def _active(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    return list(next(layers).active_adapters)
