"""Refuse to write over anything that is not the command's own. All else that lies there is the user's and stays.

Paths are compared by what they lead to (links, bind mounts, hard links, `..`), and before anything is loaded.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rlhf_fast.config.stages import STAGES
from rlhf_fast.errors import UserError, listed, shortened, writing

RUN = "run.json"
LOCK = "lock"
PARTIAL = ".partial"
"""Suffix of a file that is being written beside the one that it will replace."""
STARTED = ("checkpoints", RUN + ".tmp")
"""Names that a run writes before it has signed its folder by a run.json."""
FIRST_BYTES = b'{\n  "stage": "'
"""Start of every run.json of ours."""
HOUSEKEEPING = (".gitkeep", ".gitignore", ".DS_Store", ".ipynb_checkpoints", "lost+found")
"""Names that an empty folder may hold: other programs put them there, and no command of ours writes or removes them."""


def check_run_folder(out: str | Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return the run.json of our run in `out`, or {} if a new run may start there; UserError if it may not.

    A new run needs a folder that is empty or not there yet. It may lie below a model. `inputs`: setting -> model folder
    or file that it names.
    """
    if not str(out):
        raise UserError("out is not set; give --out FOLDER, or put it in the YAML file")
    folder = Path(out)
    require_writable_folder(folder)
    saved = read_run(folder)
    if saved:
        return saved
    for setting, path in inputs.items():
        if _is_same(folder, path):
            raise UserError(f"{out}: is what {setting} names, and would be written over; choose another `out`")
        if _is_inside(path, folder):
            raise UserError(f"{out}: holds what {setting} names ({path}); choose another `out`")
    check_empty_folder(folder, "run", may_hold=[name for name in STARTED if _is_of_a_start(folder / name)])
    return {}


def check_hub_names(out: str | Path, names: Collection[str]) -> None:
    """Raise UserError if making `out` makes a folder that a hub name among `names` would mean from then on."""
    for name in names:
        if not Path(name).exists() and (_is_same(out, name) or _is_inside(out, name)):
            raise UserError(
                f"{out}: would make the folder {name}, which the hub name {name} would mean from then on; choose"
                " another `out`"
            )


def _is_of_a_start(path: Path) -> bool:
    """Return whether `path` is what a run leaves that is killed before it has signed its folder."""
    if path.is_symlink():
        return False
    if path.name == STARTED[0]:
        entries = list(path.iterdir()) if path.is_dir() else [path]
        return all(entry.name == LOCK and entry.is_file() and not entry.stat().st_size for entry in entries)
    content = path.read_bytes()[: len(FIRST_BYTES)] if path.is_file() else b"?"
    return content == FIRST_BYTES[: len(content)]


def check_empty_folder(folder: str | Path, kind: str, may_hold: Collection[str] = ()) -> None:
    """Raise UserError unless `folder` can be made, or is empty and may be written; and for the home and root folder.

    kind: what is to be written there. may_hold: what it leaves there if it is killed before it has signed the folder.
    """
    folder = Path(folder)
    require_writable_folder(folder)
    if _is_same(folder, Path.home()) or folder.resolve().parent == folder.resolve():
        raise UserError(f"{folder}: is the home or the root folder; choose a folder of its own for the {kind}")
    with writing(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names - {*may_hold, *HOUSEKEEPING} if not name.startswith(".nfs"))
    if others:
        raise UserError(
            f"{folder}: is not empty and no {kind} of ours is in it (it holds {listed(others, 4)}); choose another"
            f" folder, such as {folder / 'new'}"
        )


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return the run.json of our run in `folder`, {} if there is none; UserError if another program wrote it."""
    path = Path(folder) / RUN
    saved = read_json(path)
    if saved is None:
        return {}
    parts = ("config", "data", "versions", "machine")
    known = isinstance(saved, dict) and saved.get("stage") in STAGES
    if not known or not all(isinstance(saved.get(part), dict) for part in parts):
        raise UserError(f"{path}: was not written by a run of ours; choose another `out`, or move that file away")
    return saved


def read_json(path: str | Path) -> Any:
    """Return the contents of a JSON file, None if there is no such file; UserError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(f"{path}: cannot be read: {reason}; choose another folder, or move that file away") from error


