"""The settings of the step `ingest`."""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from nudge.components.common.clients.registry.connection import RegistryUrl
from nudge.components.common.clients.registry.names import OptionalRegistryName
from nudge.components.common.core.errors import nearest
from nudge.components.common.core.settings import settings

if TYPE_CHECKING:
    from nudge.components.common.readers import ReadOptions

FILTERS = ("unicode", "length", "repetition", "language", "pii")
FILTER_GROUP = "nudge.filters"
"""Packages add filters with entry points of this group: its value is a function of the settings
that returns a function of a text, which returns a text or an `Unreadable` with the reason."""


@settings
class IngestSettings:
    data_uri: str | tuple[str, ...]
    """Where the text is: a path, URI or glob, or a list of them. In a text, several stand apart by
    lines or blanks; a name with blanks is one if it exists, or in quotation marks."""
    max_download_bytes: Annotated[int, Field(ge=1)] = 16 << 30
    """The largest file that is downloaded from an http:// or https:// address."""
    allow_private_addresses: bool = False
    """Whether a download may be redirected to this machine or to a private network. The host that
    `data_uri` names may be private either way."""
    text_column: str = "text"
    """The column or key that holds the text, in csv, jsonl and parquet."""
    id_column: str = "id"
    """The column or key that names a document; where it is missing, its place names it."""
    license_column: str = ""
    """The column or key that holds a document's licence; empty: none is kept."""
    source_column: str = ""
    """The column or key that says where a document is from (kept as its ``origin``); empty: none
    is kept. The file it was read from is always kept."""
    encoding: str = ""
    """The encoding of text files and tables, such as windows-1252; empty: UTF-8, else what the file
    declares, else what is detected (and reported)."""
    delimiter: Annotated[str, Field(max_length=1)] = ""
    """The delimiter of .csv files; empty: the one of comma, semicolon, tab and bar under which the
    first row names the text column."""
    keep_front_matter: bool = False
    """Whether the YAML front matter of Markdown files stays in their text."""
    min_characters: Annotated[int, Field(ge=1)] = 20
    max_characters: Annotated[int, Field(ge=1)] = 10_000_000
    split_characters: Annotated[int, Field(ge=0)] = 0
    """Longer texts become several documents of at most this many characters, cut between
    paragraphs; each is trained on or held out. 0: only if there would otherwise be too few
    documents to hold any out, as of a single book; then 4000."""
    max_lost: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The largest share of documents, or of their bytes, that may be dropped for any reason other
    than duplication; with more the run stops and shows what was lost. Hidden files and files that
    hold no text, such as images, do not count."""
    filters: tuple[str, ...] = ("unicode", "length")
    """What each text goes through, in this order, out of unicode, length, repetition, language, pii
    and those of installed packages; a drop is counted under the filter's reason."""
    languages: tuple[str, ...] = ()
    """The languages that the filter ``language`` keeps, as ISO 639-1 codes."""
    pii: Literal["replace", "drop"] | None = None
    """Whether the filter ``pii`` masks personal data (as it does if nothing is said) or drops the
    document that holds some."""
    near_duplicates: bool = True
    """Whether near duplicates are dropped as well as exact ones."""
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Of the documents, how many are held out; with more, some that were trained on are."""
    split_seed: int = 1
    """Keys the hash of a document's text, which decides its split; the recipe's ``seed`` does not.
    With another one, what was trained on may be held out: leave it while models train on."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that clean; 0 means one for each core. The result is the same with any number."""
    engine: Literal["local", "ray"] = "local"
    """Who reads and cleans: processes of this machine, or Ray Data, the objects spread over the
    nodes of a cluster. It never changes the result. The train image has Ray: compile with
    NUDGE_DATA_IMAGE naming it."""
    ray_address: str = ""
    """For `ray`: the cluster to join, such as auto; empty: what RAY_ADDRESS names, else a Ray of
    this machine alone, with `workers` cores."""
    state_uri: str = ""
    """A folder (a path, file:// or s3://) of this step's own, where it keeps what it read: the next
    run reads only objects that are new or changed. Empty: each run reads everything."""
    only_new: bool = False
    """Whether a run ends here, before anything is trained, if the served version of `model_name`
    was trained on the very same corpus."""
    model_name: OptionalRegistryName = ""
    registry_url: RegistryUrl = ""
    """Asked if `only_new`; empty means NUDGE_REGISTRY_URL."""

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
        )

    @model_validator(mode="after")
    def _filters_are_named(self) -> "IngestSettings":
        added = {point.name for point in entry_points(group=FILTER_GROUP)}
        for name in self.filters:
            if name not in FILTERS and name not in added:
                raise ValueError(
                    f"there is no filter {name!r}; {nearest(name, {*FILTERS, *added})}"
                )
        for setting, name in (("pii", "pii"), ("languages", "language")):
            if getattr(self, setting) and name not in self.filters:
                filters = ", ".join((*self.filters, name))
                raise ValueError(
                    f"{setting} is given, but the filter {name!r} is not named and would not run; "
                    f"set filters: [{filters}]"
                )
        return self
