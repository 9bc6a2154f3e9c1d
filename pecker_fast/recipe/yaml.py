"""The YAML of recipes: plain mappings, lists, texts and numbers, read by the rules of YAML 1.2.

Stricter than PyYAML's safe loader, whose YAML 1.1 reads `1e-4` as text, `no` as false and `1:30` as 90: numbers and
truth values are as in JSON (and hexadecimal, `.inf`, `.nan`); a key given twice, an alias and a tag are errors.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pecker_fast.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe loader without aliases, merge keys, dates, octal and sexagesimal numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own name

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not part of a recipe", mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(None, None, "tags are not part of a recipe", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_yaml_map(self, node: Any) -> Any:
        yield self.construct_mapping(node, deep=True)

    def construct_yaml_float(self, node: Any) -> float:
        text = node.value.lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_yaml_int(self, node: Any) -> int:
        return int(node.value, 16 if node.value[:2].lower() == "0x" else 10)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first.strip("\0"), ""]
    )
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _TextLoader(_Loader):
    """The same, in which words are texts, whatever they look like; only null is not."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^null$"), ["n"])


class _Dumper(yaml.SafeDumper):
    """Safe dumper that puts texts in quotation marks which either reading of YAML takes for something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *_Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def dump_yaml(data: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back to equal ones."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def parse_yaml(text: str, where: str, texts: bool = False) -> Any:
    """The value of one YAML document; raises RecipeError starting with `where`, with line and column where known.

    texts: numbers and truth values stay texts.
    """
    try:
        return yaml.load(text, Loader=_TextLoader if texts else _Loader)
    except yaml.MarkedYAMLError as reason:
        mark = reason.problem_mark or reason.context_mark
        place = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}: {place}{', '.join(filter(None, (reason.context, reason.problem)))}") from None
    except yaml.reader.ReaderError as reason:
        line = text.count("\n", 0, int(reason.position)) + 1
        raise RecipeError(f"{where}: line {line}: not text: character {reason.character!r} is not allowed") from None
    except yaml.YAMLError as reason:
        raise RecipeError(f"{where}: not YAML: {reason}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None
    except (ValueError, OverflowError):
        raise RecipeError(f"{where}: holds a number too long to be read") from None
