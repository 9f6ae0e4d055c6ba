"""The rows and the files of images together: no row loses its file, no file outlives its rows.

A message's files are stored before its row, and several messages may share one file. So a file can lose its last row
while another message that wants it is on its way. Both sides look twice: whoever deletes sets the file aside first and
then asks for rows; whoever stores a row looks at the file again afterwards (:meth:`ImageArchive.keep`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from serve_app.domain.errors import RotundaError
from serve_app.store.files import Images
from serve_app.store.images import ImageFiles

logger = logging.getLogger(__name__)

SWEEP_S = 600.0
COLLECT_EVERY = 36
"""A look through all files with each so many sweeps; it finds what interrupted requests have left."""
UNCLAIMED_S = 3600.0
"""A file without a row is left alone for so long: its message may be on its way."""
_AT_ONCE = 500


class ImageArchive:
    """Deletes image files when it is their time.

    Args:
        rows: the store's part that knows the images.
        files: where they are.
        clock: the time in UTC.
    """

    def __init__(self, rows: Images, files: ImageFiles, clock: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self._rows = rows
        self._files = files
        self._clock = clock

    def __repr__(self) -> str:
        return f"ImageArchive({self._files!r})"

    async def keep(self, images: Iterable[tuple[bytes, str]]) -> None:
        """Store files (bytes and type) that have gone while their rows were on the way; nothing when they are there."""
        for data, mime_type in images:
            await self._files.save(data, mime_type)

    async def drop(self, file_paths: Sequence[str]) -> int:
        """Delete the files that no row refers to; returns how many went."""
        deleted = 0
        for start in range(0, len(file_paths), _AT_ONCE):
            deleted += await self._drop(file_paths[start : start + _AT_ONCE])
        return deleted

    async def expire(self) -> int:
        """Take the images whose time is over out of their messages, and delete their files; returns how many files."""
        return await self.drop(await self._rows.expire_images(self._clock()))

    async def collect(self, unclaimed_s: float = UNCLAIMED_S) -> int:
        """Delete the files without rows that nobody has claimed for so long; returns how many."""
        return await self.drop(await self._files.older_than(unclaimed_s))

    async def run(self, every_s: float = SWEEP_S) -> None:
        """Expire and collect for ever, at uneven times, so that the servers of a cluster do not do it all at once."""
        rounds = random.randrange(COLLECT_EVERY)
        while True:
            await asyncio.sleep(every_s * random.uniform(0.5, 1.5))
            rounds += 1
            try:
                gone = await self.expire()
                if rounds % COLLECT_EVERY == 0:
                    gone += await self.collect()
            except (RotundaError, OSError) as error:
                logger.warning("the images could not be looked through: %s", error)
                continue
            if gone:
                logger.info("deleted %d image files that nothing refers to any more", gone)

    async def _drop(self, file_paths: Sequence[str]) -> int:
        # Only what seems to be free is set aside: readers would miss the others.
        aside = await self._files.set_aside(await self._rows.unreferenced_files(file_paths))
        if not aside:
            return 0
        try:
            loose = set(await self._rows.unreferenced_files(aside))
        except BaseException:
            await self._files.put_back(aside)
            raise
        await self._files.put_back([path for path in aside if path not in loose])
        await self._files.delete_aside([path for path in aside if path in loose])
        return len(loose)