def take_lock(folder: str | Path, out: str | Path) -> TextIO:
    """Return the open file `lock` in a folder, which is made if need be; closing it frees the folder.

    UserError if another process has it. out: the folder that the sentence names.
    """
    with writing(out):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = (Path(folder) / LOCK).open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"{out}: another process runs there; wait for it or choose another `out`") from error
    return lock


def require_writable_folder(folder: str | Path) -> None:
    """Raise UserError if `folder` is no folder, or one that cannot be made or written."""
    folder = Path(folder)
    try:
        if folder.is_dir():
            nearest = folder
        elif os.path.lexists(folder):
            what = "is a file" if folder.exists() else "is a link to nowhere"
            raise UserError(f"{folder}: {what}; give a folder")
        else:
            nearest = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shortened(folder)}: cannot be a folder: {reason}; give another name") from error
    if not nearest.is_dir():
        raise UserError(f"{folder}: cannot be made, since {nearest} is a file; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: you may not write to {nearest}; give another folder, or change its permissions")


def check_new_file(path: str | Path, is_ours: Callable[[Path], bool], inputs: Iterable[tuple[str, str]]) -> None:
    """Raise UserError unless a file may be written at `path`: nothing is there, or what `is_ours` accepts.

    `inputs`: settings and the files of theirs that the command reads. A device or a pipe is written as it is.
    """
    target = Path(os.path.realpath(path))
    places = (target, target.with_name(target.name + PARTIAL))
    for setting, file in inputs:
        if _is_same(target, file):
            raise UserError(f"{path}: is the file that {setting} names; choose another --out")
        if (target.is_file() or not target.exists()) and _is_same(places[1], file):
            raise UserError(
                f"{path}: is written as {places[1].name} until it is whole, which is the file that {setting} names;"
                " choose another --out"
            )
    for found in places:
        if found.is_dir():
            raise UserError(f"{found}: is a folder; give a file for --out")
        if found.is_file() and found.stat().st_size and not is_ours(found):
            raise UserError(f"{found}: exists already and no such command wrote it; choose another --out, or move it")
    if not target.parent.is_dir():
        raise UserError(f"{path}: there is no folder {target.parent}; make it, or choose another --out")
    require_writable_folder(target.parent)


@contextmanager
def replacing(path: str | Path, keep: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it takes the place of `path`, which is whole until then.

    keep: leave the unfinished file there if the block fails. A device or a pipe is yielded as it is.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with writing(path):
            yield target
        return
    unfinished = target.with_name(target.name + PARTIAL)
    with writing(path):
        try:
            yield unfinished
            unfinished.replace(target)
        finally:
            if not keep:
                unfinished.unlink(missing_ok=True)


def move_in(entry: Path, folder: Path) -> str:
    """Move `entry` into `folder`. What lies there under its name and differs is kept under another name, which is
    returned; "" if there is none."""
    target = folder / entry.name
    aside = ""
    if os.path.lexists(target) and not _is_equal(entry, target):
        number = next(n for n in range(1, 10**6) if not os.path.lexists(f"{target}.kept{n}"))
        aside = f"{target}.kept{number}"
        target.rename(aside)
    elif target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    entry.replace(target)
    return aside


def _is_equal(one: Path, other: Path) -> bool:
    """Return whether two files, or all files of two folders, have the same bytes."""
    if other.is_symlink() or one.is_dir() != other.is_dir():
        return False
    if one.is_dir():
        names = [sorted(entry.name for entry in folder.iterdir()) for folder in (one, other)]
        return names[0] == names[1] and all(_is_equal(one / name, other / name) for name in names[0])
    return filecmp.cmp(one, other, shallow=False)


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def _is_inside(path: str | Path, folder: str | Path) -> bool:
    """Return whether `path` lies somewhere below `folder`."""
    return any(_is_same(parent, folder) for parent in Path(os.path.realpath(path)).parents)
