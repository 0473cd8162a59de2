"""Hooks of the documentation site (mkdocs.yml): files outside docs/, notebooks, command-line options.

Pages link to files of the repository by relative paths, which work on GitHub; `on_page_markdown` adapts them to the site. It
replaces the comments `<!-- commands -->`, `<!-- options: train -->` and `<!-- options: pretrain -->`.
"""

import argparse
import base64
import html
import importlib
import itertools
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Files outside docs/ that pages link to, and their places in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "licenses/funnel.txt",
    "funnel/data/movie_reviews/LICENSE.txt": "licenses/movie_reviews.txt",
    "funnel/tiny/README.md": "tiny.md",
}
COMMAND = re.compile(r"(funnel|python|torchrun) ")


def on_startup(**_: Any) -> None:
    """Makes train.py and pretrain.py importable."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/, and a page and images for each notebook."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        markdown, images = convert_notebook(json.loads(file.content_string), Path(file.src_uri).stem)
        files.append(File.generated(config, site_path(f"docs/{file.src_uri}"), content=markdown))
        for name, data in images.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(file.src_uri), name), content=data))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Adapts the links of a page and inserts the options of commands."""
    markdown = re.sub(r"^<!-- commands -->$", lambda _: "\n".join(describe_commands()), markdown, flags=re.MULTILINE)
    markdown = re.sub(
        r"^<!-- options: (\w+) -->$", lambda match: "\n".join(describe_script(match[1])), markdown, flags=re.MULTILINE
    )
    return adapt_links(markdown, page.file.src_uri)


# --- links ------------------------------------------------------------------------------------------------------------


def site_path(path: str) -> str:
    """The place in the site of a file of the repository."""
    return OUTSIDE.get(path) or re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def adapt_links(markdown: str, place: str) -> str:
    """Replaces the targets of relative links outside of code blocks.

    Args:
        place: of the page in the site.
    """
    folder = posixpath.dirname(next((path for path, site in OUTSIDE.items() if site == place), f"docs/{place}"))

    def adapt(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / target).is_file():
            return match[0]  # MkDocs reports it, unless it is another page's image
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(place) or ".")

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"(\]\()(?![a-z]+:|[#/])([^)#\s]+)", adapt, part) for part in parts[::2]]
    return "".join(parts)


# --- notebooks --------------------------------------------------------------------------------------------------------


def convert_notebook(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Converts a notebook with its stored outputs to Markdown; returns it and the images by file name.

    A code cell's metadata may contain `alt`, which describes its image.
    """
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for is_image, outputs in itertools.groupby(cell["outputs"], lambda output: "image/png" in output.get("data", {})):
            if is_image:
                for output in outputs:
                    image = f"{name}-{len(images) + 1}.png"
                    images[image] = base64.b64decode(output["data"]["image/png"])
                    parts.append(f"![{cell['metadata'].get('alt', 'plot')}]({image})")
            elif text := "".join("".join(o.get("text") or o["data"].get("text/plain", "")) for o in outputs).rstrip("\n"):
                parts.append(f"```{{.text .output}}\n{text}\n```")
    # The first cell is the title.
    parts.insert(1, f'<a href="../{name}.ipynb" download>Download this notebook</a>; its outputs are stored with it.')
    return "\n\n".join(parts) + "\n", images


# --- command line -----------------------------------------------------------------------------------------------------


def describe_commands() -> Iterator[str]:
    """Lines of Markdown: a section for each subcommand of `funnel`."""
    from funnel.cli.main import build_parser

    # argparse has no public way to list a parser's arguments.
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {action.dest: action.help for action in subparsers._choices_actions}
    for name, parser in subparsers.choices.items():
        summary = summaries.get(name) or ""
        parser.description = parser.description or f"{summary[:1].upper()}{summary[1:]}."
        yield from (f"## funnel {name} {{ #{name} }}", "")
        usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
        yield from ("```text", *wrap_usage(usage), "```", "")
        yield from describe_parser(parser, name)


def describe_script(name: str) -> Iterator[str]:
    """Lines of Markdown: the options of a script that is generated from a dataclass."""
    from funnel.cli.common import ArgumentParser, add_options

    module = importlib.import_module(name)
    parser = ArgumentParser(prog=f"{name}.py", description=module.__doc__)
    add_options(parser, next(value for key, value in vars(module).items() if key in ("TrainArgs", "PretrainArgs")))
    yield from describe_parser(parser, name)


def describe_parser(parser: argparse.ArgumentParser, prefix: str) -> Iterator[str]:
    """Lines of Markdown: description and arguments.

    Args:
        prefix: of the anchors.
    """
    for paragraph in (parser.description or "").split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        is_code = all(COMMAND.match(line) for line in lines)
        yield from ("```sh", *lines, "```", "") if is_code else (*map(html.escape, lines), "")
    formatter = parser.formatter_class(prog=parser.prog)
    yield '<dl class="options">'
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        anchor = f"{prefix}-{action.dest.lower().replace('_', '-')}"
        invocation = html.escape(formatter._format_action_invocation(action))
        text = html.escape(formatter._expand_help(action) if action.help else "")
        yield f'<dt id="{anchor}"><code>{invocation}</code></dt><dd>{text}</dd>'
    yield from ("</dl>", "")


def wrap_usage(usage: str, width: int = 78) -> Iterator[str]:
    """Breaks a usage line between its arguments."""
    line = ""
    for part in re.findall(r"\[[^\]]*(?:\[[^\]]*\][^\]]*)*\]|\S+", usage):
        if line and len(line) + len(part) >= width:
            yield line
            line = "   "
        line += f" {part}" if line else part
    yield line
