"""Large training files that one process has prepared: the others map its dataset into memory, and read no row."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.collectives import any_rank, broadcast_from_main, world_size
from ema_scale.core.errors import UserError
from ema_scale.core.io import atomic_write_json, file_lock
from ema_scale.core.records import DataReport, TrainedQuestions
from ema_scale.data import rows as rows_module
from ema_scale.data.rows import RowSource
from ema_scale.data.templates import ChatTemplate
from ema_scale.data.token_store import LONGEST_WAIT, TokenStore
from ema_scale.data.token_tables import DatasetFile
from ema_scale.data.tokens import Tokenized
from ema_scale.defenses.row_groups import RowGroups

log = logging.getLogger(__name__)
LARGE_FILES = 50_000_000  # bytes, from which on preparing takes longer than looking whether it is done


class PreparedRows:
    """What `prepare_data` makes of one source, kept in the token cache: which dataset file, and the report.

    It is known by everything that decides it. What defenses do to rows cannot be known beforehand: where one changes
    them, only the processes of this run share the result. Making this object is a collective then.

    Args:
        hashes: file -> sha256 of what defenses read besides rows.
        options: of `tokenize_rows`.
    """

    def __init__(
        self,
        source: RowSource,
        row_groups: RowGroups,
        hashes: Mapping[str, str],
        tokenizer: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._for_this_run = any(defense.changes_rows for defense in row_groups.defenses)
        self._shared = not self._for_this_run or world_size() > 1
        source.hash_files()
        template = ChatTemplate(tokenizer, options["date"])
        store = TokenStore(options["cache"], template, options["max_length"], options["template"])
        self._folder, self._lock = store.datasets, store.root / f".prepared-{store.folder.name}.lock"
        decisive = [
            source.hashes, source.limit, source.on_bad, source.columns, source.learn, options["on_bad"], dict(hashes),
            _code(), broadcast_from_main(secrets.token_hex(16)) if self._for_this_run else "",
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]
        self.path = self._folder / f"{name}.prepared.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the process that prepares; the others wait before they read rows."""
        waited = UserError(f"{self._lock}: another process has been preparing rows for {LONGEST_WAIT // 3600} hours")
        with contextlib.ExitStack() as stack:
            try:
                what = "another process to prepare the same rows"
                stack.enter_context(file_lock(self._lock, waited, LONGEST_WAIT, what))
            except OSError as error:
                log.warning("%s cannot be locked (%s): every process reads all rows", self._lock, error.strerror)
            yield

    def read(self) -> tuple[Any, DataReport] | None:
        """(dataset, report), or None if they are not there or not whole."""
        if not self._shared or not self.path.is_file():
            return None
        try:
            facts = json.loads(self.path.read_bytes())
            questions = TrainedQuestions.model_validate(facts["questions"])
            report = DataReport.model_validate({**facts["report"], "questions": questions})
            found = DatasetFile(self._folder / Path(facts["file"]).name).open()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); the rows are read again", self.path, error)
            return None
        return None if found is None else (found[0], report)

    def write(self, tokenized: Tokenized, report: DataReport) -> None:
        """Keep what was prepared, if its dataset is in a file."""
        if not self._shared or tokenized.file is None:
            return
        assert report.questions is not None
        facts = {
            "file": tokenized.file.name,
            "report": report.model_dump(mode="json"),
            "questions": report.questions.model_dump(mode="json"),
        }
        try:
            atomic_write_json(self.path, facts)
        except OSError as error:
            log.warning("%s cannot be written (%s): every process reads all rows", self.path, error.strerror or error)

    def done(self) -> None:
        """Remove what no other run will find, when all processes have it. A collective then."""
        if self._for_this_run:
            any_rank(False)
            self.path.unlink(missing_ok=True)


@functools.cache
def _code() -> str:
    """Stands for the code that makes rows and their report."""
    files = [*sorted(Path(rows_module.__file__).parent.glob("*.py")), Path(__file__).with_name("data.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
