"""The page of `fdistill demo`. Nothing in it comes from another host, and what people type is shown as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from fdistill.base.errors import FDistillError, brief
from fdistill.commands.side_by_side import (
    MOST_CHARACTERS,
    MOST_IMAGES,
    MOST_SEED,
    MOST_TEACHER_STEPS,
    Drawn,
    Pair,
    Wish,
    draw,
)

_ALL = "all in turn"
CSS = """
.told { border-left: 3px solid #d97706; padding: 0.4rem 0.8rem; overflow-wrap: anywhere; }
.cost { overflow-wrap: anywhere; }
.cost h2 { margin: 0; font-size: 1.1rem; }
.drawn, .drawn :is(.gallery-container, .grid-wrap, .grid-container, .gallery-item, .gallery-item button) {
  height: auto !important; min-height: 0 !important; max-height: none !important;
}
.drawn .grid-container {
  grid-template: none / repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important; align-content: start;
}
footer { display: none !important; }
"""


def build_page(pair: Pair) -> gr.Blocks:
    """The page for a student and its teacher; drawings are made one at a time."""
    with gr.Blocks(title="fdistill demo", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.HTML(_head(pair))
        asked = _questions(pair)
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        told = gr.HTML(_sentence(pair.reason), elem_id="told", visible=bool(pair.reason))
        with gr.Row():
            shown = _side("student")
            if pair.teacher is not None:
                shown += _side("teacher")

        def drawn(*values: Any) -> list[Any]:
            return _answer(pair, dict(zip(asked, values, strict=True)))

        events: dict[str, Any] = {
            "inputs": list(asked.values()),
            "outputs": [told, *shown],
            "api_visibility": "private",
        }
        button.click(drawn, concurrency_limit=1, concurrency_id="draw", **events)
        if "prompt" in asked:
            asked["prompt"].submit(drawn, concurrency_limit=1, concurrency_id="draw", **events)
    page.queue(max_size=8)
    return page


def _head(pair: Pair) -> str:
    teacher = "" if pair.teacher is None else f" beside its teacher {html.escape(pair.teacher.name)}"
    noise = " Both start from the same noise." if pair.same_noise else ""
    return f"<h1>fdistill demo</h1><p>The student {html.escape(pair.student.name)}{teacher}.{noise}</p>"


def _questions(pair: Pair) -> dict[str, Any]:
    """{field of a `Wish`: the component that asks for it}."""
    asked: dict[str, Any] = {}
    maker = pair.student
    if maker.takes_prompts:
        asked["prompt"] = gr.Textbox(label="Prompt", max_length=MOST_CHARACTERS, elem_id="prompt")
    with gr.Row():
        if maker.num_classes is not None:
            classes = [_ALL, *(str(label) for label in range(maker.num_classes))]
            asked["label"] = gr.Dropdown(classes, value=_ALL, label="Class", min_width=120, elem_id="label")
        asked["seed"] = gr.Number(
            0, label="Seed", info=f"0 to {MOST_SEED:,}", precision=0, min_width=120, elem_id="seed"
        )
        asked["images"] = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images", min_width=160)
        if len(pair.steps) > 1:
            info = f"It has learnt to take {pair.learnt}."
            asked["steps"] = gr.Slider(
                1, pair.steps[0], pair.steps[0], step=1, label="Steps of the student", info=info, min_width=160
            )
        if pair.teacher is not None:
            info = "Each takes two network evaluations, the last takes one."
            asked["teacher_steps"] = gr.Slider(
                1, MOST_TEACHER_STEPS, 18, step=1, label="Steps of the teacher", info=info, min_width=160
            )
    return asked


def _side(name: str) -> list[Any]:
    with gr.Column(min_width=280):
        cost = gr.HTML(f"<h2>{name}</h2>", elem_classes="cost", elem_id=f"{name}-cost")
        images = gr.Gallery(
            show_label=False,
            columns=4,
            object_fit="contain",
            height="auto",
            format="png",
            elem_id=f"{name}-images",
            elem_classes="drawn",
        )
    return [cost, images]


def _answer(pair: Pair, values: dict[str, Any]) -> list[Any]:
    """What the page shows: a sentence, and for each side what it took and its images; no images after an error."""
    try:
        label = values.get("label", _ALL)
        wish = Wish(**{**values, "label": None if label == _ALL else int(label)})
        student, teacher = draw(pair, wish)
    except (FDistillError, RuntimeError, MemoryError) as error:
        said = str(error) if isinstance(error, FDistillError) else brief(error)
        empty: list[Any] = []
        for name in _names(pair):
            empty += [f"<h2>{name}</h2>", []]
        return [gr.HTML(_sentence(f"Nothing was drawn: {said}."), visible=True), *empty]
    sentences = [pair.reason, pair.student.cut([wish.prompt]) if wish.prompt else ""]
    said = " ".join(sentence for sentence in sentences if sentence)
    shown = [gr.HTML(_sentence(said), visible=bool(said)), *_shown("student", student, wish)]
    return shown if teacher is None else [*shown, *_shown("teacher", teacher, wish)]


def _names(pair: Pair) -> Sequence[str]:
    return ["student"] if pair.teacher is None else ["student", "teacher"]


def _shown(name: str, drawn: Drawn, wish: Wish) -> list[Any]:
    evaluations = f"{drawn.evaluations:g} network evaluation{'' if drawn.evaluations == 1 else 's'}"
    prompt = f"<p>{html.escape(wish.prompt)}</p>" if wish.prompt else ""
    cost = f"<h2>{name}</h2><p>{evaluations} and {drawn.seconds:.3g} s for each image</p>{prompt}"
    return [cost, list(drawn.images)]


def _sentence(text: str) -> str:
    return f'<p class="told" role="alert">{html.escape(text)}</p>' if text else ""
