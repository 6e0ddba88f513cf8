"""What the README shows can be done: its rows are read, its Python has every import, commands and settings exist."""

import ast
import builtins
import re
from pathlib import Path

import pytest
import yaml

from rlhf_fast.cli.main import COMMANDS
from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.stages import STAGES
from rlhf_fast.data.check import examine

README = Path(__file__).resolve().parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="not a source checkout")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_the_rows_are_read_as_what_they_stand_for(tmp_path):
    shown = blocks("json")
    for text, kind in zip(shown, ("demonstrations", "comparisons", "prompts"), strict=True):
        (tmp_path / "rows.jsonl").write_text(text)
        report = examine(tmp_path / "rows.jsonl")
        assert report.kind == kind and not report.errors and len(report.examples) == len(text.splitlines())


def test_the_op_that_is_called_learns():
    found = {}
    exec(next(block for block in blocks("python") if "ops.linear_ppo_loss(" in block), found)
    assert found["loss"].isfinite() and found["weight"].grad.any()
    assert found["hidden"].grad.any(1).float().mean() > 0.5  # a clipped token has none


@pytest.mark.parametrize("source", blocks("python") if README.is_file() else [])
def test_python_has_its_imports(source):
    tree = ast.parse(source)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    known |= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(README), "exec"), {})
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            known.add(node.name)
    assert {node.id for node in names} <= known


def test_commands_flags_and_settings_exist():
    commands = re.findall(r"^rlhf-fast (\S+)(.*)$", "\n".join(blocks("sh")), re.M)
    assert {name for name, _ in commands} <= COMMANDS.keys() and len(commands) > 8
    for name, rest in commands:
        for flag in re.findall(r"--([\w.-]+)", rest.partition("#")[0]) if name in STAGES else []:
            assert flag.replace("-", "_") in setting_types(STAGES[name]), flag
    (recipe,) = blocks("yaml")
    for stage, settings in yaml.safe_load(recipe).items():
        for name, value in settings.items() if stage in STAGES else ():
            inside = [f"{name}.{key}" for key in value] if isinstance(value, dict) else [name]
            assert set(inside) <= setting_types(STAGES[stage]).keys()
