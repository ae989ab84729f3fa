"""Chat templates that behave like those of the known model families, written for these tests."""

from dataclasses import dataclass, field

from nudge.components.common.chat import ChatTemplate


@dataclass(frozen=True)
class Family:
    """A template, the control tokens of its tokenizer, and the named ones."""

    text: str
    control: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)

    def template(self) -> ChatTemplate:
        return ChatTemplate(self.text, "model", self.named, frozenset(self.control))


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

CHATML = Family(
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    IM,
)

DATED = Family(  # a date and a default system prompt, trimmed turns, header tokens
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'You are helpful.' %}{% endif %}"
    "{{ '<|start|>system<|end_header|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}"
    "{{ system + '<|eot|>' }}"
    "{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|end_header|>\\n\\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end_header|>\\n\\n' }}{% endif %}",
    ("<|begin|>", "<|start|>", "<|end_header|>", "<|eot|>"),
    {"bos_token": "<|begin|>"},
)

THINKING = Family(  # strips reasoning from earlier turns, and marks the last one's even if empty
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set reasoning = m.reasoning_content | default('') %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    IM,
)

OPEN_THINK = Family(  # opens a think tag in the generation prompt, which answers may lack
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1] %}"
    "{{ '<|Assistant|>' }}{% if m.reasoning_content is defined %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content + '<|eos|>' }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"),
    {"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
)

MERGED = Family(  # merges the system turn into the first user turn; no generation prompt
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    {"bos_token": "<s>", "eos_token": "</s>"},
)

LATE_SYSTEM = Family(  # puts the system turn into the last user turn
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    {"bos_token": "<s>", "eos_token": "</s>"},
)

RENAMED = Family(  # calls the assistant "model", refuses system turns
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    {"bos_token": "<bos>"},
)

TOOLS = Family(  # tools and tool calls as JSON; a call ends with a token of its own
    "{% if tools %}{{ '<|sys|>' + (tools | tojson) + '<|eot|>' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{{ '<|assistant|>' }}{% for call in m.tool_calls %}"
    "{{ {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}"
    "{% endfor %}{{ '<|eom|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|eot|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("<|sys|>", "<|assistant|>", "<|user|>", "<|tool|>", "<|eot|>", "<|eom|>"),
)

CLOSED = Family(  # ends a text with an end-of-document token, whatever the last turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    {"eos_token": "<|endoftext|>"},
)

MARKED = Family(  # generation marks, and a header that only an answer has
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}",
    IM,
)

FAMILIES = {
    "chatml": CHATML,
    "dated": DATED,
    "thinking": THINKING,
    "open_think": OPEN_THINK,
    "merged": MERGED,
    "late_system": LATE_SYSTEM,
    "renamed": RENAMED,
    "tools": TOOLS,
    "closed": CLOSED,
    "marked": MARKED,
}
