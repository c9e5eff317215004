"""A settings file, JSON or YAML: whatever it holds is nested dicts or one line, in a moment."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from oneloop.settings.ranges import BadInput

FILE_BYTES = 100_000
"""The largest settings file that is read; run.json has 5,000."""


def read_file(path: str) -> dict[str, Any]:
    """A settings file, JSON or YAML, as nested dicts.

    Raises:
        BadInput: it is not one, is larger than FILE_BYTES, says something twice, or has aliases, which may grow without end.
    """
    import yaml

    def once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{twice[0]!r} is given more than once")
        return dict(pairs)

    def read_yaml(text: str) -> Any:
        kind, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
        for event in yaml.parse(text, kind):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases (*name); expected every value where it is used")
            if depth > 4:
                raise RecursionError
        loader = kind(text)
        node = loader.get_single_node() or yaml.MappingNode("tag:yaml.org,2002:map", [])
        inside = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else []
        for mapping in (node, *inside):
            if isinstance(mapping, yaml.MappingNode):
                once([(key.value, None) for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)])
        return loader.construct_document(node)

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise BadInput(f"{path}: not a file; expected a settings file")
        with open(path, "rb") as file:
            raw = file.read(FILE_BYTES + 1)
        if len(raw) > FILE_BYTES:
            raise BadInput(f"{path}: more than {FILE_BYTES:,} bytes; expected a settings file")
        text = raw.decode("utf-8-sig")
        settings = json.loads(text, object_pairs_hook=once) if path.endswith(".json") else read_yaml(text)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"the settings file {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a parser makes of a file that is none
        why = "too many brackets in each other" if isinstance(error, RecursionError) else error
        raise BadInput(f"{path}: not valid JSON or YAML: {why}") from None
    if not isinstance(settings, dict):
        raise BadInput(f'{path}: expected groups of settings, such as {{"base": {{"num_epochs": 10}}}}')
    return settings
