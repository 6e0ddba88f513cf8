"""`import rlhf_fast`: the names that users need, loaded at first use and visible to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_fast

PACKAGE = Path(rlhf_fast.__file__).parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_torch():
    code = (
        "import sys, rlhf_fast; dir(rlhf_fast); print(*sorted({'numpy', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert run(code) == ""


def test_settings_load_no_torch():
    assert (
        run("import sys; from rlhf_fast import PPOConfig, UserError; PPOConfig(); print('torch' in sys.modules)")
        == "False"
    )


@pytest.mark.parametrize("name", rlhf_fast.__all__)
def test_every_name_is_there(name):
    assert name in dir(rlhf_fast)
    value = getattr(rlhf_fast, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name
    assert getattr(rlhf_fast, name) is value


@pytest.mark.slow
def test_import_star():
    code = "from rlhf_fast import *; import rlhf_fast; print(*sorted(set(rlhf_fast.__all__) - globals().keys()))"
    assert run(code) == ""


def test_a_wrong_name_is_an_attribute_error_in_pythons_words():
    with pytest.raises(AttributeError, match=r"^module 'rlhf_fast' has no attribute 'Modell'$"):
        rlhf_fast.Modell  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Modell' from 'rlhf_fast'"):
        from rlhf_fast import Modell  # noqa: F401


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = {alias.name: node.module for node in block.body for alias in node.names}
    for name, module in imports.items():
        expected = "rlhf_fast" if name == "ops" else f"rlhf_fast.{rlhf_fast._MODULES[name]}"
        assert module == expected, name
    assert {*imports, "__version__"} == {*rlhf_fast._MODULES, "__version__"} == set(rlhf_fast.__all__)
    assert (PACKAGE / "py.typed").is_file()
