-- Applies a batch of requests to sessions, each at most once, in order, in one transaction. Every
-- request stands for itself: one that is refused stops no other.
--
-- The name ends with a hash of this file: a changed function is another function, and workers of
-- several versions of the library each call their own.
--
--   space       namespace
--   channel     where commits are announced
--   worker      id of the sending worker, in hex
--   retention   for how long a tombstone is kept, seconds
--   kinds       one letter a request: C create, P put, D delete, T touch
--   ids         session ids. Requests are sorted by them, those of one session in their order: so
--               every transaction locks rows in the same order, and no two wait for each other.
--   commit_ids  the commit; with T: the commit that is renewed
--   bases       the commit it was built on; zeros with C; with D zeros: whatever it is
--   incarnations  with D zeros: whichever lives
--   versions, records, checksums   with C and P
--   accesses, deadlines, caps      seconds since 1970; with D nothing
--
-- Returns a row for each request, in order: a code, and for D, C and X what is stored:
--
--   A applied       D applied before, by an earlier sending     C conflict     X a tombstone is there
--   M nothing is there (a delete has left a tombstone all the same)
--
-- and, of a creation or a put with C or X, whether it may have been applied and forgotten since.
-- Where the commit that a put was built on is among the latest ones, and the put is not, it was not
-- applied: it would be newer.
--
-- Announces what it applied, but for touches: the worker, then for each commit a line with kind,
-- version, commit id (hex) and session id (hex). A message holds less than 8,000 bytes, so there
-- may be several. PostgreSQL delivers them when the transaction is committed.

CREATE OR REPLACE FUNCTION persistence_commit_@hash@(
  space text,
  channel text,
  worker text,
  retention double precision,
  kinds text[],
  ids bytea[],
  commit_ids bytea[],
  bases bytea[],
  incarnations bytea[],
  versions bigint[],
  records bytea[],
  checksums bigint[],
  accesses double precision[],
  deadlines double precision[],
  caps double precision[]
) RETURNS TABLE (
  code text,
  stored_kind text,
  stored_version bigint,
  stored_incarnation bytea,
  stored_commit bytea,
  may_be_forgotten boolean
) LANGUAGE plpgsql AS $function$
DECLARE
  none CONSTANT bytea := decode(repeat('00', 16), 'hex');
  message_bytes CONSTANT integer := 7900;
  remembered CONSTANT integer := 32;
  asked record;
  was record;
  is_row boolean;     -- a row is there, and locked
  is_there boolean;   -- and its time is not over
  lives boolean;
  now_seconds double precision;
  history bytea[];
  new_kind text;
  event text;
  message text := '';
BEGIN
  FOR asked IN
    SELECT * FROM unnest(
      kinds, ids, commit_ids, bases, incarnations, versions, records, checksums, accesses,
      deadlines, caps
    ) WITH ORDINALITY AS each (
      kind, id, commit_id, base, incarnation, version, record, checksum, accessed,
      deadline, cap, place
    ) ORDER BY place
  LOOP
    LOOP  -- again, when another transaction has made or removed the row in between
      code := NULL;
      SELECT s.kind, s.version, s.incarnation, s.commits, s.expires INTO was
        FROM persistence_sessions_1 AS s
        WHERE s.namespace = space AND s.id = asked.id
        FOR UPDATE;
      is_row := FOUND;
      now_seconds := extract(epoch FROM clock_timestamp());  -- the lock may have taken a while
      is_there := is_row AND was.expires > now_seconds;
      lives := is_there AND was.kind = 'L';
      history := CASE WHEN is_there THEN was.commits ELSE ARRAY[]::bytea[] END;

      -- Why it cannot be applied; NULL: it can.
      IF asked.kind = 'T' THEN
        code := CASE
          WHEN NOT is_there THEN 'M'
          WHEN NOT lives THEN 'X'
          WHEN history[1] <> asked.commit_id THEN 'C'
        END;
      ELSIF NOT is_there THEN
        code := CASE WHEN asked.kind = 'P' THEN 'M' END;
      ELSIF lives AND asked.kind = 'P' AND history[1] = asked.base THEN
        code := NULL;
      ELSIF asked.commit_id = ANY (history) THEN
        code := CASE WHEN was.kind = 't' AND history[1] = asked.commit_id THEN 'M' ELSE 'D' END;
      ELSIF asked.kind = 'C' THEN
        code := CASE
          WHEN lives THEN 'C'
          WHEN was.incarnation = asked.incarnation THEN 'X'
        END;
      ELSE
        code := CASE
          WHEN NOT lives THEN 'X'
          WHEN asked.kind = 'P' THEN 'C'
          WHEN asked.incarnation NOT IN (none, was.incarnation) THEN 'C'
          WHEN asked.base NOT IN (none, history[1]) THEN 'C'
        END;
      END IF;
      EXIT WHEN code IS NOT NULL;

      IF asked.kind = 'T' THEN
        UPDATE persistence_sessions_1 AS s
          SET accessed = asked.accessed, deadline = asked.deadline, expires = asked.deadline
          WHERE s.namespace = space AND s.id = asked.id AND s.accessed <= asked.accessed;
        code := 'A';
        EXIT;
      END IF;

      new_kind := 'L';
      IF asked.kind = 'D' THEN
        new_kind := CASE WHEN is_there THEN 'T' ELSE 't' END;
        asked.deadline := now_seconds + retention;
        IF is_there THEN
          asked.version := was.version;
          asked.incarnation := was.incarnation;
        END IF;
      END IF;
      history := (asked.commit_id || history)[1:remembered];
      IF is_row THEN
        UPDATE persistence_sessions_1 AS s
          SET kind = new_kind, version = asked.version, incarnation = asked.incarnation,
            commits = history, record = asked.record, checksum = asked.checksum,
            accessed = asked.accessed, deadline = asked.deadline, cap = asked.cap,
            expires = asked.deadline
          WHERE s.namespace = space AND s.id = asked.id;
      ELSE
        INSERT INTO persistence_sessions_1 (
          namespace, id, kind, version, incarnation, commits, record, checksum, accessed,
          deadline, cap, expires
        ) VALUES (
          space, asked.id, new_kind, asked.version, asked.incarnation, history, asked.record,
          asked.checksum, asked.accessed, asked.deadline, asked.cap, asked.deadline
        ) ON CONFLICT DO NOTHING;
        CONTINUE WHEN NOT FOUND;
      END IF;
      code := CASE WHEN new_kind = 't' THEN 'M' ELSE 'A' END;

      event := format(E'\n%s %s %s %s', new_kind, asked.version,
        encode(asked.commit_id, 'hex'), encode(asked.id, 'hex'));
      IF length(message) + length(event) > message_bytes THEN
        PERFORM pg_notify(channel, message);
        message := '';
      END IF;
      message := CASE WHEN message = '' THEN worker ELSE message END || event;
      EXIT;
    END LOOP;

    stored_kind := NULL;
    stored_version := NULL;
    stored_incarnation := NULL;
    stored_commit := NULL;
    may_be_forgotten := code IN ('C', 'X') AND CASE asked.kind
      WHEN 'P' THEN asked.base <> ALL (history)
      WHEN 'C' THEN cardinality(history) >= remembered - 1
      ELSE false
    END;
    IF code IN ('D', 'C', 'X') THEN
      stored_kind := was.kind;
      stored_version := was.version;
      stored_incarnation := was.incarnation;
      stored_commit := history[1];
    END IF;
    RETURN NEXT;
  END LOOP;
  IF message <> '' THEN
    PERFORM pg_notify(channel, message);
  END IF;
END
$function$;
