"""Tokenizing with Ray Data: each shard of the corpus is one task, on any node of a Ray cluster.

This process reads and writes the files one shard at a time, and Ray's object store transports them.
So the nodes need no shared disk; their image only has to contain nudge.
"""

import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from nudge.components.common.artifacts.corpus import read_lines
from nudge.components.common.artifacts.tokens import ShardWriter
from nudge.components.common.clients.ray_cluster import joined_ray
from nudge.components.common.core.publish import verify_file
from nudge.components.tokenize.chats import Account
from nudge.components.tokenize.encode import BLOCK_BYTES, Encoding, encode

if TYPE_CHECKING:
    from nudge.components.tokenize.tokenize import Shard


def write_on_ray(
    shards: "list[Shard]", encoding: Encoding, address: str, processes: int, bar: Any
) -> None:
    """Write the file of every shard, with the same bytes as without Ray.

    ``address`` and ``processes`` are passed to `joined_ray`, which documents the errors.
    """
    import pyarrow

    with joined_ray("tokenize", address, processes) as ray:
        tables = []
        for number, shard in enumerate(shards):
            verify_file(shard.corpus, shard.sha256)
            row = {"number": number, "corpus": shard.corpus.read_bytes()}
            tables.append(ray.put(pyarrow.Table.from_pylist([row])))
        dataset = ray.data.from_arrow_refs(tables)
        made = dataset.map(_encode_shard, fn_kwargs={"encoding": encoding}, num_cpus=1)
        done = 0
        for row in made.iter_rows():
            shard = shards[row["number"]]
            shard.tokens.write_bytes(row["shard"])
            shard.account.add(pickle.loads(row["account"]))
            done += row["tokens"]
            bar.advance(row["records"], tokens=done)


def _encode_shard(row: dict[str, Any], encoding: Encoding) -> dict[str, Any]:
    made = io.BytesIO()
    writer, account = ShardWriter(made, np.dtype(encoding.dtype)), Account()
    for lines in read_lines(io.BytesIO(row["corpus"]), BLOCK_BYTES):
        part = encode(lines, encoding)
        part.append_to(writer)
        account.add(part.account)
    _, tokens = writer.finish()
    return {
        "number": row["number"],
        "shard": made.getvalue(),
        "records": writer.records,
        "account": pickle.dumps(account),
        "tokens": tokens,
    }
