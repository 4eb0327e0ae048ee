-- The tables of the shared tier and of its checkpoints. Run in one transaction, once for a database;
-- every statement may be run again. The number at the end of a name is the format's version: another
-- format gets tables of its own and never touches these.
--
-- One row is a session, its tombstone, or the epoch of a namespace:
--
--   namespace    redis.namespace, as configured
--   id           session id as UTF-8 (an id may hold any byte, also those that text cannot);
--                the epoch has the empty id, which no session has
--   kind         L lives, T tombstone, t tombstone of a session that was not there, E epoch
--   version      the session's version (of a tombstone: the last one it had); 0 for the epoch
--   incarnation  incarnation id, 16 bytes
--   commits      ids of the latest commits, 16 bytes each, newest first, at most 32;
--                of the epoch the one id of the content
--   record       the whole packed record, byte for byte; NULL where kind is not L
--   checksum     CRC-32C of the record
--   accessed     last access that was recorded, seconds since 1970
--   deadline     when the session ends, seconds since 1970; Infinity: never
--   cap          deadline that no renewal moves; Infinity: none
--   expires      from when on the row counts as not there, by this server's clock: the deadline, of
--                a tombstone the end of its retention. Such rows are removed now and then.
--
-- The epoch is in this table, so that it is lost whenever the sessions are.

CREATE TABLE IF NOT EXISTS persistence_sessions_1 (
  namespace text NOT NULL,
  id bytea NOT NULL,
  kind text NOT NULL,
  version bigint NOT NULL,
  incarnation bytea NOT NULL,
  commits bytea[] NOT NULL,
  record bytea,
  checksum bigint NOT NULL,
  accessed double precision NOT NULL,
  deadline double precision NOT NULL,
  cap double precision NOT NULL,
  expires double precision NOT NULL,
  PRIMARY KEY (namespace, id)
);

CREATE INDEX IF NOT EXISTS persistence_sessions_1_expires
  ON persistence_sessions_1 (namespace, expires);

-- Checkpoints: chunks under the id of the checkpoint that wrote them and a number, and manifests.

CREATE TABLE IF NOT EXISTS persistence_chunks_1 (
  namespace text NOT NULL,
  checkpoint text NOT NULL,
  number bigint NOT NULL,
  data bytea NOT NULL,
  PRIMARY KEY (namespace, checkpoint, number)
);

CREATE TABLE IF NOT EXISTS persistence_checkpoints_1 (
  namespace text NOT NULL,
  checkpoint text NOT NULL,
  manifest bytea NOT NULL,
  PRIMARY KEY (namespace, checkpoint)
);
