"""The command line: a parser with readable help, argument types, and errors without a stack trace."""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # importing it takes seconds, which a tool without models does not need
    from accelerate import Accelerator


# Those of diffusers.optimization but piecewise_constant, which takes rules of its own
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# Values of a new LoRA, of which PEFT knows more. "default" is what PEFT calls True
INITIALIZATIONS = ("gaussian", "default")

TRACKERS = ("tensorboard", "wandb", "all", "none")

METAVARS = {"int": "N", "whole number": "N", "number": "X", "Path": "PATH"}  # by the name of a flag's type


class Switch(argparse.BooleanOptionalAction):
    """--x and --no-x; also `--x True` and `--x False`, as diffusers' commands spell them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.nargs = "?"

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        negated = str(option_string).startswith("--no-")
        setattr(namespace, self.dest, is_true(parser, option_string, values) != negated)


class OnSwitch(argparse.Action):
    """--x, off by default; also `--x True` and `--x False`. What action="store_true" means in a `Parser`."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool = False, help: str | None = None):
        super().__init__(option_strings, dest, nargs="?", default=default, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, is_true(parser, option_string, values))


def is_true(parser: argparse.ArgumentParser, option_string: str | None, value: str | None) -> bool:
    """Whether the word after a flag, or None, means that it is on."""
    word = str(value or "true").lower()
    if word not in ("true", "false"):
        parser.error(f"{option_string} {value}: expected True or False, or nothing")
    return word == "true"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints each flag as `--rank, --network_dim N`, and its default as it would be typed, unless it is None or False.

    argparse's own formatters override these private methods too.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if action.nargs == 0 or isinstance(action, (Switch, OnSwitch)):
            return names
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        if action.nargs == argparse.ONE_OR_MORE:  # A [A ...] is unreadable if A lists many choices
            value = value.partition(" [")[0] + " ..."
        return f"{names} {value}"


