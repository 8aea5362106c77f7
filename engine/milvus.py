"""The vectors of a large library in a Milvus server, one a clip. Nothing else imports pymilvus."""

import logging
import time
import urllib.parse
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from jaxtyping import Float

from engine.files import DataError, first_line, printable

CLIPS = "tmass_clips"
NEAREST = 16_384  # rows that a vector search returns, at most
LONGEST = 65_535  # characters of a field, at most
HERE = ("localhost", "127.0.0.1", "::1")  # host names of this machine
DIRECT = {"grpc.enable_http_proxy": 0, "grpc.keepalive_time_ms": 300_000}  # milvus-lite refuses shorter times


class Milvus:
    """The collection tmass_clips of a server: id, file, start, end (-1: the end of the file) and vector.

    where: http://host:19530 (/database). Raises DataError if no server answers there, or if an older version
    has written the collection."""

    def __init__(self, where: str):
        self._milvus, self.where = _import_pymilvus(), where
        try:
            here = urllib.parse.urlsplit(where).hostname in HERE
            self.client = self._milvus.MilvusClient(where, **({"grpc_options": DIRECT} if here else {}))
            if self._ready():
                self.client.load_collection(CLIPS)
        except (self._milvus.MilvusException, ValueError) as error:
            reason = first_line(Exception(getattr(error, "message", error)))
            raise DataError(f"{where} cannot be opened: no Milvus server answers there ({reason}).") from None

    def _ready(self) -> bool:
        """Whether the collection has its index; a killed process may leave one without."""
        return self.client.has_collection(CLIPS) and bool(self.client.list_indexes(CLIPS))

    def create(self, dim: int) -> None:
        """Creates the collection if it is not there. Several processes may do so at once."""
        for attempt in range(10):
            try:
                if not self._ready():
                    self._create(dim)
                self.client.load_collection(CLIPS)
                break
            except self._milvus.MilvusException:  # another process creates it now
                if attempt == 9:
                    raise
                time.sleep(0.2)
        if "content" in {one["name"] for one in self.client.describe_collection(CLIPS)["fields"]}:
            advice = "name another database, as in http://host:19530/mine, and index again"
            raise DataError(f"{self.where} holds a library of an older version: {advice}.")

    def _create(self, dim: int) -> None:
        types = self._milvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", types.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("file", types.VARCHAR, max_length=LONGEST)
        schema.add_field("start", types.DOUBLE)
        schema.add_field("end", types.DOUBLE)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        if not self.client.has_collection(CLIPS):
            self.client.create_collection(CLIPS, schema=schema, consistency_level="Strong")
        self.client.create_index(CLIPS, index, sync=False)  # the collection is still empty

    @property
    def name(self) -> str:
        """The address and the number of the collection: another one if it was created anew."""
        return f"{self.where} {self.client.describe_collection(CLIPS).get('collection_id')}"

    def upsert(self, clips: Sequence[dict]) -> None:
        """Writes clips, {"id", "file", "start", "end", "vector"}, and replaces those of the same id."""
        rows = [{**clip, "end": -1.0 if clip["end"] is None else clip["end"]} for clip in clips]
        for row in rows:
            row["file"] = printable(row["file"])[: LONGEST // 4]  # a name may hold bytes that are not UTF-8
        for first in range(0, len(rows), 1000):
            self.client.upsert(CLIPS, rows[first : first + 1000])

    def remove(self, key: str) -> None:
        """Removes the clips of a file; key: the first part of their ids."""
        self.client.delete(CLIPS, filter=f'id like "{key}-%"')

    def nearest(self, text: Float[np.ndarray, " dim"], count: int) -> list[str]:
        """The ids of the clips whose vectors have the largest cosine with a text, largest first."""
        count = min(count, NEAREST)
        how = {"metric_type": "COSINE", "params": {"ef": count}}
        found = self.client.search(CLIPS, data=[text], limit=count, output_fields=["id"], search_params=how)
        return [hit["id"] for hit in found[0]]

    def count(self) -> int:
        """The number of clips."""
        return self.client.query(CLIPS, filter="", output_fields=["count(*)"])[0]["count(*)"]


def _import_pymilvus() -> ModuleType:
    try:
        import pymilvus
    except ImportError as error:
        raise DataError(f"{error.name} is not installed: pip install -r requirements-search.txt.") from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises
    return pymilvus
