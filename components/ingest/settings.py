"""The settings of the step `ingest`."""

import codecs
import dataclasses
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from nudge.components.common.clients.registry.names import OptionalRegistryName
from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.core import default_guard
from nudge.components.common.core.errors import nearest
from nudge.components.common.core.recipe import some_settings, step_settings
from nudge.components.common.core.settings import settings

if TYPE_CHECKING:
    from nudge.components.common.readers import ReadOptions

FILTERS = ("unicode", "length", "repetition", "language", "pii")
FILTER_GROUP = "nudge.filters"
"""Packages add filters with entry points of this group: its value is a function of the settings
that returns a function of a text, which returns a text or an `Unreadable` with the reason."""


@settings
class MixedSource:
    name: str
    """A name for reports."""
    data_uri: str | tuple[str, ...]
    """Where its documents are, as in `ingest.data_uri`."""
    weight: Annotated[float, Field(gt=0)]
    """Its share of the documents, relative to the other weights."""


@settings
class IngestSettings:
    data_uri: str | tuple[str, ...] = ""
    """The text's location: a path, URI or glob, or a list of them. In a string, lines or blanks
    separate several; a name with blanks is one if it exists or is in quotation marks."""
    mix: tuple[MixedSource, ...] = ()
    """Several sources and the share of the documents that each gets, in training and in validation,
    instead of `data_uri`. No document is repeated: those that are too many are left out."""
    max_download_bytes: Annotated[int, Field(ge=1)] = 16 << 30
    """The largest file that is downloaded from an http:// or https:// address."""
    allow_private_addresses: bool = False
    """Whether a download may be redirected to this machine or to a private network. The host that
    `data_uri` names may be private either way."""
    format: Literal["auto", "text", "chat"] = "auto"
    """What a row of csv, json, jsonl and parquet is: a text (`text`), a conversation (`chat`), or
    the text if its text column has one, else a conversation (`auto`). A conversation is in
    `messages`, in ShareGPT's `conversations`, or in `prompt` and `completion`, `instruction`,
    `input` and `output`, or `question` and `answer`."""
    text_column: str = "text"
    """The column or key that holds the text, in csv, jsonl and parquet."""
    id_column: str = "id"
    """The column or key that names a document; without it, the row number names it."""
    license_column: str = ""
    """The column or key with a document's license; empty: no license is kept."""
    source_column: str = ""
    """The column or key with a document's origin (kept as ``origin``); empty: no origin is kept.
    The file that a document was read from is always kept."""
    encoding: str = ""
    """The encoding of text files and tables, such as windows-1252; empty: UTF-8, else what the file
    declares, else what is detected (and reported)."""
    delimiter: Annotated[str, Field(max_length=1)] = ""
    """The delimiter of .csv files; empty: comma, semicolon, tab or bar, whichever makes the first
    row contain the text column's name."""
    keep_front_matter: bool = False
    """Whether to keep the YAML front matter of Markdown files in their text."""
    min_characters: Annotated[int, Field(ge=1)] = 20
    """The shortest document that is kept, in characters."""
    max_characters: Annotated[int, Field(ge=1)] = 10_000_000
    """The longest document that is kept, in characters."""
    split_characters: Annotated[int, Field(ge=0)] = 0
    """Longer texts become several documents of at most this many characters, cut between
    paragraphs; each piece is trained on or held out by itself. 0: split only if there would
    otherwise be too few documents to hold any out, as with a single book; then 4000, or less for
    a short one."""
    max_lost: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The largest share of documents, or of their bytes, that may be dropped for any reason other
    than duplication. If more is dropped, the run stops and shows what was lost. Hidden files and
    files without text, such as images, do not count."""
    allow_no_verdict: bool = False
    """Whether a run continues although fewer than 16 documents are held out, which are too few to
    show that a model is better; nothing is promoted then."""
    filters: tuple[str, ...] = ("unicode", "length")
    """The filters that each text passes, in this order: unicode, length, repetition, language, pii,
    and those of installed packages. A drop is counted under the filter's reason."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages that the filter ``language`` keeps."""
    pii: Literal["replace", "drop"] | None = None
    """Whether the filter ``pii`` masks personal data (the default) or drops documents that contain
    any."""
    forget: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Documents to keep out of this run and of every later one, with all near duplicates of them:
    ``sha256:`` and the digits that `nudge trace` prints, ``id:`` and a document's id, or the end of
    a file's path, for all of its documents."""
    near_duplicates: bool = True
    """Whether to drop near duplicates as well as exact ones."""
    keep_out: tuple[str, ...] = ()
    """URIs of texts to keep out of training, such as a test set: a document that shares 13
    consecutive words with one is held out or left out, and counted. A recipe adds its guards."""
    keep_out_texts: tuple[str, ...] = ()
    """More such texts. A recipe adds its probes that should hold."""
    compare_with_evaluation: bool = True
    """Whether a recipe adds its guards and probes to `keep_out`."""
    repeated_prompts: Literal["keep", "drop_equal", "drop"] = "drop"
    """Whether one of several conversations with the same user side and different answers is kept:
    `drop` also compares near duplicates, `drop_equal` ignores only case and punctuation. Set `keep`
    if several answers to one prompt are meant, or if prompts share a long template."""
    max_conversation_characters: Annotated[int, Field(ge=0)] = 0
    """The longest conversation in characters; 0: `max_characters`. The step `tokenize` has its own
    limit in tokens."""
    too_long: Literal["drop", "keep_first", "keep_last"] = "drop"
    """What happens to a longer conversation: it is dropped and counted, or turns are cut from its
    end (`keep_first`) or its beginning (`keep_last`). The system turn stays, and no turn is cut."""
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Fraction of documents held out. Raising it later moves documents that earlier models were
    trained on into validation."""
    split_seed: int = 1
    """Key of the hash that decides a document's split; the recipe's ``seed`` has no influence on
    it. Changing it moves documents that earlier models were trained on into validation, so keep it
    while models continue from earlier ones."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that clean; 0 means one per core. The number never changes the result."""
    engine: Literal["local", "ray"] = "local"
    """What reads and cleans: processes of this machine, or Ray Data, which spreads the objects over
    the nodes of a cluster. It never changes the result. The train image has Ray: to use it, compile
    with NUDGE_DATA_IMAGE set to that image."""
    ray_address: str = ""
    """For `ray`: the cluster to join, such as auto; empty: RAY_ADDRESS, or else a Ray on this
    machine only, with `workers` cores."""
    state_uri: str = ""
    """A folder (a path, file:// or s3://) for this step alone, where it keeps what it read, so that
    the next run reads only new and changed objects. Empty: each run reads everything."""
    only_new: bool = False
    """Whether a run ends after this step if the served version of `model_name` was trained on
    exactly this corpus."""
    model_name: OptionalRegistryName = ""
    """The registered model whose served version `only_new` asks about."""
    registry_url: RegistryUrl = ""
    """The registry that `only_new` asks; empty means NUDGE_REGISTRY_URL."""

    @property
    def where(self) -> str:
        """The locations of the text, for messages."""
        uris = [part.data_uri for part in self.mix] or [self.data_uri]
        return ", ".join(uri if isinstance(uri, str) else " ".join(uri) for uri in uris)

    @property
    def reading(self) -> "ReadOptions":
        """How files are read."""
        from nudge.components.common.readers import ReadOptions

        return ReadOptions(
            text_column=self.text_column,
            id_column=self.id_column,
            license_column=self.license_column,
            source_column=self.source_column,
            encoding=self.encoding,
            delimiter=self.delimiter,
            keep_front_matter=self.keep_front_matter,
            format=self.format,
        )

    @model_validator(mode="after")
    def _tables_can_be_read(self) -> "IngestSettings":
        if not _is_encoding(self.encoding or "utf-8"):
            raise ValueError(
                f"encoding = {self.encoding!r} is not a text encoding that Python knows; use one "
                "such as utf-8, windows-1252 or utf-16"
            )
        if self.delimiter in ("\n", "\r", '"', "\0"):
            raise ValueError(
                f"delimiter = {self.delimiter!r} cannot separate columns; use a character such as "
                "a comma, a semicolon or a tab"
            )
        return self

    @model_validator(mode="after")
    def _sources_are_named(self) -> "IngestSettings":
        if bool(self.data_uri) == bool(self.mix):
            both = "both are set" if self.mix else "neither is set"
            raise ValueError(f"set either data_uri or mix; {both}")
        names = [part.name for part in self.mix]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mix has the name {twice[0]!r} twice; give each source its own")
        return self

    @model_validator(mode="after")
    def _filters_are_named(self) -> "IngestSettings":
        added = {point.name for point in entry_points(group=FILTER_GROUP)}
        for name in self.filters:
            if name not in FILTERS and name not in added:
                raise ValueError(
                    f"filters: there is no filter {name!r}; {nearest(name, {*FILTERS, *added})}"
                )
        for setting, name in (("pii", "pii"), ("languages", "language")):
            if getattr(self, setting) and name not in self.filters:
                filters = ", ".join((*self.filters, name))
                raise ValueError(
                    f"{setting} is set, but filters does not contain {name!r}, so it would have no "
                    f"effect; set filters: [{filters}]"
                )
        return self


