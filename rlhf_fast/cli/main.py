"""The command `rlhf-fast`. Each command imports what it needs when it is called, so that --help is fast."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple

from rlhf_fast import __version__
from rlhf_fast.cli.streams import safe_streams, silence
from rlhf_fast.config.checks import BadSetting
from rlhf_fast.errors import REMEDIES, UserError, did_you_mean, shortened

Function = Callable[[Sequence[str]], int]
"""From the arguments to the exit status."""
RECIPE = ""
"""Stands for the class of the flags of a command that takes the settings of a recipe."""


class Command(NamedTuple):
    """A command of rlhf-fast. flags: module:class of its flags in this package, which is imported when it is needed."""

    summary: str
    flags: str
    run: Function

    def flags_class(self) -> Any:
        """Return the class of the command's flags, None for RECIPE."""
        module, _, name = self.flags.rpartition(":")
        return getattr(import_module(f"rlhf_fast.{module}"), name) if name else None


COMMANDS: dict[str, Command] = {}
RESUMES = ("sft", "reward", "ppo", "run", "sweep", "demo", "eval")
"""Commands that go on from a checkpoint when they are started again."""


def command(name: str, summary: str, flags: str) -> Callable[[Function], Function]:
    """Register a function as the command `name`."""

    def register(function: Function) -> Function:
        COMMANDS[name] = Command(summary, flags, function)
        return function

    return register


