"""Which modules of the base are heads: by task, by name, or by what a saved adapter holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.tuning.peft_base import has_base_adapters, is_adapted

# What PEFT trains beside a prompt by default: the layer on top, which is new with every task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def find_heads(
    model: PreTrainedModel, names: Iterable[str] | None, task_type: str | None = None
) -> list[str]:
    """Finds the modules of the base of which an adapter trains copies; returns their full names.

    Without names, modules that an adapter of PEFT's inside the base trains are left out.

    Args:
        model: the base.
        names: the ends of the modules' names. If None, those that PEFT trains for the task:
            "classifier" and "score", or "qa_outputs".
        task_type: PEFT's name of the task; only used if names is None.

    Raises:
        ValueError: the base has no module of a given name, the module cannot be copied, or an
            adapter inside the base trains it.
    """
    wanted = _HEADS.get(task_type or "", ()) if names is None else _as_names(names)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        known = any(module is other for other in found.values())
        if name and name.endswith(wanted) and not inside and not known:
            found[name] = module
    for want in wanted if names is not None else ():
        if not any(name.endswith(want) for name in found):
            raise ValueError(f"modules_to_save: got {want!r}, which {type(model).__name__} lacks")
    adapters = has_base_adapters(model)
    adapted = [name for name, module in found.items() if adapters and is_adapted(module)]
    if adapted and names is not None:
        raise ValueError(
            f"modules_to_save: got {adapted[0]!r}, which an adapter inside the base trains; takes "
            "modules without"
        )
    for name, module in found.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"modules_to_save: got {name!r}, a {type(module).__name__}, takes modules that "
                "compute something"
            )
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save: got {name!r}, whose weights are offloaded or on the meta "
                "device, takes modules whose weights are in memory"
            )
    return [name for name in found if name not in adapted]


def check_saved_heads(
    model: PreTrainedModel,
    saved: Mapping[str, Tensor],
    names: Iterable[str] | None,
    task_type: str | None,
) -> None:
    """Refuses saved heads that do not fit the base.

    Args:
        model: the base.
        saved: tensors by the names of the base's ``state_dict``.
        names: see :func:`find_heads`.
        task_type: see :func:`find_heads`.

    Raises:
        ValueError: the base lacks one of the parameters, has it in another shape, or has more
            parameters in a head than were saved.
    """
    state = model.state_dict()
    heads = [f"{name}." for name in find_heads(model, names, task_type)] if saved else []
    for name, tensor in saved.items():
        known = name in state and name.startswith(tuple(heads))
        if not known or state[name].shape != tensor.shape:
            has = list(state[name].shape) if known else "no such parameter to train"
            raise ValueError(
                f"adapter: holds {name} {list(tensor.shape)}, which was trained beside it; this "
                f"{type(model).__name__} has {has}"
            )
    for head in heads:
        own = [name for name in state if name.startswith(head)]
        missing = [name for name in own if name not in saved]
        if missing and len(missing) < len(own):
            raise ValueError(f"adapter: holds a part of {head[:-1]} alone, without {missing}")


def saved_head_names(config: Mapping[str, Any], heads: Mapping[str, Tensor]) -> list[str] | None:
    """The modules_to_save of a saved adapter, without those of which it holds no parameters.

    PEFT names the modules of a task there whether the base has them or not.

    Args:
        config: the adapter's configuration, as in its file.
        heads: the saved tensors by the names of the base's ``state_dict``.

    Raises:
        ValueError: modules_to_save is no list of names.
    """
    named = config.get("modules_to_save")
    if named is None:
        return None
    parts = [name.split(".") for name in heads]
    modules = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
    return [
        name
        for name in dict.fromkeys(_as_names(named))
        if any(module.endswith(name) for module in modules)
    ]


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    """The value of modules_to_save as a tuple; ValueError if it is no list of names."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save: got {names!r}, takes a list of modules' names")
    return tuple(names)
