"""Chat templates of models made of a vision tower and a language model."""

from __future__ import annotations

from typing import Any

IMAGES_AS_TEXT = (
    "{%- set shown = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set said = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set said.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set said.text = said.text + '<image>\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set shown.messages = shown.messages + [dict(message, content=said.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = shown.messages %}"
)
"""Set before the template of a language model, which knows messages of text only: every image becomes its placeholder
in a line of its own, and a message one string."""


def chat_template(tokenizer: Any) -> str:
    """That of the language model, made to show images; or LLaVA's, if the language model has none."""
    return IMAGES_AS_TEXT + (tokenizer.chat_template or vicuna_template(tokenizer))


def vicuna_template(tokenizer: Any) -> str:
    """`USER: … ASSISTANT: …`, each answer ended by the tokenizer's end of sequence."""
    # The answer must be the same tokens wherever it stands: SentencePiece puts a space before every text by itself,
    # others join a space to the word after it.
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    asks, answers = ("ASSISTANT:", "ASSISTANT: ") if first.startswith("▁") else ("ASSISTANT:\n", "ASSISTANT:\n")
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ " + repr(answers) + " + message['content'] + "
        "" + repr(str(tokenizer.eos_token)) + " }}"
        "{% else %}{{ ('USER: ' if message['role'] == 'user' else '') + message['content'] + ' ' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + repr(asks) + " }}{% endif %}"
    )
