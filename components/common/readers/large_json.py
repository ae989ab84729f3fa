"""JSON files too large to be held in memory: one item of their array at a time."""

from collections.abc import Iterator
from typing import IO, Any

from nudge.components.common.chat.forms import LISTS, PAIRS
from nudge.components.common.readers import records
from nudge.components.common.readers.chat_exports import ALL_CHATS, CHAT, ROW_KEYS
from nudge.components.common.readers.records import ReadOptions
from nudge.components.common.readers.unreadable import Unreadable

CHUNK_BYTES = 1 << 16
BODIES = (*LISTS, *(answered for _, answered in PAIRS))
"""Keys that an object with a conversation has."""


class _TooLong(Exception):
    """One item of the array is larger than a record may be."""


class _Metered:
    """A stream for ijson that counts the bytes read since the last item."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.since_item = stream, 0

    def rewind(self) -> None:
        self._stream.seek(0)
        self.since_item = 0

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        data = self._stream.read(size)
        self.since_item += len(data)
        if self.since_item > records.RECORD_BYTES + 2 * CHUNK_BYTES:
            raise _TooLong
        return data


def items(stream: IO[bytes], options: ReadOptions) -> Iterator[Any]:
    """The items of a top-level array, or of the first array whose items have the text column.

    ``stream`` is UTF-8 and can seek. A file that ends early or is no JSON, and an item of more than
    `RECORD_BYTES`, end the iteration with an `Unreadable`; items before it count.
    """
    import ijson

    metered = _Metered(stream)
    try:
        path = _path_of_array(metered, options)
        if path is None:
            yield Unreadable("no_column", "no array of objects with the text column")
            return
        metered.rewind()
        found = ijson.items(metered, path, buf_size=CHUNK_BYTES, use_float=True)
        for item in _with_chats(metered) if path in ALL_CHATS else found:
            metered.since_item = 0
            yield item
    except _TooLong:
        yield Unreadable("too_long", f"one item has more than {records.RECORD_BYTES} bytes")
    except (ijson.JSONError, ValueError, RecursionError) as error:
        yield Unreadable("bad_record", str(error)[:200])


def _with_chats(stream: _Metered) -> Iterator[Any]:
    """The items at `ALL_CHATS`; each has under `CHAT` the number and the name of its chat."""
    import ijson

    number = 0
    names: dict[str, Any] = {}

    def events(chat: str) -> Iterator[Any]:
        nonlocal number
        for prefix, event, value in ijson.parse(stream, buf_size=CHUNK_BYTES, use_float=True):
            if (prefix, event) == (chat, "start_map"):
                number += 1
                names.clear()
            elif prefix in (f"{chat}.name", f"{chat}.id"):
                names[prefix.rpartition(".")[2]] = value
            if not prefix.startswith(chat):
                stream.since_item = 0
            yield prefix, event, value

    for path in ALL_CHATS:
        stream.rewind()
        for item in ijson.items(events(path.removesuffix(".messages.item")), path):
            name = str(names.get("name") or names.get("id") or number)
            yield {**item, CHAT: (number, name)} if isinstance(item, dict) else item


def _path_of_array(stream: _Metered, options: ReadOptions) -> str | None:
    """ijson's path of the items: ``item``, or ``messages.item`` for an array below a key."""
    import ijson

    for prefix, event, value in ijson.parse(stream, buf_size=CHUNK_BYTES, use_float=True):
        if prefix == "" and event == "start_array":
            return "item"
        stream.since_item = 0
        is_below_a_key = prefix.endswith(".item") and prefix.count(".") == 1
        is_below_a_key |= prefix in ALL_CHATS
        names = (options.text_column, *(BODIES if options.format != "text" else ()), *ROW_KEYS)
        if is_below_a_key and event == "map_key" and value in names:
            return prefix
    return None
