"""Finds a text's encoding: marked by a BOM, set, UTF-8, declared, or detected."""

import codecs
import io
import re
from typing import IO, Any

from nudge.components.common.readers.records import ReadOptions
from nudge.components.common.readers.unreadable import Unreadable

SAMPLE_BYTES = 1 << 20
BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
"""Characters that no text contains; one of them shows that the guessed encoding is wrong."""
CANDIDATES = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
]


MANY_ZEROS, MORE_THAN_CHANCE = 0.1, 2
"""The share and the number of characters below U+0100 from which zeros in every second byte mean
UTF-16."""


def decoded(raw: bytes, options: ReadOptions, declared: str = "") -> tuple[str | Unreadable, str]:
    """The text of ``raw`` and its encoding, which is empty for UTF-8.

    ``declared`` is the encoding that the file states; it counts only if the bytes are not UTF-8.
    """
    bom = _marked(raw) or ("" if options.encoding else _unmarked_utf16(raw))
    if not (bom or options.encoding):
        try:
            return raw.decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            pass
    encoding = bom or options.encoding or known(declared) or detected(raw)
    if encoding:
        try:
            text = raw.decode(encoding)
        except (UnicodeError, LookupError):
            text = ""
        if text and not (bom and CONTROL.search(text)):
            return text.removeprefix("\ufeff"), _named(encoding)
    reason = "wrong_encoding" if options.encoding else "not_utf8"
    return Unreadable(reason, options.encoding, len(raw)), ""


