"""Chat templates of the published recipes, by name. A new one: one Jinja text, one line in TEMPLATES.

They follow transformers' chat-template language: ``messages``, ``bos_token``, ``eos_token``, ``add_generation_prompt``.
Content is a list of parts for a model with a processor (``{"type": "image"}``, ``{"type": "text", "text": ...}``) and a
string for a text model; each template takes both.
"""

from pathlib import Path

from vlmdist.errors import UserError

_CONTENT = """\
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ image_token }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

# LLaVA-1.5 on Vicuna, as HuggingFaceH4's article on llava-instruct-mix-vsft gives it
VICUNA = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}
A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.{{ ' ' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ content(message) }}{{ ' ' }}
{%- elif message.role == 'user' -%}USER: {{ content(message) }}
{%- else -%}{{ ' ASSISTANT: ' }}{{ content(message) }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""
)

# Moondream2 (revision 2024-04-02): BOS, image, then question and answer
MOONDREAM = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ content(message) }}
{%- elif message.role == 'user' -%}
{%- if message.content is not string -%}
{%- for part in message.content -%}{%- if part.type == 'image' -%}{{ image_token }}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{ '\\n\\nQuestion: ' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}
{%- endif -%}{{ '\\n\\nAnswer:' }}
{%- else -%}{{ ' ' }}{{ content(message) }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

# Llama-3 on receipt lines: the instruction and the line, then «Normalized product: » and the answer
RECEIPT_LINES = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ ' ' }}{{ content(message) }}{{ eos_token }}
{%- else -%}{{ content(message) }}{{ '\\n' }}
{%- if message.role == 'user' -%}{{ 'Normalized product:' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
)

# The same behind worked examples, as one text that goes on: no end between them
RECEIPT_LINES_FEW_SHOT = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ ' ' }}{{ content(message) }}{{ eos_token if loop.last else '\\n' }}
{%- else -%}{{ content(message) }}{{ '\\n' }}
{%- if message.role == 'user' -%}{{ 'Normalized product:' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
)

# InternLM2-chat as Mini-InternVL-Chat-V1-5 has it: its system text, no line between turns, a new line behind an image
INTERNLM2 = """\
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ image_token }}{{ '\\n' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are an AI assistant whose name is InternLM (书生·浦语).<|im_end|>' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' }}{{ message.role }}{{ '\\n' }}{{ content(message) }}{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

TEMPLATES = {
    "vicuna": VICUNA,
    "moondream": MOONDREAM,
    "receipt-lines": RECEIPT_LINES,
    "receipt-lines-few-shot": RECEIPT_LINES_FEW_SHOT,
    "internlm2": INTERNLM2,
}


def find_template(name: str | None) -> str | None:
    """The Jinja text for prompt.template: a known name, a file ending in .jinja, or None for the model's own.

    UserError where there is no such template.
    """
    if name is None:
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = Path(name)
    if not file.is_file():
        raise UserError(
            f"prompt.template: {name!r} is neither a known template ({', '.join(TEMPLATES)}) nor a file on this machine"
        )
    return file.read_text(encoding="utf-8")
