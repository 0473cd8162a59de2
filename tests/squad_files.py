"""Files in SQuAD's format, for tests."""

import json
from pathlib import Path
from typing import Any

NAMES = ["Anna", "Bert", "Carla", "Dora", "Emil", "Fritz", "Gerd", "Hugo"]
CITIES = ["Rome", "Paris", "Berlin", "Madrid"]


def question(name: str, text: str, *answers: tuple[str, int], **fields: Any) -> dict[str, Any]:
    """An item of "qas"."""
    return {"id": name, "question": text, "answers": [{"text": t, "answer_start": s} for t, s in answers], **fields}


def squad(n_articles: int, unanswerable: bool = False) -> dict[str, Any]:
    """Articles with two paragraphs, each with two questions and, if wanted, one without an answer."""
    data = []
    for i in range(n_articles):
        paragraphs = []
        for j in range(2):
            name, city = NAMES[(i + j) % 8], CITIES[(3 * i + j) % 4]
            context = f"{name} lives in {city}. The city is old."
            qas = [
                question(f"{i}-{j}-where", "Where is the home?", (city, context.index(city))),
                question(f"{i}-{j}-who", "Who lives there?", (name, 0)),
            ]
            if unanswerable:
                qas.append(question(f"{i}-{j}-king", "How old is the king?", is_impossible=True))
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": f"title {i}", "paragraphs": paragraphs})
    return {"version": "v2.0" if unanswerable else "1.1", "data": data}


def write(path: Path, values: Any) -> Path:
    """Writes values as JSON."""
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def single(context: str, *qas: dict[str, Any]) -> dict[str, Any]:
    """A file with one paragraph."""
    return {"data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}
