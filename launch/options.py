"""A command line made of a dataclass: a group of options for each class that it inherits from.

Nothing here imports torch or transformers: ``--help`` answers at once.
"""

import inspect
import itertools
import json
import sys
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro
import yaml

from launch.planning.nearest import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class ConfigFile:
    """Options may stand in a file; what is given beside it wins."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML with a line for each option, such as "learning_rate: 1e-4"; or the run.json of a run,
    whose own options are taken."""


def parse(kind: type[T], program: str, given: list[str] | None = None) -> T:
    """Parse a command line into a dataclass; ``--help`` ends the process.

    Args:
        kind: its fields are the options, and their docstrings the help. The classes that it
            inherits from are the groups, each named after its class.
        program: as ``python -m`` has it.
        given: the options; those of the process by default.

    Raises:
        ValueError: what cannot be read; the details are on stderr before.
    """
    given = sys.argv[1:] if given is None else given
    given = [*_of_file(given, get_type_hints(kind)), *given]
    try:
        found: Any = tyro.cli(
            _grouped(kind),
            prog=f"python -m {program}",
            description=inspect.getdoc(kind),
            args=given,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as end:
        if end.code:
            raise ValueError(unreadable(kind, given)) from None
        raise
    del found.config
    return kind(
        **{name: value for group in vars(found).values() for name, value in vars(group).items()}
    )


def unreadable(kind: type[Any], given: list[str]) -> str:
    """Say what is wrong with a command line: the options that there are not, if that is it."""
    known = [f"--{own.name.replace('_', '-')}" for own in (*fields(kind), *fields(ConfigFile))]
    known += ["--help", *(f"--no-{own[2:]}" for own in known)]
    unknown = []
    for option in (word.partition("=")[0] for word in given if word.startswith("--")):
        if option.replace("_", "-") not in known:
            near = nearest(option, known)
            unknown.append(option + ("" if near is None else f", did you mean {near}?"))
    if unknown:
        return f"there is no option {'; no option '.join(unknown)}; --help lists all"
    return "the command line cannot be read, as said above"


def _grouped(kind: type[Any]) -> type[Any]:
    """Return a dataclass of dataclasses, which tyro shows as groups."""
    groups = []
    for base in (*kind.__mro__[:-1], ConfigFile):
        hints, own = get_type_hints(base, include_extras=True), inspect.get_annotations(base)
        # tyro keeps the line breaks of these.
        parsed = docstring_parser.parse_from_object(base).params
        words = {one.arg_name: " ".join((one.description or "").split()) for one in parsed}
        members = [
            (
                each.name,
                Annotated[hints[each.name], tyro.conf.arg(help=words[each.name])],
                each.default if each.default is not MISSING else field(),
            )
            for each in fields(base)
            if each.name in own
        ]
        if members:
            name = base.__name__.removesuffix("Arguments").removesuffix("File").lower()
            doc = {"__doc__": "" if base is kind else base.__doc__}
            group = make_dataclass(name, members, namespace=doc, kw_only=True)
            groups.append((name, group))
    return make_dataclass(kind.__name__, groups)


def _of_file(given: list[str], hints: dict[str, Any]) -> list[str]:
    """Return what the file of ``--config`` says, as a command line would.

    Raises:
        ValueError: no such file, or no options in it.
    """
    path = None
    for word, following in itertools.pairwise([*given, ""]):
        option, _, value = word.partition("=")
        if option == "--config":
            path = Path(value or following)
    if path is None:
        return []
    try:
        text = path.read_text()
        # Every scalar of YAML as it is written: "no" and 1e-4 are what a command line would say.
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"--config {path} cannot be read: {' '.join(str(error).split())}"
        ) from error
    found = found.get("arguments", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"--config {path} has no options: give one a line, as in batch: 64")
    options = []
    for name, value in found.items():
        option = name.replace("_", "-")
        if option in ("config", "help"):
            raise ValueError(f"--config {path} has {name}, which a file cannot give: leave it out")
        if hints.get(name.replace("-", "_")) is bool:
            if (word := str(value).lower()) not in ("true", "false"):
                raise ValueError(f"--config {path}: {name} is true or false, got {value!r}")
            options.append(f"--{option}" if word == "true" else f"--no-{option}")
        elif isinstance(value, list):
            options += [f"--{option}", *map(str, value)]
        elif value not in (None, "null", ""):
            options.append(f"--{option}={value}")  # which may begin with a dash
    return options
