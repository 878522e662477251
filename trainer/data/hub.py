"""A dataset of the Hugging Face hub, or a local folder laid out like one, through the `datasets` library."""

from collections.abc import Iterator
from typing import Any

from backends.errors import UserError
from trainer.data.documents import Document, fingerprint
from trainer.data.formats import first_line


class HubSource:
    """Documents of one split, in its order; a document is named by its index. Empty texts are passed over.

    Args:
        name: the dataset's name, or a local folder.
        subset: its configuration, or None for the only one.
        split: the split to read.
        field: the column that holds the text.
        streaming: read rows over the network as they come; otherwise the split is downloaded at the first use,
            into the library's own cache (HF_HOME).
        where, key: the config file and the key that chose the split, for messages.

    Raises:
        UserError: if the dataset, its configuration or its split cannot be found or reached.
    """

    def __init__(
        self, name: str, subset: str | None, split: str, field: str, streaming: bool, where: str, key: str
    ) -> None:
        import datasets  # here, because it takes seconds to import and only this source needs it

        self.name, self.split, self.field, self.streaming, self.where, self.key = (
            name,
            split,
            field,
            streaming,
            where,
            key,
        )
        try:
            self._builder = datasets.load_dataset_builder(name, name=subset)
        except Exception as error:  # the library raises a dozen kinds, some of them plain ValueErrors
            place = "data.hub_subset" if "BuilderConfig" in str(error) or "Config name" in str(error) else "data.paths"
            raise UserError(
                f"{where}: {place}: cannot open the hub dataset {name!r} ({first_line(error)}); check the name and the "
                "connection, or use local files"
            ) from error

    def identity(self) -> str:
        """From the revision of the dataset, or the times of change of a local folder's files."""
        builder = self._builder
        return fingerprint("hub", self.name, builder.config_id, builder.hash, self.split, self.field)

    def signature(self) -> str:
        """The same as :meth:`identity`: a revision means the same everywhere."""
        return self.identity()

    def open(self, state: dict[str, Any] | None = None) -> "HubStream":
        """Raises UserError for an unknown split and, while it is read, for a missing column or a broken connection."""
        try:
            if self.streaming:
                rows = self._builder.as_streaming_dataset(split=self.split)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=self.split).to_iterable_dataset()
        except Exception as error:
            place = self.key if "split" in str(error) else "data.paths"
            raise UserError(
                f"{self.where}: {place}: cannot read split {self.split!r} of the hub dataset {self.name!r} "
                f"({first_line(error)}); choose another split or check the connection"
            ) from error
        return HubStream(self, rows, state)


class HubStream:
    """A walk over a :class:`HubSource`; the library finds a resumed one's place, shard by shard."""

    def __init__(self, source: HubSource, rows: Any, state: dict[str, Any] | None) -> None:
        self._source, self._rows, self._index = source, rows, 0
        self._unread = state  # the library tells a loaded place only after a row was read from it
        if state is not None:
            self._index = state["index"]
            rows.load_state_dict(state["rows"])
        self._iterator = iter(rows)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            text = self._next_text()
            self._index += 1
            if text:
                return Document(str(self._index - 1), text)

    def _next_text(self) -> str:
        source = self._source
        dataset = f"row {self._index} of the hub dataset {source.name!r}"
        try:
            row = next(self._iterator)
            self._unread = None
        except StopIteration:
            raise
        except Exception as error:
            raise UserError(
                f"{source.where}: data.paths: reading {dataset} failed ({first_line(error)}); check the connection and "
                "run again"
            ) from error
        if source.field not in row:
            raise UserError(
                f"{source.where}: data.text_field: the hub dataset {source.name!r} has no column {source.field!r} "
                f"(columns: {', '.join(row)}); set it to one of them"
            )
        text = row[source.field]
        if not isinstance(text, str):
            raise UserError(
                f"{source.where}: data.text_field: {source.field!r} holds {type(text).__name__}, not a string, in "
                f"{dataset}; set it to a text column"
            )
        return text

    def state_dict(self) -> dict[str, Any]:
        if self._unread is not None:
            return self._unread
        return {"index": self._index, "rows": self._rows.state_dict()}
