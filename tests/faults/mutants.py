"""Mutants: the engine with one guard removed. For each the tests must fail; which ones, it says.

A mutant is a piece of source that must be there exactly once, and what takes its place. Where the
source has moved on and the piece is not there, or there twice, the run fails loudly: then the
mutant has to follow the source. Each runs in a copy of the tree of its own.

``python -m tests.faults mutants`` runs all of them; with ``--only WORD`` those whose name contains
a word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from tests.faults.kernel import why_not

ROOT: Final = Path(__file__).parents[2]
_COPIED: Final = ("persistence", "tests", "config", "docs", "examples", "pyproject.toml")
_TIMEOUT_SECONDS: Final = 1800.0
_NOT_DECIDED: Final = -1
_KILLED: Final = 1  # pytest's exit code when tests failed

WRITER: Final = "persistence/disk/writer.py"
FORMAT: Final = "persistence/disk/format.py"
FILES: Final = "persistence/disk/files.py"
QUEUE: Final = "persistence/commit/queue.py"
SYNCS: Final = "persistence/commit/syncs.py"
UPDATES: Final = "persistence/updates.py"
REQUESTS: Final = "persistence/requests.py"
COMPACTION: Final = "persistence/disk/compaction.py"
COMPACTOR: Final = "persistence/disk/compactor.py"
LASTLOG: Final = "persistence/disk/lastlog.py"
RECOVERY: Final = "persistence/disk/recovery.py"
DIRECTORY: Final = "persistence/disk/directory.py"
PATCHES: Final = "persistence/disk/patches.py"
CHECKPOINT: Final = "persistence/checkpoint/manifest.py"
SCRIPT: Final = "persistence/remote/scripts/commit.lua"

TOKENS: Final = "persistence/security/tokens.py"
ACCESS: Final = "persistence/access.py"
SEALED: Final = "persistence/disk/sealed.py"

MONITORED: Final = (
    "tests/faults/test_nth_call.py::test_a_run_has_500_operations_and_every_kind_of_call"
)
FLIPS: Final = "tests/disk/test_log_prefixes.py::test_no_flipped_bit_in_any_frame_goes_unnoticed"
WHOSE: Final = (
    "tests/disk/test_log_prefixes.py"
    "::test_no_flipped_bit_in_a_header_or_key_hides_whose_frame_it_was"
)
HEADERS: Final = (
    "tests/disk/test_log_prefixes.py"
    "::test_a_recovered_prefix_has_the_sessions_whose_commit_lies_before_the_cut"
)
FLIPPED: Final = "tests/disk/test_log_prefixes.py::test_no_flipped_bit_gives_a_wrong_value"
KERNELS: Final = "tests/faults/test_kernels.py::test_power_cuts_lose_nothing_acknowledged"
FOUND: Final = "tests/faults/test_found.py"
EVERY_AWAIT: Final = "tests/faults/test_every_await.py"
AGREEMENT: Final = "persistence/sharing/agreement.py"
OUTAGES: Final = "tests/sharing/test_outages.py"
SHARING: Final = "tests/sharing/test_sharing.py"
OUTBOX: Final = "persistence/sharing/outbox.py"
OUTBOXES: Final = "tests/sharing/test_outbox.py"
RESTORING: Final = "persistence/sharing/restoring.py"
RESTORED: Final = "tests/sharing/test_restoring.py"
WRITING: Final = "tests/disk/test_writer.py"
RECOVERING: Final = "tests/disk/test_recovery.py"
MERGING: Final = "tests/disk/test_compaction.py"
ORDER: Final = f"{MERGING}::test_the_order_of_a_merge_is_outputs_then_manifest_then_removal"
PATCHING: Final = "tests/disk/test_patches.py"
QUEUING: Final = "tests/commit/test_queue.py"
SYNCING: Final = "tests/commit/test_syncs.py"
EXPIRING: Final = "tests/test_expiry.py"
REQUESTING: Final = "tests/test_requests.py"
SHIPPING: Final = "tests/checkpoint/test_create.py"
SECURITY: Final = "tests/security"
ACCESSING: Final = "tests/test_access.py"
SEALED_FRAMES: Final = (
    "tests/disk/test_sealed.py::test_a_payload_opens_where_it_was_sealed_for_and_nowhere_else"
)
SEALED_VALUES: Final = (
    "tests/remote/test_sealed.py::test_a_value_of_another_field_session_or_incarnation_is_refused"
)


class Mutant(NamedTuple):
    """One guard that is removed.

    Attributes:
        name: what is missing.
        path: which file.
        old: the piece of source, exactly once in it.
        new: what is there instead.
        tests: where it must be found out.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def needs_kernel(self) -> bool:
        """Whether only a real file system can tell."""
        return KERNELS in self.tests


