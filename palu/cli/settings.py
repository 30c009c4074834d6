"""Make a flag of each setting of :class:`palu.UnlearnConfig`, with its help from the docstring that describes it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from palu.cli.options import ABBREVIATED, described, given_by, json_value
from palu.config import UnlearnConfig
from palu.methods import METHODS
from palu.settings import RunSettings, Settings, field_names

SECTION = "Settings (the arguments of palu.UnlearnConfig)"
# What the help says of settings for which the command has a default of its own.
_DEFAULTS = {
    "checkpoint_dir": "checkpoints in OUTPUT/private, until the run has finished",
    "logging_dir": "logs in OUTPUT/private",
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command flags for all settings, and ``--config``.

    Its parameter ``settings`` becomes a dict of those that were given, by a flag or by the file.
    """
    flags = _flags()
    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]
    keyword = inspect.Parameter.KEYWORD_ONLY

    @functools.wraps(command)
    def with_flags(*, ctx: typer.Context, config: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        settings = {name: value for name, value in given.items() if given_by(ctx, name) != "DEFAULT"}
        command(ctx, **values, settings=settings)

    file = inspect.Parameter("config", keyword, default=None, annotation=_CONFIG)
    parameters = [p.replace(kind=keyword) for p in [*own, file]] + list(flags.values())
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_flags


def _flags() -> dict[str, inspect.Parameter]:
    """Make an option for each setting: in a section those of every run, and in one each those of the same methods."""
    names: Any = typing.Literal[tuple(METHODS)]
    option = typer.Option(help=_helps(UnlearnConfig)["objective"], rich_help_panel=SECTION)
    flags = {"objective": _flag("objective", "palu", Annotated[names, option])}
    for name in field_names(RunSettings):
        flags[name] = _option(RunSettings, name, _helps(RunSettings)[name], SECTION, _DEFAULTS.get(name, True))
    kinds = {method: kind.Settings for method, kind in METHODS.items()}
    for name in dict.fromkeys(name for kind in kinds.values() for name in field_names(kind)):
        readers = [method for method, kind in kinds.items() if name in field_names(kind)]
        texts = _by_method({method: _helps(kinds[method])[name] for method in readers})
        values = _by_method({method: str(getattr(kinds[method], name)).lower() for method in readers})
        section = f"Settings of {'every objective' if len(readers) == len(kinds) else ', '.join(readers)}"
        flags[name] = _option(kinds[readers[0]], name, texts, section, values if ":" in values else True)
    return flags


def _by_method(texts: dict[str, str]) -> str:
    """Join the texts of methods, each text once."""
    groups: dict[str, list[str]] = {}
    for method, text in texts.items():
        groups.setdefault(text, []).append(method)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(group)}: {text.rstrip('.')}" for text, group in groups.items())


def _option(settings: type[Settings], name: str, text: str, section: str, default: str | bool) -> inspect.Parameter:
    (field,) = (field for field in dataclasses.fields(settings) if field.name == name)
    hint = typing.get_type_hints(settings)[name]
    kinds = typing.get_args(hint) or (hint,)
    kind: Any = bool if kinds == (bool,) else Any
    parsed: dict[str, Any] = {}
    if choices := field.metadata.get("choices"):
        kind = typing.Literal[choices]
    elif kind is Any:
        parsed = {"parser": _parser(kinds), "metavar": f"<{'|'.join(map(_metavar, kinds))}>"}
    option = typer.Option(help=text, rich_help_panel=section, show_default=default, **parsed)
    return _flag(name, field.default, Annotated[kind, option])


def _flag(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _helps(settings: type) -> dict[str, str]:
    """Read each field's entry in the docstrings of a class and of those that it extends."""
    texts: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        texts |= described(kind.__dict__.get("__doc__") or "", "Attributes")
    return texts


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
        for kind in (int, float):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(value)
        return value

    return parse


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
    known = {p.name: p for p in ctx.command.params if p.name not in ("config", "help")}
    for name in content or {}:
        if name not in known:
            near = difflib.get_close_matches(ABBREVIATED.get(str(name), str(name)), known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise typer.BadParameter(f"{path}: unknown key {name!r}; {fix}")
    # An empty value is None for a setting; of another option it says that none is given.
    values = {n: "none" if v is None and _is_setting(known[n]) else v for n, v in (content or {}).items()}
    ctx.default_map = {name: value for name, value in values.items() if value is not None}
    return path


def _is_setting(parameter: Any) -> bool:
    return (getattr(parameter, "rich_help_panel", None) or "").startswith("Settings")


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
