"""YAML as recipes and studies use it: plain values, each written out once; everything else is one kind of error."""

import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

from .messages import describe


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # nine lines of them can stand for a billion values
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = Counter((key.value, key.tag) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for (key, _), times in keys.items() if times > 1]:  # the last one would win
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > 64:  # Python refuses to print what is much longer
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# PyYAML reads 1e-8, which JSON and YAML 1.2 know as a number, as text
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def parse_yaml(text: str) -> Any:
    """What `text` says, in plain values.

    Raises:
        yaml.YAMLError: it is no YAML, or more than plain values.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a safe loader that takes less
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError) as e:
        # such as dates that there are not, deep nesting, or `!!timestamp x`
        raise yaml.YAMLError(describe(e)) from e