MUTANTS: Final = (
    # --- syncs of files -----------------------------------------------------------------------
    Mutant(
        "no sync of an append",
        WRITER,
        "                self._sync(active.fd, active.path)\n                self._advance",
        "                self._advance",
        (MONITORED,),
    ),
    Mutant(
        "fdatasync does nothing",
        FILES,
        "        os.fdatasync(fd)\n",
        "        del fd\n",
        (KERNELS,),
    ),
    Mutant(
        "no sync of a new segment's header",
        WRITER,
        (
            "        files.sync(fd)\n        is_opening = True\n"
            "        files.sync_directory(directory)\n    except OSError"
        ),
        ("        is_opening = True\n        files.sync_directory(directory)\n    except OSError"),
        (MONITORED, f"{WRITING}::test_a_segment_that_cannot_be_created_leaves_nothing_behind"),
    ),
    Mutant(
        "no sync of a replaced file",
        FILES,
        "                end += len(piece)\n            files.sync(fd)\n",
        "                end += len(piece)\n",
        (
            MONITORED,
            f"{WRITING}::test_a_file_is_replaced_in_the_order_that_makes_it_atomic_and_durable",
        ),
    ),
    Mutant(
        "no sync of what a merge wrote",
        COMPACTION,
        "    files.sync(output.fd)\n",
        "",
        (ORDER,),
    ),
    Mutant(
        "no sync behind the cut of a torn tail",
        LASTLOG,
        "        files.truncate(fd, end)\n        files.sync(fd)\n",
        "        files.truncate(fd, end)\n",
        (f"{RECOVERING}::test_the_last_segment_is_cut_written_again_sealed_and_only_then_hinted",),
    ),
    Mutant(
        "no sync when recovery seals",
        LASTLOG,
        "        segment.length = tail.end + len(footer)\n    files.sync(fd)\n",
        "        segment.length = tail.end + len(footer)\n",
        ("tests/disk/test_failed_sync.py",),
    ),
    Mutant(
        "nothing is written again after a failed sync",
        RECOVERY,
        "            yield from write_again(self._files, fd, tail)\n",
        "",
        ("tests/disk/test_failed_sync.py",),
    ),
    # --- syncs of directories -----------------------------------------------------------------
    Mutant(
        "no directory sync behind a new segment",
        WRITER,
        (
            "        files.sync(fd)\n        is_opening = True\n"
            "        files.sync_directory(directory)\n    except OSError"
        ),
        "        files.sync(fd)\n        is_opening = True\n    except OSError",
        (MONITORED,),
    ),
    Mutant(
        "no directory sync behind a replaced file",
        FILES,
        "        files.rename(source, target)\n        files.sync_directory(directory)\n",
        "        files.rename(source, target)\n",
        (
            MONITORED,
            f"{WRITING}::test_a_file_is_replaced_in_the_order_that_makes_it_atomic_and_durable",
        ),
    ),
    Mutant(
        "no directory sync behind the naming of a merge",
        COMPACTION,
        '(output.segment.number)}")\n    files.sync_directory(directory)\n\n\ndef abandon',
        '(output.segment.number)}")\n\n\ndef abandon',
        (ORDER,),
    ),
    Mutant(
        "an old copy of the manifest stays until the next one",
        DIRECTORY,
        "    if data != encode_manifest(manifest):\n",
        "    if not data:\n",
        ("tests/faults/test_found.py::test_what_a_merge_replaced_is_not_removed_too_early",),
    ),
    # --- checksums ----------------------------------------------------------------------------
    Mutant(
        "a frame's header is not checked",
        FORMAT,
        "    if _unpack_checksum(data, offset + _HEADER_SIZE)[0] != crc32c(\n"
        "        key, crc32c(header, salt_checksum)\n    ):",
        "    if crc32c(key, crc32c(header, salt_checksum)) < 0:",
        (HEADERS, WHOSE),
    ),
    Mutant(
        "a frame's payload is not checked by a scan",
        FORMAT,
        "    if _unpack_checksum(data, end)[0] != crc32c(view[offset:end], salt_checksum):",
        "    if crc32c(view[offset:end], salt_checksum) < 0:",
        (FLIPS,),
    ),
    Mutant(
        "a record is not checked when it is read",
        FORMAT,
        "    if crc32c(data, salt_checksum) != _INTACT:",
        "    if crc32c(data, salt_checksum) < 0:",
        ("tests/disk/test_format.py", FLIPPED),
    ),
    Mutant(
        "a hint is not checked",
        FORMAT,
        "    return (skew, body) if crc32c(body) == body_checksum else None",
        "    return (skew, body) if crc32c(body) >= 0 <= body_checksum else None",
        (
            f"{RECOVERING}::test_hints_that_are_there_damaged_stale_or_absent_give_the_same_index",
            "tests/disk/test_format.py",
        ),
    ),
    Mutant(
        "the manifest is not checked",
        "persistence/disk/manifest.py",
        '    if rest != b"%08x\\n" % crc32c(body):',
        "    if crc32c(body + rest) < 0:",
        (
            "tests/disk/test_directory.py::test_no_flipped_bit_and_no_cut_in_a_manifest_goes_unnoticed",
        ),
    ),
    Mutant(
        "a merge does not check what it copies",
        FORMAT,
        "    if _unpack_checksum(view, end)[0] != crc32c(view[:end], old_salt_checksum):",
        "    if crc32c(view[:end], old_salt_checksum) < 0:",
        (f"{MERGING}::test_damage_that_a_merge_meets_is_reported_and_left_as_it_is",),
    ),
    Mutant(
        "a chunk of a checkpoint is not checked",
        CHECKPOINT,
        "    if checksum != ref.checksum or checksum != checksum_of(data):",
        "    if checksum < 0:",
        ("tests/checkpoint/test_manifest.py",),
    ),
    Mutant(
        "the manifest of a checkpoint is not checked",
        CHECKPOINT,
        "    if checksum_of(data) != crc32c(data[:behind]):\n",
        "    if False:\n",
        ("tests/checkpoint/test_manifest.py",),
    ),
    Mutant(
        "a record from Redis is not checked",
        "persistence/remote/layout.py",
        "    if crc32c(record) != checksum:",
        "    if crc32c(record) < 0 <= checksum:",
        ("tests/remote/test_layout.py",),
    ),
    # --- orders -------------------------------------------------------------------------------
    Mutant(
        "merged segments go before the manifest drops them",
        "persistence/disk/tier.py",
        "        await self._write_manifest(add=numbers)\n",
        "        del numbers\n",
        (ORDER,),
    ),
    Mutant(
        "a merge drops tombstones that the next checkpoint has to ship",
        COMPACTION,
        "        self._droppable_below = min(lowest_outside, shipped_sequence + 1)",
        "        self._droppable_below = max(lowest_outside, shipped_sequence < 0)",
        (
            f"{SHIPPING}::test_deletions_are_shipped_even_when_compaction_has_no_more_use_for_them",
            "tests/faults/test_found.py",
        ),
    ),
    Mutant(
        "an unreadable record of what was shipped is as good as none",
        "persistence/disk/shipped.py",
        "        if self._is_unreadable:\n            return 0\n",
        "",
        ("tests/faults/test_found.py",),
    ),
    Mutant(
        "a merge drops every tombstone",
        COMPACTION,
        "            if sequence < self._droppable_below:",
        "            if sequence >= 0:",
        (
            f"{MERGING}::test_a_tombstone_goes_when_everything_older_is_merged_and_stays_while_it_is_not",
        ),
    ),
    Mutant(
        "what was built on a failed commit is not failed",
        QUEUE,
        "        later = self._withdraw_later(commits, sessions)",
        "        later: list[Commit] = []",
        (f"{QUEUING}::test_a_failed_batch_fails_what_was_built_on_it_and_nothing_else",),
    ),
    Mutant(
        "a short write is not cut back",
        WRITER,
        "            self._files.truncate(active.fd, active.end)\n",
        "            pass\n",
        (
            f"{WRITING}::test_a_batch_that_does_not_fit_leaves_nothing_and_writing_goes_on_when_there_is_space",
        ),
    ),
    Mutant(
        "writing goes on after a failed sync",
        WRITER,
        '        self.poisoned = f"{path}: {error.strerror}"\n        _log.error(',
        "        _log.error(",
        (f"{WRITING}::test_a_sync_that_failed_is_never_tried_again_on_that_file",),
    ),
    # --- syncs beside appends -----------------------------------------------------------------
    Mutant(
        "a sync counts for what is appended while it runs",
        WRITER,
        "            highest = active.highest_sequence  # not what comes meanwhile\n"
        "            self._sync(active.fd, active.path)\n",
        "            self._sync(active.fd, active.path)\n"
        "            highest = active.highest_sequence\n",
        (f"{WRITING}::test_a_sync_counts_only_for_what_was_appended_before_it_began",),
    ),
    Mutant(
        "a batch is synced beside another sync",
        WRITER,
        "            with self._one_sync:\n                self.check_usable()",
        "            with suppress():\n                self.check_usable()",
        (f"{WRITING}::test_the_log_has_one_sync_at_a_time_and_is_closed_in_none",),
    ),
    Mutant(
        "a sync runs beside the one of a batch",
        WRITER,
        "        with self._one_sync:\n            self.check_usable()\n",
        "        with suppress():\n            self.check_usable()\n",
        (f"{WRITING}::test_the_log_has_one_sync_at_a_time_and_is_closed_in_none",),
    ),
    Mutant(
        "a segment is closed while it is synced",
        WRITER,
        "        with self._one_sync:\n            if self.active is not None:\n",
        "        with suppress():\n            if self.active is not None:\n",
        (f"{WRITING}::test_the_log_has_one_sync_at_a_time_and_is_closed_in_none",),
    ),
    Mutant(
        "a batch is synced behind a sync that failed",
        WRITER,
        "                self.check_usable()  # the sync that it waited for may have failed\n",
        "",
        (f"{WRITING}::test_whoever_waits_for_a_sync_that_fails_does_not_sync",),
    ),
    Mutant(
        "a sync is made behind one that failed",
        WRITER,
        "        with self._one_sync:\n            self.check_usable()\n",
        "        with self._one_sync:\n",
        (f"{WRITING}::test_whoever_waits_for_a_sync_that_fails_does_not_sync",),
    ),
    Mutant(
        "what is written beside a sync that fails is acknowledged",
        WRITER,
        "            self.check_usable()  # a sync beside it may have failed:"
        " this will never be durable\n",
        "",
        (f"{WRITING}::test_what_is_written_beside_a_sync_that_fails_is_not_acknowledged",),
    ),
    Mutant(
        "a batch is written beside a commit that is written alone",
        QUEUE,
        "        while self._alone is not None or not (",
        "        while not (",
        (f"{QUEUING}::test_while_one_sync_runs_the_next_batch_gathers",),
    ),
    Mutant(
        "a checkpoint is cut amid the rotation of an id",
        "persistence/disk/wholes.py",
        "            while self._changes:\n",
        "            while False:\n",
        ("tests/test_rotation.py::test_a_checkpoint_beside_a_rotation_does_not_restore_both_ids",),
    ),
    Mutant(
        "a flush is content with a sync that began before its updates",
        SYNCS,
        "        covered = min(self._oldest_undecided(), submitted + 1)\n",
        "        covered = self._oldest_undecided()\n",
        (f"{SYNCING}::test_a_flush_during_a_sync_waits_for_the_next_one",),
    ),
    Mutant(
        "updates go on however long a sync takes",
        SYNCS,
        "        return self._is_due and self._syncing is not None\n",
        "        return False\n",
        (f"{SYNCING}::test_a_sync_that_takes_longer_than_the_interval_holds_updates_back",),
    ),
    Mutant(
        "a segment is synced as a whole when it is full",
        SYNCS,
        "config.segment_bytes * _SYNCED_EARLY if is_timed else math.inf",
        "math.inf",
        (f"{SYNCING}::test_a_segment_is_synced_in_parts_before_it_is_full",),
    ),
    Mutant(
        "updates wait for the sync of each interval",
        SYNCS,
        "        self._syncing = self._disk.threads.sync(writer.sync)\n",
        "        self._syncing = self._disk.threads.write(writer.sync)\n",
        (f"{SYNCING}::test_updates_do_not_wait_for_a_sync_that_acknowledges_nothing",),
    ),
    Mutant(
        "damage in the last segment passes for a torn tail",
        LASTLOG,
        "        elif _acknowledged_behind(files, fd, segment, offset, tail.last_sequence):",
        "        elif not segment:",
        (f"{RECOVERING}::test_a_destroyed_header_of_a_frame_costs_that_frame_only",),
    ),
    Mutant(
        "the snapshot of a clean close is not used up",
        RECOVERY,
        "        if self._files.exists(path) and self._removed(INDEX_SNAPSHOT):\n"
        "            self._files.sync_directory(self._directory)\n"
        "        return taken\n",
        "        return taken\n",
        (f"{RECOVERING}::test_the_snapshot_of_a_clean_close_is_used_once",),
    ),
    # --- locks --------------------------------------------------------------------------------
    Mutant(
        "a directory is not locked",
        DIRECTORY,
        "            files.lock(self._fd)\n",
        "            pass\n",
        ("tests/disk/test_directory.py::test_a_second_manager_of_the_same_process_is_refused",),
    ),
    Mutant(
        "two may edit one session",
        "persistence/locks.py",
        "        if holder is None:\n",
        "        if holder is None or holder.owner is not owner:\n",
        ("tests/test_locks.py",),
    ),
    Mutant(
        "a merge takes what a checkpoint still reads",
        COMPACTION,
        "        and item.number not in pinned\n",
        "",
        (f"{SHIPPING}::test_segments_that_are_still_to_be_read_are_not_compacted",),
    ),
    # --- the shared tier ----------------------------------------------------------------------
    Mutant(
        "Redis takes a commit on any base",
        SCRIPT,
        "  if lives and newest == base and kind ~= 'C' and kind ~= 'D' then return nil end\n",
        "  if lives and kind ~= 'C' and kind ~= 'D' then return nil end\n",
        ("tests/remote/test_contract.py",),
    ),
    Mutant(
        "Redis takes a change of one field on any base",
        SCRIPT,
        "\n    and sub(state, IDS_AT, SHOWN_BYTES) == base then\n",
        " then\n",
        ("tests/remote/test_contract.py", "tests/sharing/test_sharing.py"),
    ),
    Mutant(
        "Redis does not know a repeated commit again",
        SCRIPT,
        "  if knows(key, state, commit) then\n",
        "  if false then\n",
        ("tests/remote/test_contract.py",),
    ),
    Mutant(
        "Redis is never in doubt about a commit it does not know",
        SCRIPT,
        "  if kind == 'P' then return not knows(key, state, base) end\n",
        "  if kind == 'P' then return false end\n",
        ("tests/remote/test_contract.py",),
    ),
    Mutant(
        "a lost reply is never too old to tell",
        "persistence/remote/committer.py",
        "elif was_lost and result.may_be_forgotten:",
        "elif False:",
        ("tests/remote/test_faults_live.py",),
    ),
    Mutant(
        "an end leaves no tombstone in Redis",
        SCRIPT,
        "  call('PEXPIRE', key, time)\n  announce(key, kind, sub(head, 1, 8), commit)",
        "  call('DEL', key)\n  announce(key, kind, sub(head, 1, 8), commit)",
        ("tests/remote/test_contract.py",),
    ),
    Mutant(
        "a late touch moves a deadline back",
        SCRIPT,
        "  if read('<d', times) < read('<d', head) then return 'A' end\n",
        "",
        ("tests/remote/test_contract.py",),
    ),
    Mutant(
        "who is told that a session is over may end the one that has begun since",
        "persistence/residency.py",
        "            if deadline > self._time.now():\n                return False\n",
        "",
        (
            f"{EXPIRING}::test_a_session_that_begins_anew_while_the_end_of_the_old_one_is_confirmed_stays",
        ),
    ),
    Mutant(
        "an idle session is ended although it was used meanwhile",
        "persistence/listing.py",
        "            if self._times(session_id, key) != times:\n                return",
        "            if self._times(session_id, key) is None:\n                return",
        (f"{EXPIRING}::test_a_session_that_is_used_while_it_is_asked_whether_it_is_idle_stays",),
    ),
    Mutant(
        "calls that come do not wait behind those that wait",
        "persistence/turns.py",
        "        if self._waiting or self._called or self._left <= 0:\n",
        "        if self._left <= 0:\n",
        ("tests/test_turns.py",),
    ),
    Mutant(
        "all who wait for one sync are woken at once",
        QUEUE,
        "            if has_woken or slices.due():\n",
        "            if slices.due():\n",
        (f"{QUEUING}::test_one_sync_that_acknowledges_many_wakes_a_few_in_each_turn_of_the_loop",),
    ),
    Mutant(
        "two workers that rotate one id both succeed",
        AGREEMENT,
        "        return not isinstance(end, ExactEnd)\n",
        "        return True\n",
        ("tests/sharing/test_security.py",),
    ),
    Mutant(
        "who waited for a turn does not look again whether a restore has begun",
        "persistence/lifecycle.py",
        "            if self._gate is None:\n                self._check_open()\n",
        "            if True:\n                self._check_open()\n",
        ("tests/test_turns.py",),
    ),
    Mutant(
        "a segment counts as sealed before it has rows",
        WRITER,
        "        active.segment.rows = active.rows\n        active.segment.sealed = True\n",
        "        active.segment.sealed = True\n        active.segment.rows = active.rows\n",
        (f"{WRITING}::test_whoever_sees_that_a_segment_is_sealed_sees_its_rows",),
    ),
    # --- tokens and what is sealed ------------------------------------------------------------
    Mutant(
        "a token never expires",
        TOKENS,
        "    if not is_client or not now < expires:\n",
        "    if not is_client or not expires:\n",
        (f"{SECURITY}/test_tokens.py::test_a_token_is_valid_until_the_moment_it_expires",),
    ),
    Mutant(
        "a token is anybody's",
        TOKENS,
        "    if not is_client or not now < expires:\n",
        "    if is_client is None or not now < expires:\n",
        (f"{SECURITY}/test_tokens.py::test_a_token_is_one_clients",),
    ),
    Mutant(
        "a token has several spellings",
        TOKENS,
        " or _encoded(data) != token:\n",
        ":\n",
        (f"{SECURITY}/test_tokens.py::test_a_token_has_one_spelling",),
    ),
    Mutant(
        "a token outlives its session",
        ACCESS,
        "return rec.incarnation_of(record) == claims.incarnation and not self.is_over(claims)",
        "return not self.is_over(claims)",
        (f"{ACCESSING}::test_a_token_ends_with_its_session",),
    ),
    Mutant(
        "a token opens any session",
        ACCESS,
        "        if claims.session_id != session_id:\n",
        "        if not session_id:\n",
        (f"{ACCESSING}::test_a_handle_takes_no_token_of_another_session",),
    ),
    Mutant(
        "a handle checks its session before it waits, and not behind that",
        ACCESS,
        "            self._check(record)\n            return change.data(record)\n",
        "            return change.data(record)\n",
        (f"{ACCESSING}::test_a_session_that_is_created_anew_while_a_call_waits_is_not_touched",),
    ),
    Mutant(
        "a nonce comes again",
        "persistence/security/sealing.py",
        "        nonce = secrets.token_bytes(_NONCE_BYTES)\n",
        "        nonce = bytes(_NONCE_BYTES)\n",
        (f"{SECURITY}/test_sealing.py::test_the_same_is_never_sealed_to_the_same_bytes",),
    ),
    Mutant(
        "a payload is any session's",
        SEALED,
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids) + key\n",
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids)\n",
        (SEALED_FRAMES,),
    ),
    Mutant(
        "a payload is of any time",
        SEALED,
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids) + key\n",
        "        return _pack_about(self._directory_id, 0, flags, raw_bytes, ids) + key\n",
        (SEALED_FRAMES,),
    ),
    Mutant(
        "a payload is of any version",
        SEALED,
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids) + key\n",
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, b'') + key\n",
        (SEALED_FRAMES,),
    ),
    Mutant(
        "a payload is any directory's",
        SEALED,
        "        return _pack_about(self._directory_id, sequence, flags, raw_bytes, ids) + key\n",
        "        return _pack_about(b'', sequence, flags, raw_bytes, ids) + key\n",
        ("tests/disk/test_sealed.py",),
    ),
    Mutant(
        "a value in Redis is of any incarnation",
        "persistence/remote/sealed.py",
        "(lengths, self._session_id, name, incarnation)",
        "(lengths, self._session_id, name)",
        (SEALED_VALUES,),
    ),
    Mutant(
        "a value in Redis is any field's",
        "persistence/remote/sealed.py",
        "(lengths, self._session_id, name, incarnation)",
        "(lengths, self._session_id, incarnation)",
        (SEALED_VALUES,),
    ),
    Mutant(
        "a value in Redis is any session's",
        "persistence/remote/sealed.py",
        "(lengths, self._session_id, name, incarnation)",
        "(lengths, name, incarnation)",
        (SEALED_VALUES,),
    ),
    Mutant(
        "a chunk is any chunk of its checkpoint",
        CHECKPOINT,
        '    return f"chunk {checkpoint_id} {number} ".encode()\n',
        '    return f"chunk {checkpoint_id} ".encode()\n',
        ("tests/checkpoint/test_sealed.py",),
    ),
    Mutant(
        "a plain chunk passes for a sealed one",
        CHECKPOINT,
        '    elif sealer is not None:\n        raise MalformedCheckpoint("it is not sealed")\n',
        "",
        ("tests/checkpoint/test_sealed.py",),
    ),
    Mutant(
        "a plain checkpoint is restored where everything is encrypted",
        "persistence/checkpoint/restore.py",
        '        return None if is_sealed else "it is not encrypted, and security.encrypt is on"\n',
        "        return None\n",
        ("tests/checkpoint/test_sealed.py",),
    ),
    Mutant(
        "a directory is opened with any keys",
        DIRECTORY,
        "        check_keys(directory, manifest, sealer)\n        _agree",
        "        _agree",
        ("tests/test_encryption.py",),
    ),
    Mutant(
        "a key is forgotten before everything is sealed anew",
        "persistence/disk/tier.py",
        "                    if any(first <= number < end for number in self.segments)\n",
        "                    if first > end\n",
        ("tests/test_encryption.py",),
    ),
    Mutant(
        "a rotated id is not noted first",
        "persistence/rotation.py",
        "        await self._begin(new_id, move)\n",
        "",
        ("tests/test_rotation.py",),
    ),
    Mutant(
        "a rotated id ends whatever another worker has made of it",
        AGREEMENT,
        "        is_exact = isinstance(commit, ExactEnd)\n",
        "        is_exact = False\n",
        ("tests/sharing/test_security.py",),
    ),
    Mutant(
        "an update behind a delivered branch begins another one",
        AGREEMENT,
        "session_id in self.delivering and session_id in self._outbox",
        "session_id in self.delivering",
        (OUTAGES,),
    ),
    # --- requests of sessions -----------------------------------------------------------------
    Mutant(
        "a block of requests is not charged",
        REQUESTS,
        "noted._replace(mark=noted.mark + granted)",
        "noted",
        (REQUESTING,),
    ),
    Mutant(
        "the rest of a block is given back and used as well",
        REQUESTS,
        "rest, entry.left = entry.left, 0",
        "rest = entry.left",
        (REQUESTING,),
    ),
    Mutant(
        "what could not be stored of requests is lost",
        REQUESTS,
        "            taken.add(entry.tally, self._now())\n            entry.tally = taken\n",
        "            pass\n",
        (REQUESTING,),
    ),
    Mutant(
        "a request waits in a queue that nobody serves any more",
        REQUESTS,
        "            entry.waiting = None\n",
        "            pass\n",
        (f"{REQUESTING}::test_whoever_comes_after_all_others_have_been_served_is_served",),
    ),
    Mutant(
        "a session that gets another id leaves its requests behind",
        REQUESTS,
        "        if entry is not None and move is not None:\n",
        "        if False:\n",
        (REQUESTING,),
    ),
    Mutant(
        "storing requests renews the session",
        UPDATES,
        "session_id, key, record, accessed, life, cap, rec.commit_of(before)",
        "session_id, key, record, self._now(), life, cap, rec.commit_of(before)",
        (REQUESTING,),
    ),
    Mutant(
        "an edit is built on whatever is the newest version",
        UPDATES,
        "        if not is_same and not rec.has_same_data(now[0], self._base[0]):\n",
        "        if not is_same and False:\n",
        ("tests/test_manager_edit.py", "tests/test_manager_cancel.py"),
    ),
    Mutant(
        "what a restore has staged is removed whatever it ended with",
        "persistence/disk/install.py",
        "        except (DiskFull, OSError):\n",
        "        except BaseException:\n",
        (FOUND,),
    ),
    Mutant(
        "a restore is put in place as far as its caller waits",
        "persistence/manager.py",
        "await undisturbed(self._tiers.exchange(staged))",
        "await self._tiers.exchange(staged)",
        (EVERY_AWAIT,),
    ),
    Mutant(
        "updates are accepted while their branch is being delivered",
        AGREEMENT,
        "        return not self._accepts_outages or session_id in self.contested\n",
        "        return False\n",
        ("tests/sharing/test_agreement.py",),
    ),
    Mutant(
        "a branch that was refused is not delivered before the next interval",
        AGREEMENT,
        "            self.contested.add(session_id)\n",
        "",
        (OUTAGES,),
    ),
    Mutant(
        "what the shared tier has lost is not kept",
        "persistence/sharing/fills.py",
        "        elif not was_lost(mine, found):\n",
        "        else:\n",
        (OUTAGES,),
    ),
    Mutant(
        "which put a patch is built on is not checked",
        PATCHES,
        "        and base.sequence == sequence\n",
        "",
        (f"{PATCHING}::test_a_patch_is_only_read_with_the_base_that_it_names",),
    ),
    Mutant(
        "whose record a patch is built on is not checked",
        PATCHES,
        "        and base.key == patch.key\n",
        "",
        (f"{PATCHING}::test_a_patch_is_only_read_with_the_base_that_it_names",),
    ),
    Mutant(
        "what a patch makes of its base is not checked",
        PATCHES,
        "    return record if (len(raw), crc32c(raw)) == (raw_bytes, checksum) else None\n",
        "    return record\n",
        (f"{PATCHING}::test_a_patch_on_another_record_makes_none",),
    ),
    Mutant(
        "a patch grows without bound",
        PATCHES,
        "    if len(changes) > MAX_BASE_FRACTION * base.length:\n",
        "    if False:\n",
        (f"{PATCHING}::test_a_patch_that_has_grown_is_written_as_a_whole_record",),
    ),
    Mutant(
        "a patch is built on a commit that is not the newest",
        PATCHES,
        "        return base if base is not None and base.commit == commit else None\n",
        "        return base\n",
        (PATCHING,),
    ),
    Mutant(
        "a patch forgets what has changed before it",
        PATCHES,
        "    names = (*base.names, *(name for name in changed if name not in base.names))\n",
        "    names = tuple(changed)\n",
        (PATCHING,),
    ),
    Mutant(
        "the base of a patch counts as dead",
        WRITER,
        "        write.length += base_bytes\n",
        "",
        (
            f"{PATCHING}::test_a_patch_takes_the_place_of_the_one_before_and_what_is_dead_is_counted",
        ),
    ),
    Mutant(
        "a patch is written before the manifest says that there may be some",
        WRITER,
        "        if not self.may_patch:\n",
        "        if False:\n",
        (f"{PATCHING}::test_a_directory_is_of_the_newer_version_from_its_first_patch_on",),
    ),
    Mutant(
        "compaction takes a patch for a record",
        COMPACTION,
        "        return self.mark >= ROW_IS_PATCH\n",
        "        return False\n",
        (f"{PATCHING}::test_compaction_writes_the_whole_record_and_the_base_does_not_die_before",),
    ),
    Mutant(
        "a checkpoint ships a patch without its base",
        "persistence/checkpoint/plan.py",
        "        if first in patches:\n",
        "        if False:\n",
        ("tests/checkpoint/test_patches.py",),
    ),
    Mutant(
        "an answer that an announcement has overtaken is taken for current",
        "persistence/sharing/fills.py",
        "        if announced and _commit_id(found) != announced[-1]:\n            return False\n",
        "",
        ("tests/sharing/test_fills.py",),
    ),
    Mutant(
        "what is not delivered yet is noted without a sync",
        OUTBOX,
        "                await self._append(entries, sync=self._sync)\n                for entry",
        "                await self._append(entries, sync=False)\n                for entry",
        (OUTBOXES,),
    ),
    Mutant(
        "a branch ends although it has gone on",
        OUTBOX,
        "            if newest() == delivered.base:\n",
        "            if newest():\n",
        (OUTBOXES,),
    ),
    Mutant(
        "a restore is not noted before it is in place",
        "persistence/tiers.py",
        "            async with self._restoring.noted(before, is_empty",
        "            async with self._restoring.noted(None, is_empty",
        (RESTORED,),
    ),
    Mutant(
        "a restore that was noted counts as one that is in place",
        RESTORING,
        "        return sequence > self.sequence + SEQUENCE_GAP // 2\n",
        "        return True\n",
        (RESTORED,),
    ),
    Mutant(
        "what the shared tier has is followed before the restored state is imposed",
        "persistence/sharing/sharing.py",
        "        if self._to_follow and self._may_follow and",
        "        if self._to_follow and",
        (RESTORED,),
    ),
    Mutant(
        "a lost content is noticed at the next connection only",
        "persistence/remote/subscription.py",
        "            elif epoch != known:\n",
        "            elif False:\n",
        ("tests/remote/test_announcements.py",),
    ),
    Mutant(
        "a script that stops has certainly written nothing",
        "persistence/remote/committer.py",
        "            was_lost = was_lost or stopped_a_script(reply)\n",
        "",
        ("tests/remote/test_faults_live.py",),
    ),
    Mutant(
        "what failed while the shared tier was asked is written",
        QUEUE,
        "            self._queue.extend(commit for commit in agreed if not commit.settled)\n",
        "            self._queue.extend(agreed)\n",
        (SHARING,),
    ),
    # --- checkpoints --------------------------------------------------------------------------
    Mutant(
        "a cut is made without a sync",
        "persistence/disk/cut.py",
        "    writer.sync()\n    writer.check_usable()\n",
        "    writer.check_usable()\n",
        (SHIPPING,),
    ),
    Mutant(
        "a renewal counts for a newer version",
        "persistence/checkpoint/state.py",
        "        if touch is not None and touch[0] > frame.sequence:\n",
        "        if touch is not None:\n",
        (SHIPPING,),
    ),
    Mutant(
        "a deletion takes what is being made",
        "persistence/checkpoint/catalogue.py",
        "                and key.checkpoint <= checkpoint_id\n",
        "",
        (SHIPPING,),
    ),
    Mutant(
        "a checkpoint goes on from one that is being deleted",
        "persistence/checkpoint/create.py",
        "    if manifest.parent and manifest.parent not in await store.manifests():\n",
        "    if False:\n",
        (SHIPPING,),
    ),
    Mutant(
        "an old copy brings back what has expired",
        "persistence/sharing/fills.py",
        "        elif found is None and was_stale:\n",
        "        elif found is None and False:\n",
        (
            f"{SHARING}::test_a_session_whose_new_time_is_over_is_not_brought_back_by_who_did_not_look",
        ),
    ),
)


