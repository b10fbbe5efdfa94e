"""The README of an exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fairseq_implicit.huggingface.configuration import ImplicitBertConfig

TITLES = {
    "ode_bert": "ODE-BERT: each block of the encoder is integrated by a scheme",
    "neural_ode_bert": "Neural-ODE BERT: one field, integrated over the whole depth",
    "deq_bert": "DEQ-BERT: the depth is the equilibrium of one cell",
}
_SIZES = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "max_positions")


#: What the Hub calls the task of an Auto class.
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}


def model_card(config: ImplicitBertConfig, auto: str, facts: Mapping[str, str], bundled: bool) -> str:
    """Markdown, with the head that the Hub reads.

    Args:
        config: of the model.
        auto: the Auto class that opens it with its head.
        facts: of its training and cost, in words.
        bundled: whether the folder holds its code.
    """
    task = _TASKS[auto]
    trust = ", trust_remote_code=True" if bundled else ""
    options = config.options()
    depth = {
        item.name: getattr(options, item.name)
        for item in dataclasses.fields(options)
        if item.name in _SIZES or getattr(options, item.name) != item.default
    }
    code = (
        "The code of the model is in this folder; transformers and torch are all that it needs."
        if bundled
        else "It needs the package fairseq_implicit: `import fairseq_implicit.huggingface` before loading."
    )
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        f"tags: [{config.model_type}, fairseq_implicit]",
        "---",
        "",
        f"# {TITLES[config.model_type]}",
        "",
        code,
        "",
        "```python",
        *([] if bundled else ["import fairseq_implicit.huggingface"]),
        f"from transformers import {auto}, AutoTokenizer, pipeline",
        "",
        f'model = {auto}.from_pretrained("FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        f'pipeline("{task}", model=model, tokenizer=tokenizer)',
        "```",
        "",
        "Before training by Trainer: `model.attach_to(trainer)`, for the depth's schedules and its cost in the log.",
        "",
        "## Depth",
        "",
        *_table(depth),
        "",
        "## Training",
        "",
        *_table(facts),
        "",
    ]
    return "\n".join(lines)


def _table(rows: Mapping[str, object]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
