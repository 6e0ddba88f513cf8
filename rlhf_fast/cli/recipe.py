"""`rlhf-fast run` and `rlhf-fast sweep`: a recipe with flags over its values."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence

from rlhf_fast.config.recipe_flags import combinations, overrides, read_flags, section_help
from rlhf_fast.errors import UserError

DRY_RUN = "--dry-run"
"""Flag of `run` and of a stage: print what it takes, and stop there."""
SWEEP_OUT = "sweep.out"
HELP = {
    "run": """\
usage: rlhf-fast run RECIPE [--SETTING VALUE ...]

Run the stages of a recipe in order, skipping finished ones. `rlhf-fast init` writes a recipe to start from.
A flag replaces a value of the recipe:

    rlhf-fast run recipe.yaml --ppo.kl.coef 0.1 --ppo.out runs/b     # another PPO run; sft and reward stay
    rlhf-fast run recipe.yaml --out runs/second --seed 1             # everything anew
    rlhf-fast run recipe.yaml --dry-run     # rows, steps, time, memory and disk of each stage, and nothing else
""",
    "sweep": """\
usage: rlhf-fast sweep RECIPE --SETTING VALUE VALUE ... [--SETTING VALUE ...]

Run a recipe once for each value of a setting, one run after another, and end with a table. Stages before the one
that is swept are run once. Several swept settings: each value with each.

    rlhf-fast sweep recipe.yaml --ppo.kl.coef 0.01 0.05 0.1
    rlhf-fast sweep recipe.yaml --ppo.kl.coef 0.02 0.1 --ppo.seed 0 1 2 --ppo.episodes 2048

  --sweep.out DIR  folder of the runs and of sweep.md, sweep.json; by default `sweep` in the recipe's `out`
""",
}


def split_dry_run(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without --dry-run, and whether it was among them."""
    rest = [word for word in argv if word.replace("_", "-") != DRY_RUN]
    return rest, len(rest) < len(argv)


def run(argv: Sequence[str]) -> list[str]:
    """Run a recipe. Return a sentence for each figure that is below its threshold."""
    argv, dry_run = split_dry_run(argv)
    recipe, words = _recipe("run", argv)
    settings = overrides(read_flags(words, "run"), "run")
    from rlhf_fast.stages.recipe import run_recipe

    return run_recipe(recipe, flags=settings, dry_run=dry_run)


def sweep(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sweep over a recipe. Return a sentence for each run that failed, and for each figure below its threshold."""
    recipe, words = _recipe("sweep", argv)
    flags = read_flags(words, "sweep", extra=(SWEEP_OUT,))
    folder = ""
    for flag in flags:
        if flag.path == SWEEP_OUT and not flag.section:
            if len(flag.words) != 1 or not flag.words[0]:
                raise UserError(f"sweep: {flag.name} needs one folder")
            folder = flag.words[0]
    chosen = combinations([flag for flag in flags if flag.section or flag.path != SWEEP_OUT], "sweep")
    from rlhf_fast.stages.sweep import run_sweep

    return run_sweep(recipe, chosen, folder)


def _recipe(command: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe's path and the words after it; print the help and exit if it is asked for."""
    if {"-h", "--help"} & {*argv}:
        print("\n".join(_help(command)))
        sys.exit(0)
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        given = value or next(iter(argv[i + 1 :]), "")
        if name in ("--recipe", "--config") and given and not given.startswith("-"):
            others = [*argv[:i], *argv[i + (1 if value else 2) :]]
            written = shlex.join([command, given, *others])
            raise UserError(f"{command}: RECIPE is given without {name}, before the flags: `rlhf-fast {written}`")
    if not argv or argv[0].startswith("--"):
        example = f", before the flags: `rlhf-fast {command} recipe.yaml {' '.join(argv[:2])} ...`" if argv else ""
        raise UserError(f"{command}: RECIPE must be given{example or f'; see `rlhf-fast {command} --help`'}")
    return argv[0], list(argv[1:])


def _help(command: str) -> list[str]:
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    return [
        HELP[command],
        "for all stages",
        "  --out DIR  --preset NAME  --seed N  --device DEVICE",
        "for one section of the recipe (NAME.* is a group: --ppo.kl.coef)",
        *section_help(width),
        "",
        "`rlhf-fast show-config sft` (reward, ppo, eval) lists each section's settings with their meaning.",
    ]
