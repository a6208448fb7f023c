"""``fastprefix inspect``: tables or JSON, and errors that name what was wrong."""

from __future__ import annotations

import json

from typer.testing import CliRunner, Result

from fastprefix.cli.app import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_json_holds_loops_occupancy_and_bytes_of_the_chosen_problem() -> None:
    result = run("--arch", "sm_80", "--kernel", "fwd", "--batch", "3", "--prefix", "100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["note"].startswith("STATIC")
    (forward,) = found["kernels"]
    assert forward["kernel"] == "prefix_attn_fwd_kernel"
    assert (forward["case"]["batch"], forward["case"]["prefix"]) == (3, 100)
    assert len(forward["loops"]) == 4
    assert forward["occupancy"]["bound_by"] == "registers"
    assert forward["traffic"]["requested"] > forward["traffic"]["least"]


def test_tables_say_that_they_are_static() -> None:
    result = run("--arch", "sm_80", "--kernel", "fwd")
    assert result.exit_code == 0, result.output
    for words in ("sm_80, head size 64, bf16", "Occupancy", "prefix tail", "HMMA.16816", "STATIC"):
        assert words in result.output


def test_an_unknown_architecture_is_named_with_those_that_exist() -> None:
    result = run("--arch", "sm_70")
    assert result.exit_code == 2
    assert "--arch: got 'sm_70', takes one of sm_80, sm_86" in result.stderr
