"""Every document's score under every model, as one Parquet file: nudge.scores, version 1.

One row a document and model. Interval and difference of the verdict can be worked out from it again
without a model: a document's ``nats`` less those of the same ``document`` under another model, in
sums over a set, divided by the sum of ``bytes``, and by ln 2.

| column | type | what |
|---|---|---|
| set | string | ``held-out``, or the name of a guard |
| document | int32 | the place in its set, from 0 |
| id | string | the document's id in the corpus |
| source | string | the URI that it was read from |
| model | string | base, incumbent or candidate |
| nats | float64 | minus ln P of its scored tokens, summed |
| tokens | int64 | tokens scored |
| bytes | int64 | of the text, in UTF-8 |
| words | int64 | runs of characters that are not white space |

The schema's metadata holds ``nudge.format`` and ``nudge.version``; the evaluation's JSON the file's
sha256 and rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from nudge.components.common.artifacts.corpus import Document
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file, verify_file, write_atomic
from nudge.components.evaluate.perplexity import Score

FORMAT, VERSION = "nudge.scores", 1
SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("document", pa.int32()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("nats", pa.float64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("words", pa.int64()),
    ],
    metadata={"nudge.format": FORMAT, "nudge.version": str(VERSION)},
)


def write_scores(
    path: Path,
    documents: Mapping[str, Sequence[Document]],
    scores: Mapping[str, Mapping[str, Sequence[Score]]],
) -> dict[str, Any]:
    """Write the file; ``scores`` are by set, then by model. Returns what the evaluation says of it:
    format, version, rows and sha256."""
    rows = [
        {
            "set": name,
            "document": place,
            "id": document.id,
            "source": document.source,
            "model": model,
            "nats": score.nats,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "words": score.words,
        }
        for name, of_models in scores.items()
        for model, of_set in of_models.items()
        for place, (document, score) in enumerate(zip(documents[name], of_set, strict=True))
    ]
    file = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")
    write_atomic(path, file.getvalue().to_pybytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        "rows": len(rows),
        "sha256": sha256_file(path),
    }


def read_scores(path: Path, sha256: str = "") -> dict[str, dict[str, list[Score]]]:
    """Scores by set, then by model, in the order of the documents.

    Raises `UserError` if the file is none of this format, or has not the sha256 that is given.
    """
    if sha256:
        verify_file(path, sha256)
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is no {FORMAT} file: {error}") from None
    if not table.schema.equals(SCHEMA, check_metadata=True):
        raise UserError(f"{path} is no {FORMAT} file of version {VERSION}: {table.schema.names}")
    found: dict[str, dict[str, list[Score]]] = {}
    for row in table.to_pylist():
        of_model = found.setdefault(row["set"], {}).setdefault(row["model"], [])
        of_model.append(Score(row["nats"], row["tokens"], row["bytes"], row["words"]))
    return found
