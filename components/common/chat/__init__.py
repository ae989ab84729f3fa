"""Conversations: read from any common form, rendered with a model's chat template, and masked."""

from nudge.components.common.chat.conversation import Conversation, Message, from_json, from_plain
from nudge.components.common.chat.forms import conversation_of
from nudge.components.common.chat.refusals import REASONS, Refusal
from nudge.components.common.chat.render import Learn, Rendered
from nudge.components.common.chat.template import ChatTemplate, template_of_folder

__all__ = [
    "REASONS",
    "ChatTemplate",
    "Conversation",
    "Learn",
    "Message",
    "Refusal",
    "Rendered",
    "conversation_of",
    "from_json",
    "from_plain",
    "template_of_folder",
]
