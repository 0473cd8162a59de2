"""The page /docs: the OpenAPI description as plain HTML, without scripts and without files from other hosts."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

METHODS = ("get", "post", "delete")


def render_openapi(openapi: Mapping[str, Any]) -> str:
    """The page, given the contents of openapi.json."""
    schemas = openapi.get("components", {}).get("schemas", {})
    operations = "\n".join(
        _render_operation(method, path, item[method], schemas)
        for path, item in openapi["paths"].items()
        for method in METHODS
        if method in item
    )
    definitions = "\n".join(
        f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3><p>{escape(schema.get("description", ""))}</p>'
        f"{_render_fields(schema)}"
        for name, schema in schemas.items()
        if "properties" in schema and not name.endswith("ValidationError")
    )
    title = escape(openapi["info"]["title"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: API</title>
<link rel="stylesheet" href="/static/docs.css">
</head>
<body>
<main>
<h1>{title}: API</h1>
<p>{escape(openapi["info"].get("description", ""))} Machine-readable: <a href="/openapi.json">openapi.json</a>.
Metrics: <a href="/metrics">/metrics</a>. <a href="/">Try it</a>.</p>
<h2>Routes</h2>
{operations}
<h2>Objects</h2>
{definitions}
</main>
</body>
</html>
"""


def _render_operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = [f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(operation.get('summary', ''))}</p>"]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            (item["name"], item["in"], "yes" if item.get("required") else "no", escape(item.get("description", "")))
            for item in parameters
        ]
        parts.append(_table(("parameter", "in", "required", "meaning"), rows))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body: {escape(kind)} {_type_of(content.get('schema', {}))}</p>")
    for status, response in operation.get("responses", {}).items():
        if status.startswith("2"):
            types = [_type_of(content.get("schema", {})) for content in response.get("content", {}).values()]
            parts.append(f"<p>Response {escape(status)}: {', '.join(types) or 'no content'}</p>")
    if "requestBody" in operation and "application/json" in operation["requestBody"]["content"]:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        body = json.dumps(_example(schema, schemas))
        parts.append(f"<pre>curl -H 'Content-Type: application/json' -d '{escape(body, quote=False)}' HOST{escape(path)}</pre>")
    return f"<section>{''.join(parts)}</section>"


def _render_fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (name, _type_of(field), "yes" if name in required else "no", escape(field.get("description", "")))
        for name, field in schema["properties"].items()
    ]
    return _table(("field", "type", "required", "meaning"), rows)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; the first column is code, the others are HTML already."""
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = "".join(
        f"<tr><td><code>{escape(first)}</code></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _type_of(schema: Mapping[str, Any]) -> str:
    """A schema's type as HTML, with a link to the object."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type_of(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    return escape(str(schema.get("type", "")))


def _example(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """A minimal value: the required fields only."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[-1]]
    if "properties" in schema:
        return {name: _example(schema["properties"][name], schemas) for name in schema.get("required", [])}
    if schema.get("type") == "array":
        return [_example(schema["items"], schemas)]
    return (schema.get("examples") or ["..."])[0]