def utf8_stream(
    stream: IO[bytes], options: ReadOptions, detect: bool = True
) -> tuple[IO[bytes], str]:
    """The stream as UTF-8, and its original encoding (empty for UTF-8), found from its beginning.

    Without ``detect``, only a BOM or the setting counts. A stream that mixes valid UTF-8 with other
    bytes is not converted; its bad rows are counted.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else None
    if buffered is None:
        buffered = io.BufferedReader(_Raw(stream), SAMPLE_BYTES)
    sample = buffered.peek(SAMPLE_BYTES)
    encoding = _marked(sample) or options.encoding or (_unmarked_utf16(sample) if detect else "")
    if not encoding and detect and not _has_utf8(sample):
        encoding = detected(sample[: sample.rfind(b"\n") + 1] or sample)
    if not encoding or _named(encoding) == "":
        return buffered, ""
    if _named(encoding) in ("utf-16", "utf-32") and not _marked(sample):
        encoding = f"{_named(encoding)}-le"  # what Windows writes; the decoder demands a BOM
    return io.BufferedReader(_Recoded(buffered, encoding), SAMPLE_BYTES), _named(encoding)


def known(name: str) -> str:
    """The encoding for a declared name; empty if Python does not know the name.

    As browsers do (WHATWG Encoding Standard), latin-1 and ASCII are read as windows-1252.
    """
    name = name.strip().strip("\"'").lower()
    if name in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii"):
        return "cp1252"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return ""


LATIN = {
    "cp1250": frozenset(("bs", "cs", "hr", "hu", "pl", "ro", "sk", "sl", "sq")),
    "cp1254": frozenset(("az", "tr")),
    "cp1257": frozenset(("lt", "lv")),
}
"""Encodings of the Latin alphabet that differ from windows-1252 in a few letters, and the languages
for which they exist."""
WESTERN = frozenset(
    ("ca", "da", "de", "en", "es", "eu", "fi", "fr", "ga", "gl", "is", "it", "nb", "nl", "nn", "no",
     "pt", "sv")
)  # fmt: skip
LATIN_SENTENCES, FEW_LETTERS = 200, 8
PIECE = re.compile("[^.!?\n]*[^\x00-\x7f][^.!?\n]*")
"""A sentence with a character beyond ASCII."""


def detected(raw: bytes) -> str:
    """The encoding that charset-normalizer considers most likely; empty if none fits."""
    from charset_normalizer import from_bytes

    if b"\0" in raw:
        return ""
    matches = from_bytes(raw[:SAMPLE_BYTES], cp_isolation=CANDIDATES, threshold=0.35)
    best = matches.best()
    if best is None:
        return ""
    # If several fit equally well, take the most common: French fits windows-1250 too.
    fitting = [m for m in matches if m.chaos <= best.chaos and m.coherence >= best.coherence]
    names = {name for m in fitting for name in (m.encoding, *(s.encoding for s in m.submatch))}
    name = next((name for name in CANDIDATES if name in names), best.encoding)
    if name == "cp1252" or name in LATIN:
        name = _latin(raw, name)
    try:
        return "" if CONTROL.search(raw.decode(name)) else name
    except UnicodeDecodeError:
        return ""


def _latin(raw: bytes, guessed: str) -> str:
    """The encoding of a text in the Latin alphabet, from its language.

    The letters alone say little: charset-normalizer takes Hungarian, Turkish and Lithuanian for
    windows-1252, and a table of English with a few French words for windows-1257.
    """
    language = _language(raw, "cp1252")  # most letters are the same in every encoding
    for name, languages in LATIN.items():
        if language in languages:
            return name
    # Wrong letters can look like a language that few write, such as Ligurian.
    has_few = sum(byte > 127 for byte in raw[:SAMPLE_BYTES]) < FEW_LETTERS
    names = [guessed] if has_few or language in WESTERN else [guessed, *LATIN]
    for name in names:
        if _language(raw, name) in LATIN.get(name, ()):
            return name
    return "cp1252"


def _language(raw: bytes, encoding: str) -> str:
    """The language of the sentences with characters beyond ASCII."""
    import py3langid

    text = raw[:SAMPLE_BYTES].decode(encoding, "ignore")
    return str(py3langid.classify(" ".join(PIECE.findall(text)[:LATIN_SENTENCES]))[0])


def _marked(raw: bytes) -> str:
    return next((name for bom, name in BOMS if raw.startswith(bom)), "")


def _unmarked_utf16(raw: bytes) -> str:
    """``utf-16-le`` or ``utf-16-be`` for UTF-16 without a BOM; empty if ``raw`` is something else.

    Its blanks, digits and line ends have a zero in the same one of their two bytes.
    """
    sample = raw[: SAMPLE_BYTES // 16 * 2]
    first, second = sample[::2].count(0), sample[1::2].count(0)
    many, few = max(first, second), min(first, second)
    if many < max(MORE_THAN_CHANCE, MANY_ZEROS * len(sample) / 2) or few > many / 20:
        return ""
    return "utf-16-be" if first > second else "utf-16-le"


def _named(encoding: str) -> str:
    name = codecs.lookup(encoding).name
    if name.startswith("cp125"):
        return f"windows-{name[2:]}"
    return "" if name in ("utf-8", "utf-8-sig", "ascii") else name


def _has_utf8(sample: bytes) -> bool:
    """Whether a sample is valid UTF-8, or contains valid UTF-8 characters beyond ASCII."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
        return True
    except UnicodeDecodeError:
        return any(not c.isascii() for c in sample.decode("utf-8", "ignore"))


class _Raw(io.RawIOBase):
    """Any binary stream as a raw stream, so that it can be buffered and peeked into."""

    def __init__(self, inner: IO[bytes]) -> None:
        self._inner, self._left = inner, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = self._more(len(buffer))
        data, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def _more(self, size: int) -> bytes:
        return self._inner.read(size)


class _Recoded(_Raw):
    """A stream converted to UTF-8; undecodable input becomes a byte that is not valid UTF-8."""

    def __init__(self, inner: IO[bytes], encoding: str) -> None:
        super().__init__(inner)
        self._decoder = codecs.getincrementaldecoder(encoding)("nudge-escape")
        self._ended = False

    def _more(self, size: int) -> bytes:
        while not self._ended:
            data = self._inner.read(size)
            self._ended = not data
            try:
                text = self._decoder.decode(data, self._ended)
            except UnicodeError as error:  # a codec that does not ask what to do about errors
                raise OSError(str(error)) from None
            if text:
                return text.encode("utf-8", "surrogateescape")
        return b""


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("nudge-escape", _escape)
