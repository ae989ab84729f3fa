"""Mail whose text is elsewhere than in a body of its own: attached, encrypted or missing."""

from email.message import EmailMessage

import pytest

from tests.components.common.readers.reading import counted, texts


def mail(**headers: str) -> EmailMessage:
    message = EmailMessage()
    for name, value in {"From": "ann@example.org", **headers}.items():
        message[name.replace("_", "-")] = value
    return message


def test_a_message_that_is_attached_to_another_is_read() -> None:
    inner = mail(Subject="The tower")
    inner.set_content("It stands in Paris.")
    outer = mail(Subject="Fwd: the tower")
    outer.set_content("See below.")
    outer.add_attachment(inner)
    outer.add_attachment(b"%PDF-1.7", maintype="application", subtype="pdf", filename="a.pdf")
    expected = "Fwd: the tower\n\nSee below.\n\nThe tower\n\nIt stands in Paris."
    assert texts(outer.as_bytes(), "a.eml") == [expected]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("application/pkcs7-mime", "encrypted"),
        ("multipart/encrypted", "encrypted"),
        ("text/calendar", "no_text"),
        ("text/plain", "no_text"),
    ],
)
def test_a_message_without_a_body_is_counted(kind: str, reason: str) -> None:
    message = mail(Subject="A subject that is as long as a document", Content_Type=kind)
    assert counted(message.as_bytes() + b"\n", "a.eml") == {reason: 1}