def _parse(name: str, argv: Sequence[str]) -> Any:
    """Return the flags of a command, an object of its class."""
    from rlhf_fast.config.flags import parse

    return parse(COMMANDS[name].flags_class(), argv, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a figure below its threshold, 2 for bad input or settings,
    130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with safe_streams():
        try:
            status = _dispatch(argv)
            sys.stdout.flush()
            return status
        except BadSetting as error:
            return _fail(f"{argv[0]}: {error.name} {error.rule}{error.got}")
        except UserError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            start = "after the answers that it has" if argv[0] == "eval" else "from the newest checkpoint"
            hint = f"; the same command goes on {start}" if argv[0] in RESUMES else ""
            print(f"rlhf-fast: stopped{hint}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `rlhf-fast ... | head` closed stdout; the flush at exit must not raise once more
            silence(sys.stdout)
            return 1
        except OSError as error:
            return _fail(_sentence(error, goes_on=argv[0] in RESUMES))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            return _fail("out of GPU memory; lower optim.micro_batch_tokens and sampling.batch, which change no result")


def _sentence(error: OSError, goes_on: bool) -> str:
    """Return the sentence of an error that the system gave; raise it again if it comes from no file.

    goes_on: whether the command goes on where it stopped when it is started again.
    """
    from_stdout = error.filename is None and error.errno in (errno.EIO, errno.EBADF, errno.EDQUOT, errno.EFBIG)
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)  # the flush at exit must not raise once more
    if error.errno == errno.ENOSPC:
        while_writing = f" while writing {shortened(error.filename)}" if error.filename else ""
        again = "start the same command again: it goes on" if goes_on else "start the command again"
        return f"the disk is full{while_writing}; free some space and {again}"
    if error.filename is None and not from_stdout:
        raise error
    name = "standard output" if from_stdout else shortened(error.filename)
    return f"{name}: {error.strerror}; {REMEDIES.get(error.errno or 0, 'look at the path')}"


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("--version", "version"):
        print(f"rlhf-fast {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS, "`rlhf-fast --help` lists them")
        raise UserError(f'no command "{argv[0]}"; {hint}')
    return COMMANDS[argv[0]].run(argv[1:])


def _fail(sentence: str) -> int:
    print(f"rlhf-fast: error: {sentence}", file=sys.stderr)
    return 2


def _status(failures: Sequence[str]) -> int:
    """Print the figures that are below their thresholds, and return the exit status: 1 if there are any."""
    for failure in failures:
        print(f"rlhf-fast: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, (summary, *_) in COMMANDS.items())
    return f"""\
usage: rlhf-fast COMMAND [options]        rlhf-fast COMMAND --help        rlhf-fast --version

Supervised fine-tuning, reward modelling and PPO as in InstructGPT, on fused kernels.

{commands}

start with: rlhf-fast demo"""


@command(
    "demo",
    "the whole experiment on a small generated world, minutes on 2 cores, no download",
    "cli.options:DemoOptions",
)
def _demo(argv: Sequence[str]) -> int:
    options = _parse("demo", argv)
    from rlhf_fast.demo.run import run

    run(out=options.out, seed=options.seed, quick=options.quick)
    return 0


def _stage(name: str, argv: Sequence[str]) -> int:
    from rlhf_fast.cli.recipe import split_dry_run
    from rlhf_fast.config.flags import stage_config

    argv, dry_run = split_dry_run(argv)
    cfg = stage_config(COMMANDS[name].flags_class(), argv)
    cfg.ready()
    from rlhf_fast.data.files import require_data
    from rlhf_fast.stages.recipe import finished, run_stage

    for path in [] if finished(cfg) else cfg.data_paths():  # fail before a model is loaded for minutes
        require_data(path)
    run_stage(cfg, dry_run=dry_run)
    return 0


@command("sft", "fine-tune a language model on demonstrations", "config.stages:SFTConfig")
def _sft(argv: Sequence[str]) -> int:
    return _stage("sft", argv)


@command("reward", "train a reward model on ranked responses", "config.stages:RewardConfig")
def _reward(argv: Sequence[str]) -> int:
    return _stage("reward", argv)


@command("ppo", "train a policy against a reward, held to a reference", "config.stages:PPOConfig")
def _ppo(argv: Sequence[str]) -> int:
    return _stage("ppo", argv)


@command("run", "all stages of a recipe.yaml in order; finished ones are skipped; flags replace its values", RECIPE)
def _run(argv: Sequence[str]) -> int:
    from rlhf_fast.cli.recipe import run

    return _status(run(argv))


@command("sweep", "a recipe once for each value of a setting, one after another, with a table", RECIPE)
def _sweep(argv: Sequence[str]) -> int:
    from rlhf_fast.cli.recipe import sweep

    failed, below = sweep(argv)
    status = _status([*failed, *below])
    return 2 if failed else status


@command(
    "eval",
    "the paper's evaluation of models side by side: truth, toxicity, bias, tax, refusals, preference",
    "config.evaluation:EvalOptions",
)
def _eval(argv: Sequence[str]) -> int:
    if bare := list(takewhile(lambda word: not word.startswith("-"), argv)):
        models = " ".join(word if "=" in word else f"NAME={word}" for word in bare)
        raise UserError(f"eval: models are given by a flag; write --models {models}")
    options = _parse("eval", argv)
    from rlhf_fast.cli.evaluation import run_eval

    return _status(run_eval(options))


@command("generate", "sample responses to a file of prompts", "cli.options:GenerateOptions")
def _generate(argv: Sequence[str]) -> int:
    options = _parse("generate", argv)
    from rlhf_fast.cli.generate import generate, with_trained_length

    given = any(word.partition("=")[0].replace("_", "-") == "--max-new-tokens" for word in argv)
    options = options if given else with_trained_length(options)
    written = generate(options, may_shorten=not given)
    print(f"generate: {written} responses", file=sys.stderr)
    return 0


@command("chat", "talk to a model in the terminal", "cli.options:ChatOptions")
def _chat(argv: Sequence[str]) -> int:
    options = _parse("chat", argv)
    from rlhf_fast.cli.chat import chat

    chat(options)
    return 0


@command(
    "check",
    "look at a data file: errors, lengths, duplicates; with --tokenizer DIR one row as tokens",
    "cli.options:CheckOptions",
)
def _check(argv: Sequence[str]) -> int:
    options = _parse("check", argv)
    from rlhf_fast.config.fields import DataConfig, ModelConfig
    from rlhf_fast.data.check import check

    cfg = DataConfig(
        path=options.file,
        columns=options.columns,
        remove_columns=options.remove_columns,
        template=options.template,
        turns=options.turns,
        limit=options.limit,
        max_prompt_tokens=options.max_prompt_tokens,
        max_response_tokens=options.max_response_tokens,
    )
    tokenizer = None
    if options.tokenizer:
        from dataclasses import replace

        from rlhf_fast.model.pretrained import load_tokenizer
        from rlhf_fast.run.prompt_format import model_prompt_format

        tokenizer = load_tokenizer(ModelConfig(path=options.tokenizer))
        prompt_format, _ = model_prompt_format(options.tokenizer, tokenizer, options.template, "template", strict=False)
        cfg = replace(cfg, template=prompt_format.template)
    errors = check(cfg, "" if options.kind == "auto" else options.kind, tokenizer)
    return 2 if errors else 0


@command("env", "versions, machine, and which backend answers for each op, and why", "cli.options:EnvOptions")
def _env(argv: Sequence[str]) -> int:
    _parse("env", argv)
    from rlhf_fast.cli.env import report

    print("\n".join(report()))
    return 0


@command("plot", "a run's curves as a PNG", "cli.options:PlotOptions")
def _plot(argv: Sequence[str]) -> int:
    if len(bare := list(takewhile(lambda word: not word.startswith("-"), argv))) > 1:
        raise UserError(f"plot: draws one run; `rlhf-fast compare {' '.join(bare)}` draws several over one another")
    options = _parse("plot", argv)
    from rlhf_fast.run.plot import plot

    print(plot(options.run, options.out, options.smooth))
    return 0


@command(
    "compare",
    "runs beside one another in an HTML file: settings that differ, curves, samples",
    "cli.options:CompareOptions",
)
def _compare(argv: Sequence[str]) -> int:
    options = _parse("compare", argv)
    from rlhf_fast.run.compare import compare

    print("\n".join(compare(options.runs, options.out, options.samples, options.smooth)))
    return 0


@command(
    "export",
    "a model for llama.cpp and Ollama (GGUF), or as a folder in another dtype, checked against it",
    "cli.options:ExportOptions",
)
def _export(argv: Sequence[str]) -> int:
    options = _parse("export", argv)
    from rlhf_fast.cli.export import write

    write(options)
    return 0


@command("init", "write a commented recipe.yaml", "cli.options:InitOptions")
def _init(argv: Sequence[str]) -> int:
    options = _parse("init", argv)
    from rlhf_fast.stages.recipe import write_template

    path = write_template(options.path)
    print(f"{path}: written; fill in the paths, then `rlhf-fast run {path}`")
    return 0


@command(
    "show-config",
    "every setting of a stage and its meaning; with --diff the difference between two presets",
    "cli.options:ShowConfigOptions",
)
def _show_config(argv: Sequence[str]) -> int:
    options = _parse("show-config", argv)
    from rlhf_fast.cli.show_config import show_config

    print("\n".join(show_config(options.stage, options.preset, options.config, options.diff)))
    return 0


@command(
    "completion", "a script that completes commands and flags in bash, zsh or fish", "cli.options:CompletionOptions"
)
def _completion(argv: Sequence[str]) -> int:
    options = _parse("completion", argv)
    from rlhf_fast.cli.completion import script

    commands = {name: (command.summary, command.flags_class()) for name, command in COMMANDS.items()}
    print(script(options.shell, commands), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
