"""Make a flag of each field of :class:`palu.config.UnlearnConfig`, with its help from the class's docstring."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from palu.config import CHOICES, UnlearnConfig

SECTION = "Settings (the fields of palu.UnlearnConfig)"
_NUMBERS = {int: "an integer", float: "a number"}
_ABBREVIATED = {"lr": "learning_rate"}  # what other tools call a setting


class SectionedCommand(TyperCommand):
    """A command whose help lists its options in sections: those with a ``rich_help_panel`` under its name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; of an option that does not exist, say what it may have been meant for."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            meant = _ABBREVIATED.get(getattr(error, "option_name", "").lstrip("-"))
            if meant in {parameter.name for parameter in self.params}:
                error.possibilities = [f"--{str(meant).replace('_', '-')}"]  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options; Typer itself makes sections only through rich."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def with_settings(**defaults: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command flags for all settings, and ``--config``.

    Its parameter ``settings`` becomes a dict of those that were given, by a flag or by the file. ``defaults`` are what
    the help says of settings for which the command has a default of its own.
    """
    return functools.partial(_with_settings, flags=_flags(defaults))


def _with_settings(command: Callable[..., None], flags: dict[str, inspect.Parameter]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    keyword = inspect.Parameter.KEYWORD_ONLY

    @functools.wraps(command)
    def with_flags(*, ctx: typer.Context, config: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in list(values) if name in flags}
        settings = {name: value for name, value in given.items() if was_given(ctx, name)}
        command(**values, **({"ctx": ctx} if "ctx" in signature.parameters else {}), settings=settings)

    file = inspect.Parameter("config", keyword, default=None, annotation=_CONFIG)
    parameters = {p.name: p.replace(kind=keyword) for p in [*own, file]} | flags
    parameters.setdefault("ctx", inspect.Parameter("ctx", keyword, annotation=typer.Context))
    with_flags.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    with_flags.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return with_flags


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, by its flag or by ``--config``, and has not just its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _flags(defaults: dict[str, str]) -> dict[str, inspect.Parameter]:
    """Make an option for each field."""
    helps, hints = _helps(), typing.get_type_hints(UnlearnConfig)
    flags = {}
    for field in dataclasses.fields(UnlearnConfig):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        option: dict[str, Any] = {"help": helps.get(field.name, ""), "rich_help_panel": SECTION}
        option["show_default"] = defaults.get(field.name, True)
        if field.name in CHOICES:
            kind: Any = typing.Literal[CHOICES[field.name]]
        elif kinds == (bool,):
            kind = bool
        else:
            kind = Any
            option |= {"parser": _parser(kinds), "metavar": f"<{'|'.join(map(_metavar, kinds))}>"}
        flags[field.name] = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[kind, typer.Option(**option)],
        )
    return flags


def _helps() -> dict[str, str]:
    """Read each field's entry under ``Attributes:`` in the docstring."""
    _, _, attributes = inspect.cleandoc(UnlearnConfig.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE)
    plain = {name: " ".join(re.sub(r"``|:\w+:|`", "", text).split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in plain.items()}


def _metavar(kind: Any) -> str:
    return {types.NoneType: "none", dict: "json"}.get(typing.get_origin(kind) or kind, kind.__name__)


def _parser(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return a parser of text to one of these types; whether the value is valid, UnlearnConfig says."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str):  # from --config, where YAML has given it a type
            return value
        if types.NoneType in kinds and value.lower() == "none":
            return None
        if any(typing.get_origin(kind) is dict for kind in kinds):
            return json_value(value)
        for kind in _NUMBERS:
            if kind in kinds:
                try:
                    return kind(value)
                except ValueError:
                    continue
        if all(kind in _NUMBERS or kind is types.NoneType for kind in kinds):
            wanted = " or ".join([_NUMBERS[k] for k in kinds if k in _NUMBERS] + ["none"] * (types.NoneType in kinds))
            raise typer.BadParameter(f"{value!r} is not {wanted}")
        return value

    return parse


def json_value(value: Any) -> Any:
    """Parse JSON text; a value that ``--config`` has given a type stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        mend = 'write a mapping, such as {"enable_thinking": false}'
        raise typer.BadParameter(f"{value!r} is not JSON ({error.msg} at character {error.pos}); {mend}") from None


TemplateKwargs = Annotated[
    Any,
    typer.Option(
        parser=json_value,
        metavar="<json>",
        help='Values for the chat template, by name, such as {"enable_thinking": false}.',
    ),
]


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options, so that flags win over them."""
    if path is None or ctx.resilient_parsing:
        return path
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which a mapping has each key once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise typer.BadParameter(f"{path}: key {twice[0]!r} is there twice; keep one of them")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise typer.BadParameter(f"{path} holds a {type(content).__name__}; write one 'name: value' a line")
    known = [p.name for p in ctx.command.params if p.name not in ("config", "help")]
    for name in content or {}:
        if name not in known:
            near = difflib.get_close_matches(_ABBREVIATED.get(str(name), str(name)), known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise typer.BadParameter(f"{path}: unknown key {name!r}; {mend}")
    ctx.default_map = {name: "none" if value is None else value for name, value in (content or {}).items()}
    return path


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        callback=_read_config,
        is_eager=True,
        exists=True,
        dir_okay=False,
        metavar="FILE.yaml",
        help="Take options from this file, one 'name: value' a line, names as below with _ for -; flags win over it.",
    ),
]
