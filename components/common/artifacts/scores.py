"""The scores artifact: every document's score under every model, as one Parquet file.

Format nudge.scores, version 1: one row per document and model. It is enough to recompute the
verdict's difference and interval without a model: sum the ``nats`` of the candidate minus those of
the other model on the same ``document``, divide by the sum of ``bytes``, and by ln 2.

| column | type | what |
|---|---|---|
| set | string | ``held-out``, or the name of a guard |
| document | int32 | its position in the set, from 0 |
| id | string | the document's id in the corpus |
| source | string | the URI that it was read from |
| model | string | base, incumbent or candidate |
| nats | float64 | minus ln P of its scored tokens, summed |
| tokens | int64 | tokens scored |
| bytes | int64 | of the text, in UTF-8 |
| words | int64 | runs of characters that are not white space; 0 in scripts without spaces |

The schema's metadata has ``nudge.format`` and ``nudge.version``. The evaluation's JSON has the
file's sha256 and number of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from nudge.components.common.artifacts.corpus import Document
from nudge.components.common.artifacts.evaluation import ScoresFile
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file, verify_file, write_atomic

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


@dataclass(frozen=True)
class Score:
    """One document: nats of its tokens under a model, and its tokens, UTF-8 bytes and words."""

    nats: float
    tokens: int
    bytes: int
    words: int


def write_scores(
    path: Path,
    documents: Mapping[str, Sequence[Document]],
    scores: Mapping[str, Mapping[str, Sequence[Score]]],
) -> ScoresFile:
    """Write the file; ``scores`` are by set, then by model. Returns its entry in the evaluation."""
    rows = [
        {
            "set": name,
            "document": position,
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
        for position, (document, score) in enumerate(zip(documents[name], of_set, strict=True))
    ]
    file = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), file, compression="zstd")
    write_atomic(path, file.getvalue().to_pybytes())
    return ScoresFile(format=FORMAT, version=VERSION, rows=len(rows), sha256=sha256_file(path))


def read_scores(path: Path, sha256: str = "") -> dict[str, dict[str, list[Score]]]:
    """Scores by set, then by model, in the order of the documents.

    Columns and metadata that a later release of the same version added are ignored. Raises
    `UserError` if the file is not of this format, or if its sha256 is not the expected one.
    """
    if sha256:
        verify_file(path, sha256)
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is not a {FORMAT} file: {error}") from None
    metadata = table.schema.metadata or {}
    expected = {key: metadata.get(key) for key in SCHEMA.metadata}
    if expected != SCHEMA.metadata or not set(SCHEMA.names) <= set(table.column_names):
        raise UserError(
            f"{path} is not a {FORMAT} file of version {VERSION}: it has the columns "
            f"{', '.join(table.column_names)}"
        )
    found: dict[str, dict[str, list[Score]]] = {}
    for row in table.to_pylist():
        of_model = found.setdefault(row["set"], {}).setdefault(row["model"], [])
        of_model.append(Score(row["nats"], row["tokens"], row["bytes"], row["words"]))
    return found