class Arguments(argparse.Namespace):
    """A run's flags. `changed` names those that differ from their default, `paths` those whose value is a path or may
    be one; vars() holds the flags alone."""

    __slots__ = ("changed", "paths")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags can also stand in a file, `script.py @file`, several on a line, with # comments.

    `description` and `epilog` are printed as they are; the epilog is an example command. `takes` are the words that
    a command needs without a flag, such as "FOLDER". `other_flags` are flags of another program whose users come here,
    {"sdpa": (value, remedy)}: such a flag is passed over if it has this value, "" for none, because it asks for what
    happens anyway; otherwise it is refused with the remedy.
    """

    def __init__(
        self,
        *,
        description: str = "",
        epilog: str = "",
        takes: str = "",
        add_help: bool = True,
        other_flags: Mapping[str, tuple[str | None, str]] | None = None,
    ):
        super().__init__(
            usage=" ".join(["%(prog)s", *takes.split(), "[options] [@file]; --help explains them"]),
            description=description,
            epilog=f"{epilog}\n\n@file: a file of options with # comments, such as examples/*/*.args",
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            add_help=add_help,
        )
        self.register("type", Path, expanded_path)
        self.register("action", "store_true", OnSwitch)
        self.other_flags = other_flags or {}

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        line = arg_line.removeprefix("\ufeff")  # Windows' editors mark a file's beginning
        for comment in re.finditer(r"(^|\s)#", line):  # as in a shell: "runs/#1" holds none
            with suppress(ValueError):  # what precedes it ends within quotes
                return shlex.split(line[: comment.start()])
        return shlex.split(line)

    def read_known(self, argv: Sequence[str] | None = None) -> tuple[Arguments, list[str]]:
        """(the flags that a command has of this parser's, the words of it that belong to none of them, in order and
        with those of its @files)"""
        words = sys.argv[1:] if argv is None else argv
        words = [f"@{name_or_path(word[1:])}" if word.startswith("@~") else word for word in words]
        args = Arguments()
        try:
            _, unknown_words = self.parse_known_args(words, args)
        except (ValueError, RecursionError) as error:  # a file that is no text, or that includes itself
            files = " ".join(word for word in words if word.startswith("@"))
            self.error(f"{files}: not a file of flags ({error})")
        return args, unknown_words

    def parse_args(self, argv: Sequence[str] | None = None) -> Arguments:  # type: ignore[override]
        args, unknown_words = self.read_known(argv)
        self.refuse(self.unknown_flags(unknown_words, sys.argv[1:] if argv is None else argv))
        args.changed = changed_flags(self, args)
        args.paths = [action.dest for action in self._actions if action.type in (Path, name_or_path)]
        return args

    @property
    def flags(self) -> list[str]:
        """All spellings of the flags that this parser has."""
        return [flag for action in self._actions for flag in action.option_strings]

    def unknown_flags(self, words: Sequence[str], typed: Sequence[str] = ()) -> list[str]:
        """A problem for each flag among `words`, which no flag of this parser took, with its remedy; `typed` are all
        words of the command."""
        problems = []
        stray = []
        given: list[tuple[str, list[str]]] = []  # a flag and the words after it
        for word in words:
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                given.append((flag, [value] if equals else []))
            elif given:
                given[-1][1].append(word)
            else:
                stray.append(word)
        if stray:
            before = list(typed[: typed.index(stray[0])]) if stray[0] in typed else []
            flags = [word for word in before if word.startswith("--")]
            remedy = f": {flags[-1]} takes one value, put what belongs to it in quotes" if flags else ""
            problems.append(f"{' '.join(stray)[:80]!r} belongs to no flag{remedy}")
        for flag, values in given:
            value = " ".join(values)
            if flag.removeprefix("--") in self.other_flags:
                passed_over, remedy = self.other_flags[flag.removeprefix("--")]
                remedy = f"here it is {remedy}" if remedy.startswith("--") else remedy
                if value != passed_over:
                    problems.append(f"{flag} {value[:80]}".rstrip() + f": {remedy}")
            else:
                problems.append(f"{flag}: no flag has this name; {self.similar_flags(flag)}")
        return problems

    def similar_flags(self, name: str) -> str:
        """A question for the flags that `name` abbreviates or is a misspelling of, or where to look for flags."""
        similar = (
            [flag for flag in self.flags if initials(flag) == name]  # --lr
            or [flag for flag in self.flags if flag.startswith(name)]
            or difflib.get_close_matches(name, self.flags, 1)
        )
        if not similar:
            return "--help lists them"
        return f"did you mean {' or '.join(similar[:5])}?"

    def remark(self, idle: Sequence[str]) -> None:
        """Says in one line, of the main process, which flags have no effect, if there are any."""
        if idle and os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: without effect in this run: {', '.join(idle)}", file=sys.stderr)

    def refuse(self, problems: Sequence[str]) -> None:
        """Exits with all problems in one message, if there are any."""
        if problems:
            self.error(join_problems(problems))


def initials(flag: str) -> str:
    """--lr of --learning_rate."""
    return "--" + "".join(word[:1] for word in flag.removeprefix("--").split("_"))


def changed_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The names of the flags whose value is not the default."""
    changed = []
    for action in parser._actions:
        default = action.default
        if isinstance(default, str):  # argparse converts a default that is text
            default = parser._get_value(action, default)
        if action.dest in args and getattr(args, action.dest) != default:
            changed.append(action.dest)
    return list(dict.fromkeys(changed))  # two flags can set one value


Needs = Mapping[str, tuple[object, Sequence[str]]]  # {what: (whether a run has it, the flags that are read then)}


def idle_flags(args: Arguments, *needs: Needs) -> list[str]:
    """The flags that differ from their default and that nothing reads in this run, each with what it needs."""
    idle = {}
    for table in needs:
        for what, (is_there, names) in table.items():
            for name in names:
                if not is_there and name in args.changed:
                    idle.setdefault(name, f"--{name} (it needs {what})")
    return list(idle.values())