def _is_encoding(name: str) -> bool:
    """Whether Python knows this text encoding; rot13 and base64 are codecs, but not of text."""
    try:
        codecs.lookup(name)
        b"a".decode(name)
    except UnicodeError:
        return True
    except (LookupError, ValueError):
        return False
    return True


@settings
class Evaluated:
    """The texts of a recipe's section `evaluate`."""

    guards: list[dict[str, Any]] | None = None
    probes: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def ingest_settings(recipe: str, **overrides: Any) -> IngestSettings:
    """The settings in a recipe's text; the texts of its evaluation are kept out of training.

    A probe that should rise is not: the text is there to teach it. ``overrides`` and errors are
    those of `step_settings`.
    """
    chosen = step_settings(IngestSettings, "ingest", recipe, **overrides)
    if not chosen.compare_with_evaluation:
        return chosen
    evaluated = some_settings(Evaluated, "evaluate", recipe)
    if evaluated.guards is None:
        uris = [default_guard.URI]
    else:
        uris = [str(guard.get("uri", "")) for guard in evaluated.guards]
    texts = [
        f"{probe.get('prompt', '')}{probe.get('target', '')}"
        for probe in evaluated.probes
        if probe.get("expect") == "hold"
    ]
    return dataclasses.replace(
        chosen,
        keep_out=tuple(dict.fromkeys((*chosen.keep_out, *filter(None, uris)))),
        keep_out_texts=(*chosen.keep_out_texts, *texts),
    )
