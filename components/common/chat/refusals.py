"""Why a conversation cannot be trained on: one exception, with a reason from one table."""

REASONS = {
    "not_a_conversation": "the record is text or has none of the columns of a conversation",
    "bad_messages": "the messages are not a list, or not valid JSON",
    "no_messages": "the conversation is empty",
    "bad_message": "a message is not an object with a role",
    "unknown_role": "a role is not system, user, assistant or tool, or a common name for one",
    "content_not_text": "a message's content is neither text nor a list of text parts",
    "bad_tool_call": "a tool call has no name, or its arguments are not a JSON object",
    "bad_tools": "the tools are not a list of JSON objects",
    "bad_weight": "a message's weight is neither 0 nor 1",
    "no_assistant_turn": "nothing in the conversation can be learned: it has no assistant turn",
    "two_system_turns": "the conversation has more than one system turn",
    "role_order": "the roles are in the wrong order",
    "empty_prompt": "a user turn is empty",
    "empty_answer": "an assistant turn is empty",
    "conversation_too_long": "the conversation is longer than the limit, and it may not be cut",
    "nothing_learned": "every assistant turn is marked as not to be learned",
    "control_token": "a turn spells out a control token of the model",
    "template_raises": "the chat template raises an error for this conversation",
    "prompt_changes": "the chat template changes the prompt once an answer follows it",
    "no_end_of_turn": "the chat template writes no end-of-turn token after an answer",
    "prompt_learned": "the learned part would contain text of a user or system turn",
    "answer_rewritten": "the chat template leaves out or rewrites an answer",
}
"""Every reason under which a conversation is counted as dropped, and what it means."""


class Refusal(ValueError):
    """A conversation that cannot be trained on; ``reason`` is a key of `REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        self.reason, self.detail = reason, detail
        super().__init__(f"{REASONS[reason]}: {detail}" if detail else REASONS[reason])
