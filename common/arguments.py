"""The command line: a parser whose help says what a run would use, argument types, and readable failure."""

import argparse
import math
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

from diffusers.optimization import SchedulerType


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The default in the help of every argument that has one, the example command as it stands."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:  # 0 is worth telling
            return action.help
        if isinstance(action.default, (list, tuple)):  # as it would be typed
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        """What kind of value a flag takes, where the flag's own name would only be repeated."""
        kinds = {Path: "PATH", int: "N", "whole number": "N", "number": "X"}
        return kinds.get(action.type) or kinds.get(getattr(action.type, "__name__", ""), "TEXT")

    def _format_args(self, action, default_metavar):
        """`A ...` of several values, not `A [A ...]`, which long choices make unreadable."""
        several = action.nargs == argparse.ONE_OR_MORE
        return (
            f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
            if several
            else (super()._format_args(action, default_metavar))
        )

    def _format_action_invocation(self, action):
        switch = isinstance(action, argparse.BooleanOptionalAction)
        return ", ".join(action.option_strings) if switch else super()._format_action_invocation(action)


class Switch(argparse.BooleanOptionalAction):
    """--x and --no-x, and `--x True` or `--x False` as older commands spell it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.nargs = "?"

    def __call__(self, parser, namespace, value, option_string=None):
        words = {None: True, "true": True, "false": False}
        if value not in words and value.lower() not in words:
            parser.error(f"{option_string} {value}: expected True or False, or nothing")
        on = words[value and value.lower()]
        setattr(namespace, self.dest, on != option_string.startswith("--no-"))


class Flags(argparse.Namespace):
    """Flags by name; beside them, and none of vars(), `changed` names those that are not as by default."""

    __slots__ = ("changed",)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for the flags of the script whose docstring is `doc`, which ends in an example command.

    Flags can stand in a file, `script.py @file`, with # comments. `aliases`, {flag: flag}, are other names of some.
    """

    def __init__(self, doc, aliases=()):
        example = doc.split("`accelerate config`:\n")[1].split("\n\n`output_dir`")[0]
        super().__init__(
            usage="%(prog)s [options] [@file]; --help explains them",
            description=doc.split("\n\n")[0],
            epilog=f"example:{example}\n\n@file: a file of options with # comments, such as examples/*/*.args",
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )
        self.aliases = dict(aliases)

    def own_names(self, words):
        """Words of a command in which aliases of flags are replaced."""
        parts = [word.partition("=") for word in words]
        return [self.aliases.get(name, name) + equals + value for name, equals, value in parts]

    def convert_arg_line_to_args(self, line):
        return self.own_names(shlex.split(line, comments=True))

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        try:
            args = super().parse_args(self.own_names(argv), Flags())
        except (ValueError, RecursionError) as error:
            self.error(f"{' '.join(word for word in argv if word[:1] == '@')}: no file of flags ({error})")
        actions = [action for action in self._actions if action.dest in args]
        args.changed = [action.dest for action in actions if getattr(args, action.dest) != self.default_of(action)]
        return args

    def default_of(self, action):
        """What a flag is without being given: text goes through the flag's type."""
        text = isinstance(action.default, str) and not action.required
        return self._get_value(action, action.default) if text else action.default

    def refuse(self, problems):
        """Ends with all problems in one message, if there are any."""
        if problems:
            self.error(join_problems(problems))


def number(kind, minimum, maximum=math.inf, *, above=False):
    """An argparse type: `kind` within [minimum, maximum], or above the minimum."""

    def parse(text):
        value = kind(text)
        if not (minimum < value if above else minimum <= value) or not value <= maximum or math.isinf(value):
            limit = f"above {minimum}" if above else f"at least {minimum}"
            limit += f" and at most {maximum}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def names_in(text):
    """The names in a comma list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def join_problems(problems):
    """One problem as it is, several as a list."""
    return problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])


def fail(accelerator, problems):
    """Ends the run as argparse does: all problems in one message, exit code 2."""
    if accelerator.is_main_process:
        print(f"{Path(sys.argv[0]).name}: error: {join_problems(problems)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def reading(source):
    """Ends the run with one message and exit code 2 if what `source` names cannot be loaded within it."""
    try:
        yield
    except Exception as error:  # each kind of file raises its own
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: error: {source} cannot be loaded: {reason}", file=sys.stderr)
        raise SystemExit(2) from error


LR_SCHEDULERS = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.PIECEWISE_CONSTANT]

TRACKERS = ("tensorboard", "wandb", "all", "none")
