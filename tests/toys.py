"""Small stand-ins that the tests of several files share.

Questions to an engine, simulated models and sources, small configurations, a section's results.
"""

import json

from octomed.data.sources import Source, register
from octomed.generate.engines import make_sample
from octomed.generate.samples import Request

WORDS = (
    "Please reason step - by - step , and put your final answer within \\boxed{ } . which is it ? "
    "one two three fever rash the option is user assistant : - ."
)


def chat(text, *images):
    "The messages of a user who shows these pictures and says this."
    content = [{"type": "image", "image": i} for i in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ask(name, n=4, text="which is it ?"):
    "A request for the first `n` samples of a question without pictures."
    return Request(name, chat(text), f"prompt of {name}", tuple(range(n)))


class ToyEngine:
    "A simulated model. A subclass says what it answers."

    model, name = "toy@1", "toy"

    def answer(self, request, index):
        "(text, finish, tokens) of one sample of a request."
        raise NotImplementedError

    def generate(self, requests, sampling):
        for r in requests:
            for i in r.indices:
                text, finish, tokens = self.answer(r, i)
                columns = {"text": text, "finish": finish, "tokens": tokens}
                yield make_sample(self, r, i, sampling=sampling, **columns)


def register_toy_source(name, split, role, questions):
    "Make a source that has these text questions known by its name."
    register(
        Source(
            name=name,
            split=split,
            category="text_only",
            role=role,
            make=lambda **_: list(questions),
            revision="1",
        )
    )


def toy_size(hidden):
    "The size of a student of two layers that trains in no time."
    from octomed.clinic.students import Size

    return Size(
        hidden=hidden,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=64,
        vision_hidden=32,
        vision_layers=2,
    )


def shrink_configuration(c, text, vision):
    "The same Qwen2.5-VL with these values in its two parts, and markers that are tokens past 499."
    return type(c)(
        text_config=c.text_config.to_dict() | text,
        vision_config=c.vision_config.to_dict() | vision,
        tie_word_embeddings=False,
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )


def write_notebook(path):
    "A section's notebook that holds nothing but its parameters."
    cell = {
        "cell_type": "code",
        "metadata": {"tags": ["parameters"]},
        "source": 'recipe = "smoke"\nout = None',
        "outputs": [],
        "execution_count": None,
        "id": "a",
    }
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook = {
        "cells": [cell],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(notebook))


def write_results(folder, claims, rows, code="old", section="42_b", **facts):
    "What a section leaves in the folder of a recipe, made by code of this version."
    card = {
        "versions": {"torch": "1"},
        "hardware": "2 cores",
        "minutes": 3.5,
        "code": code,
        "parents": [],
    }
    results = {
        "section": section,
        "recipe": folder.name,
        "claims": claims,
        "rows": rows,
        **facts,
        "card": card,
    }
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "results" / f"{section}.json").write_text(json.dumps(results))
