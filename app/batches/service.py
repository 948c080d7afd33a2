"""Use cases of files and batches."""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping

from app.batches.lines import ENDPOINT
from app.batches.runner import BatchRunner
from app.domain import Page
from app.errors import InvalidRequest, NotFound, TooManyBatches
from app.stores.batch_base import BatchInfo, FileInfo
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.stores.threads import StoreThreads

WINDOW = "24h"
PURPOSE = "batch"


class Batches:
    """Everything callers do to files and batches. Coroutines run on one event loop; the store in threads."""

    def __init__(
        self,
        store: SqlBatchStore,
        files: SqlFileStore,
        threads: StoreThreads,
        runner: BatchRunner,
        *,
        max_unfinished: int,
    ) -> None:
        """`max_unfinished`: batches of one namespace."""
        self._store = store
        self._files = files
        self._threads = threads
        self._runner = runner
        self._max_unfinished = max_unfinished

    async def upload(
        self, namespace: str, filename: str, purpose: str, content: Iterable[bytes], seconds: int | None
    ) -> FileInfo:
        """`seconds`: that it is kept; None: for ever. Raises InvalidRequest, and what reading the content raises."""
        check_purpose(purpose)
        return await self._threads.write(self._files.add, namespace, filename, purpose, content, seconds=seconds)

    async def file(self, namespace: str, file_id: str) -> FileInfo:
        """Raises NotFound."""
        found = await self._threads.read(self._files.get, namespace, file_id)
        if found is None:
            raise _no_file(file_id)
        return found

    async def content(self, namespace: str, file_id: str) -> tuple[FileInfo, Iterator[bytes]]:
        """Raises NotFound."""
        info = await self.file(namespace, file_id)
        return info, self._files.chunks(info.id)

    async def files(
        self, namespace: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Page[FileInfo]:
        found = await self._threads.read(
            self._files.list, namespace, purpose=purpose, after=after, limit=limit, newest_first=newest_first
        )
        if found is None:
            raise _nothing_there("file", after)
        return found

    async def delete_file(self, namespace: str, file_id: str) -> None:
        """Raises NotFound, InvalidRequest."""
        deleted = await self._threads.write(self._files.delete, namespace, file_id)
        if deleted is None:
            raise _no_file(file_id)
        if deleted is False:
            raise InvalidRequest(
                f"The file {file_id} is the input of a batch that is not finished. Cancel that batch first.", param="id"
            )

    async def create(
        self,
        namespace: str,
        input_file_id: str,
        endpoint: str,
        window: str,
        metadata: Mapping[str, str],
        *,
        output_seconds: int | None,
    ) -> BatchInfo:
        """A batch, accepted and durable; its input is looked at behind. `output_seconds`: that its output files are
        kept. Raises InvalidRequest, TooManyBatches."""
        if endpoint != ENDPOINT:
            raise InvalidRequest(f"Invalid 'endpoint': this server runs batches of {ENDPOINT}.", param="endpoint")
        if window != WINDOW:
            raise InvalidRequest(f"Invalid 'completion_window': it is '{WINDOW}'.", param="completion_window")
        found = await self._threads.read(self._files.get, namespace, input_file_id)
        if found is None:
            raise _no_input(input_file_id)
        if found.purpose != PURPOSE:
            raise InvalidRequest(
                f"Invalid 'input_file_id': the file's purpose is {found.purpose}, not {PURPOSE}.", param="input_file_id"
            )
        if await self._threads.read(self._store.unfinished, namespace) >= self._max_unfinished:
            raise TooManyBatches(
                f"{self._max_unfinished} batches are not finished, and this server takes no more of one namespace. "
                f"Please try again when one is, or put more lines into one batch.",
                retry_after=60,
            )
        batch = BatchInfo(
            f"batch_{uuid.uuid4().hex}",
            namespace,
            endpoint,
            input_file_id,
            window,
            int(time.time()),
            metadata=metadata,
            output_seconds=output_seconds,
        )
        if not await self._threads.write(self._store.add, batch):  # deleted since
            raise _no_input(input_file_id)
        self._runner.wake()
        return batch

    async def get(self, namespace: str, batch_id: str) -> BatchInfo:
        """Raises NotFound."""
        found = await self._threads.read(self._store.get, namespace, batch_id)
        if found is None:
            raise _no_batch(batch_id)
        return found

    async def list(self, namespace: str, *, after: str | None, limit: int) -> Page[BatchInfo]:
        found = await self._threads.read(self._store.list, namespace, after=after, limit=limit)
        if found is None:
            raise _nothing_there("batch", after)
        return found

    async def cancel(self, namespace: str, batch_id: str) -> BatchInfo:
        """Raises NotFound; InvalidRequest for one that is finished."""
        found = await self._threads.write(self._store.cancel, namespace, batch_id)
        if found is None:
            raise _no_batch(batch_id)
        if found.status not in ("cancelling", "cancelled"):
            raise InvalidRequest(f"Cannot cancel a batch with status '{found.status}'.", param="id")
        self._runner.wake()
        return found


def check_purpose(purpose: str) -> None:
    if purpose != PURPOSE:
        raise InvalidRequest(f"Invalid 'purpose': this server takes files for batches, '{PURPOSE}'.", param="purpose")


def _nothing_there(what: str, after: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid 'after': there is no {what} '{str(after)[:80]}'. Send the last_id of the page before.", param="after"
    )


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"No such File object: {file_id[:80]}", param="id")


def _no_input(file_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid 'input_file_id': no such file {file_id[:80]}. POST /v1/files takes it first.", param="input_file_id"
    )


def _no_batch(batch_id: str) -> NotFound:
    return NotFound(f"No batch found with id '{batch_id[:80]}'.", param="id")
