"""Run a notebook from its first cell to its last, without the hub.

python examples/run_notebook.py examples/notebooks/2_prefix_against_prompt_tuning.ipynb
python examples/run_notebook.py NOTEBOOK --quick    # the small setting of the tests
python examples/run_notebook.py NOTEBOOK --write    # keeps what the cells print and draw
"""

import argparse
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def execute(path: Path, **parameters: Any) -> NotebookNode:
    """The notebook with its outputs.

    Args:
        path: of the notebook, in whose folder it runs.
        parameters: values for names of the cell with the tag "parameters"; a cell behind it sets
            them, as papermill does.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    tagged = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(values))
    resources = {"metadata": {"path": str(path.resolve().parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    del notebook.cells[tagged[0] + 1]
    return notebook


def printed(notebook: NotebookNode) -> str:
    """All that its cells print."""
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )


def main() -> None:
    """Runs the notebook that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--quick", action="store_true", help="the small setting")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the file")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    notebook = execute(args.notebook, QUICK=args.quick)
    print(printed(notebook))
    if args.write:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which would change the file each time
            if cell.cell_type == "code":  # warnings name places on this machine
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        nbformat.write(notebook, args.notebook)


if __name__ == "__main__":
    main()
