"""A griffe extension (mkdocs.yml) for docstrings whose sections Google's style does not have."""

import re
from typing import Any

import griffe

# Several names with one description, which may continue on lines that are indented further.
SHARED_DESCRIPTION = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
ARGS_OF_FORWARD = re.compile(r"^Args of forward:\n((?: +.*\n?)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Repeats descriptions that several names share, and lists the arguments of `forward` in a class's docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = adapt_docstring(obj.docstring.value)


def adapt_docstring(text: str) -> str:
    """Rewrites a docstring to what griffe parses."""

    def repeat(match: re.Match[str]) -> str:
        indent, names, description = match.groups()
        return "\n".join(f"{indent}{name}: {description}" for name in names.split(", "))

    def make_list(match: re.Match[str]) -> str:
        items = re.sub(r"^    (\w[\w, ]*):", r"- `\1`:", match[1], flags=re.MULTILINE)
        return f"Arguments of `forward`:\n\n{items}"

    return SHARED_DESCRIPTION.sub(repeat, ARGS_OF_FORWARD.sub(make_list, text))
