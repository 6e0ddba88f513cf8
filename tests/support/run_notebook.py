"""Run the code cells of a notebook from top to bottom, as Jupyter would, without Jupyter: the cells use no magics.

    python tests/support/run_notebook.py examples/call_ops.ipynb

It stops at the first exception, says in which cell, and exits with status 1. Connections to other machines are refused.
"""

import json
import linecache
import sys
import traceback
from pathlib import Path


def source(cell: dict) -> str:
    """Return the text of a cell, which the format keeps as a list of lines or as one text."""
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    """Return the code cells of a notebook in order."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def refuse_connections(event: str, args: tuple) -> None:
    """Raise at a connection over a network; those within the machine's own file system are none."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        raise PermissionError(f"connects to {args[1]}, but a notebook runs offline")


def run(path: Path) -> int:
    """Run a notebook in this process's `__main__`; return the exit status."""
    namespace = vars(sys.modules["__main__"])  # so that functions of a cell belong to __main__, as in Jupyter
    cells = [(source(cell), f"<{path.name}, cell {i}>") for i, cell in enumerate(code_cells(path), 1)]
    lines, print_traceback, stderr = linecache.cache, traceback.print_exc, sys.stderr  # a cell may use these names
    for text, file in cells:
        lines[file] = (len(text), None, text.splitlines(True), file)  # for tracebacks and inspect.getsource
        try:
            exec(compile(text, file, "exec"), namespace)
        except BaseException:
            print_traceback()
            stderr.write(f"{file[1:-1]} failed\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.addaudithook(refuse_connections)
    sys.exit(run(Path(sys.argv[1])))