def shared_needs(args: argparse.Namespace) -> Needs:
    """What the flags that all trainers have need."""
    return {
        "--lr_scheduler polynomial": (args.lr_scheduler == "polynomial", ("lr_power",)),
        "--lr_scheduler cosine_with_restarts": (args.lr_scheduler == "cosine_with_restarts", ("lr_num_cycles",)),
        "another --lr_scheduler than constant": (
            args.lr_scheduler != "constant" or args.lr_warmup_steps == 0,  # published commands have it beside constant
            ("lr_warmup_steps",),
        ),
        "--optimizer prodigy": (
            args.optimizer == "prodigy",
            ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        ),
        "no --lora_path": (not args.lora_path, ("init_lora_weights",)),
        "no --max_train_steps": (args.max_train_steps is None, ("num_train_epochs",)),
        "--report_to": (args.report_to != "none", ("logging_dir",)),
        "--cache_latents_to_disk or --cache_text_encoder_outputs_to_disk": (
            args.cache_latents_to_disk or args.cache_text_encoder_outputs_to_disk,
            ("disk_cache_dir",),
        ),
        "--fsdp": (args.fsdp, ("hybrid_shard",)),
        "--lora_type lokr": (args.lora_type == "lokr", ("lokr_factor",)),
    }


def noise_needs(args: argparse.Namespace) -> dict[str, tuple[object, Sequence[str]]]:
    """What the flags of the noise's distribution need, where a trainer has `sample_sigmas` choose it."""
    return {
        "--weighting_scheme logit_normal": (args.weighting_scheme == "logit_normal", ("logit_mean", "logit_std")),
        "--weighting_scheme mode": (args.weighting_scheme == "mode", ("mode_scale",)),
        "--timestep_sampling sigmoid, shift or flux_shift": (
            args.timestep_sampling in ("sigmoid", "shift", "flux_shift"),
            ("sigmoid_scale",),
        ),
        "--timestep_sampling shift": (args.timestep_sampling == "shift", ("discrete_flow_shift",)),
    }


def in_range(
    number_type: type, minimum: float, maximum: float = math.inf, *, above: bool = False, reason: str = ""
) -> Callable[[str], float]:
    """An argparse type: a finite int or float of at least (or `above`) the minimum and at most the maximum, for which
    there may be a `reason`."""

    def parse(text: str) -> float:
        value = number_type(text)
        too_small = value <= minimum if above else value < minimum
        is_finite = isinstance(value, int) or math.isfinite(value)
        if too_small or value > maximum or not is_finite:
            limit = f"above {minimum}" if above else f"at least {minimum}"
            if maximum < math.inf:
                limit += f" and at most {maximum}"
            if reason:
                limit += f", {reason}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value

    parse.__name__ = "whole number" if number_type is int else "number"  # argparse: invalid whole number value
    return parse


def initialization(text: str) -> str:
    """An argparse type: one of INITIALIZATIONS."""
    if text.startswith(("pissa", "olora", "corda", "loftq")):
        raise argparse.ArgumentTypeError(
            f"{text} changes the base model's weights, so that the file would be a LoRA for another model than others "
            f"have; choose {' or '.join(INITIALIZATIONS)}"
        )
    return text


def square_side(text: str) -> int:
    """An argparse type: the side of a square image in pixels, 16 to 8192."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text}: expected one side in pixels, such as 512; other shapes are --aspect_ratio_buckets HEIGHT,WIDTH"
        )
    return int(in_range(int, 16, 8192)(text))


square_side.__name__ = "whole number"


def block_count(text: str) -> int | str:
    """An argparse type: a number of blocks, 1 or more, or auto."""
    if text == "auto":
        return text
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected auto or a number of blocks, 1 or more")
    return int(text)


def expanded_path(text: str) -> Path:
    """An argparse type: a path, ~ in it the home folder, which no shell puts for `--output_dir=~/x`.

    Empty text, an unset variable of a shell, would be the folder that the program was started in.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot hold a zero byte")
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is needed, this is empty: write . for the folder you are in")
    return Path(name_or_path(text))