class NotOnce(Exception):
    """The source that a mutant changes is not there, or more than once."""


def mutated(source: str, mutant: Mutant) -> str:
    """Return the source with the mutant's change.

    Raises:
        NotOnce: the mutant does not fit the source any more.
    """
    count = source.count(mutant.old)
    if count != 1:
        raise NotOnce(f"{mutant.name}: its piece of {mutant.path} is there {count} times, not once")
    return source.replace(mutant.old, mutant.new)


def run(mutant: Mutant) -> tuple[bool, str]:
    """Run the tests that must find a mutant; return whether they did, and the last words of pytest.

    Raises:
        NotOnce: it does not fit the source any more.
    """
    code, words = _tested(mutant.tests, mutant)
    return code == _KILLED, words


def run_unchanged(tests: Iterable[str]) -> str:
    """Run tests on the engine as it is; return an empty string, or what has failed.

    A test that fails anyway kills no mutant.
    """
    code, words = _tested(tuple(sorted(set(tests))), None)
    return words if code else ""


def _tested(tests: tuple[str, ...], mutant: Mutant | None) -> tuple[int, str]:
    """Run tests in a copy of the tree; return pytest's exit code, and its last words."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        if mutant is not None:
            path = copy / mutant.path
            path.write_text(mutated(path.read_text(), mutant))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no"]
        command += ["-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ended = subprocess.run(
                command,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _NOT_DECIDED, f"not decided: they took more than {_TIMEOUT_SECONDS:.0f} s"
        words = (ended.stdout.strip() or ended.stderr.strip()).splitlines() or [""]
        failed = next((line for line in words if line.startswith(("FAILED", "ERROR"))), words[-1])
        return ended.returncode, failed


def run_all(
    say: Callable[[str], None],
    goes_on: Callable[[], bool] = lambda: True,
    only: str = "",
    part: slice = slice(None),
) -> list[str]:
    """Run all mutants, or those whose names contain `only`; return those that survived."""
    survivors = []
    chosen = [mutant for mutant in MUTANTS if only in mutant.name][part]
    done = 0
    problem = run_unchanged(path for mutant in chosen for path in mutant.tests)
    if problem:
        say(f"no mutants: the tests fail without them: {problem}")
        return ["none"]
    for mutant in chosen:
        if not goes_on():
            break
        if mutant.needs_kernel and (missing := why_not("mount", "mkfs.ext4", "losetup")):
            say(f"skipped {mutant.name}: {missing}")
            continue
        started = time.monotonic()
        try:
            is_killed, words = run(mutant)
        except NotOnce as why:
            is_killed, words = False, str(why)
        done += 1
        seconds = time.monotonic() - started
        say(f"{'killed' if is_killed else 'ALIVE '} {mutant.name} ({seconds:.0f} s): {words}")
        if not is_killed:
            survivors.append(mutant.name)
    say(f"mutants: {done} of {len(chosen)} run, {len(survivors)} survived")
    return survivors