def name_or_path(text: str) -> str:
    """An argparse type: a name on the Hub, or a path as `expanded_path` reads it."""
    return os.path.expanduser(text)  # noqa: PTH111


def file_name(text: str) -> str:
    """An argparse type: a name for NAME.safetensors and NAME/, which neither hides them nor means other files."""
    problem = ""
    if not text or Path(text).name != text:
        problem = "must be the name of a file, without folders"
    elif text.startswith("."):
        problem = "must not begin with a dot"
    elif text.startswith("resume_"):
        problem = "must not begin with resume_, as the weights in checkpoints do"
    elif text.lower().endswith(".safetensors"):
        problem = "must be without .safetensors, which is added"
    if problem:
        raise argparse.ArgumentTypeError(f"{text} {problem}")
    return text


NUM_CORES = os.cpu_count() or 1
WORKERS_PER_CORE = 4  # processes that read data

worker_count = in_range(
    int,
    0,
    WORKERS_PER_CORE * NUM_CORES,
    reason=f"{WORKERS_PER_CORE} for each of the {NUM_CORES} cores of this machine",
)
positive_int = in_range(int, 1)
positive_float = in_range(float, 0, above=True)
non_negative_float = in_range(float, 0)
fraction = in_range(float, 0, 1)
seed_number = in_range(int, 0, 2**32 - 1)  # what numpy takes
image_seed = in_range(int, 0, 2**63 - 1)  # of a torch.Generator; such as ComfyUI's
decay_rate = in_range(float, 0, 0.9999999)  # of an exponential mean, such as Adam's betas


def comma_list(text: str | None) -> list[str]:
    """The parts of "a, b,c", without spaces around them and without empty ones."""
    parts = (text or "").split(",")
    return [part.strip() for part in parts if part.strip()]


MOST_OF_A_KIND = 10


def join_problems(problems: Sequence[str]) -> str:
    """One problem as it is, several as an indented list: of each kind, such as unreadable files, ten and a count."""
    if len(problems) == 1:
        return problems[0]
    of_kind: dict[str, list[str]] = {}
    for problem in problems:
        kind = re.sub(r"\S*[/\\'\"\d]\S*", "", problem)  # less paths, quotations and numbers
        of_kind.setdefault(kind, []).append(problem)
    lines = [""]
    for same in of_kind.values():
        lines += same[:MOST_OF_A_KIND]
        if len(same) > MOST_OF_A_KIND:
            lines.append(f"and {len(same) - MOST_OF_A_KIND} more of this kind")
    return "\n  ".join(lines)


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, or the nearest folder above it that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_folder(flag: str, folder: Path) -> list[str]:
    """A problem of a folder that is to be written: that of no folder's name, or without permission."""
    try:
        nearest = nearest_folder(folder)
    except (OSError, ValueError) as error:
        return [f"{flag} {folder}: no folder can have this name ({error})"]
    if not nearest.is_dir():
        name = "this name" if nearest == folder.absolute() else f"the name {nearest}"
        return [f"{flag} {folder}: a file of {name} is in the way"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{flag} {folder}: no permission to write there"]
    return []


def check_file(flag: str, file: Path) -> list[str]:
    """A problem of a file that is to be written."""
    problems = check_folder(flag, file.absolute().parent)
    if not problems and file.is_dir():
        problems = [f"{flag} {file}: a folder of this name is in the way"]
    return problems


def fail(accelerator: "Accelerator", problems: Sequence[str]) -> None:
    """Ends the run as argparse does: all problems in one message of the main process, exit code 2."""
    if accelerator.is_main_process:
        print(f"{Path(sys.argv[0]).name}: error: {join_problems(problems)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def exit_if_unreadable(source: object) -> Iterator[None]:
    """Ends the run with one message and exit code 2 if loading `source` within the block raises an error."""
    try:
        yield
    except Exception as error:  # every file format raises its own exceptions
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: error: {source} cannot be loaded: {reason}", file=sys.stderr)
        raise SystemExit(2) from error
