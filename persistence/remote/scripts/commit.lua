-- Applies a batch of requests to sessions, each at most once, in order. Every request stands for
-- itself: one that is refused stops no other.
--
-- KEYS[i]   key of the session that request i is about; a key may come more than once
-- ARGV[1]   channel for announcements; empty: announce nothing
-- ARGV[2]   id of the sending worker, 16 bytes
-- ARGV[3]   bytes of a key in front of the session id, as text; one byte is behind it
-- ARGV[4..] for each request a header, then names and values to set, then names to remove:
--
--   header  kind         1 byte: C create, P put the difference, R put the whole, D delete, T touch
--           sets         4 bytes: names and values that follow, counted together
--           removes      4 bytes: names that follow them; for T: 1, accessed and deadline (floats)
--           incarnation  16 bytes; zeros with D: whichever lives
--           commit       16 bytes; with T: the commit that is renewed
--           base         16 bytes: the commit it was built on; zeros with C; with D: whatever it is
--           version      8 bytes
--           time         text, milliseconds: when the key expires (Unix time), empty: never;
--                        with D: for how long the tombstone is kept
--
-- Returns one string with a code for each request, then the details of those that have one:
--
--   A applied                      D applied before, by an earlier sending (+ state)
--   C conflict (+ state)           X a tombstone is there (+ state)
--   M nothing is there             E Redis refused (+ the text of the error)
--   F a foreign key is there       + state: the first 41 bytes of the stored state
--
-- The state (field \255state): kind (L lives, T tombstone, t tombstone where nothing had been),
-- version (8), incarnation (16), ids of the latest commits (16 each, newest first, at most 32).
--
-- One announcement for the whole batch: worker id, then for each change kind (1), version (8),
-- commit (16), length of the session id (2), session id. Numbers are little-endian.

local STATE, HEAD = '\255state', '\255head'
local NONE = string.rep('\0', 16)
local IDS_AT, KEPT_IDS_BYTES, SHOWN_BYTES = 26, 31 * 16, 41
local ARGUMENTS_PER_CALL = 4000 -- Lua unpacks up to 8,000 values

local sub, find, char = string.sub, string.find, string.char
local call, pcall, unpack_header = redis.call, redis.pcall, struct.unpack

local codes, details, changes = {}, {}, {}
local id_from = tonumber(ARGV[3]) + 1

local function knows(state, commit)
  local at = find(state, commit, IDS_AT, true)
  while at and (at - IDS_AT) % 16 ~= 0 do
    at = find(state, commit, at + 1, true)
  end
  return at ~= nil
end

local function announce(key, kind, version, commit)
  local id = sub(key, id_from, -2)
  changes[#changes + 1] = kind .. version .. commit
    .. char(#id % 256, math.floor(#id / 256)) .. id
end

-- Runs a command over many arguments, in pieces; returns an error or nil. Only the first piece can
-- fail: Redis refuses writes for want of memory before a script's first one, not after it.
local function write(command, key, first, last)
  while first <= last do
    local till = math.min(first + ARGUMENTS_PER_CALL - 1, last)
    local reply = pcall(command, key, unpack(ARGV, first, till))
    if type(reply) == 'table' and reply.err then return reply.err end
    first = till + 1
  end
end

local function expire(key, time)
  if time == '' then call('PERSIST', key) else call('PEXPIREAT', key, time) end
end

-- Whether a state is one that this script writes.
local function is_state(state)
  return #state >= SHOWN_BYTES and find('LTt', sub(state, 1, 1), 1, true) ~= nil
end

-- Why a creation, a put or a delete cannot be applied; nil: it can.
local function objection(kind, key, state, incarnation, commit, base)
  if not state then
    if kind ~= 'C' and kind ~= 'D' then return 'M' end
    if call('EXISTS', key) == 1 then return 'F' end
    return nil
  end
  local lives = sub(state, 1, 1) == 'L'
  if lives and kind ~= 'C' and kind ~= 'D' and sub(state, IDS_AT, SHOWN_BYTES) == base then
    return nil
  end
  if knows(state, commit) then
    if sub(state, 1, 1) == 't' and sub(state, IDS_AT, SHOWN_BYTES) == commit then return 'M' end
    return 'D'
  end
  local same = sub(state, 10, 25) == incarnation
  if kind == 'C' then
    if lives then return 'C' end
    return same and 'X' or nil
  end
  if not lives then return 'X' end
  if kind ~= 'D' then return 'C' end
  if incarnation ~= NONE and not same then return 'C' end
  if base ~= NONE and sub(state, IDS_AT, SHOWN_BYTES) ~= base then return 'C' end
  return nil
end

local function put(kind, key, state, start, first, sets, removes, time)
  local new = start .. sub(state or '', IDS_AT, IDS_AT + KEPT_IDS_BYTES - 1)
  if kind == 'R' or (kind == 'C' and state) then call('DEL', key) end
  local last = first + sets - 1
  local reply
  if sets <= ARGUMENTS_PER_CALL then
    reply = pcall('HSET', key, STATE, new, unpack(ARGV, first, last))
  else
    reply = pcall('HSET', key, STATE, new)
  end
  if type(reply) == 'table' and reply.err then return reply.err end
  if sets > ARGUMENTS_PER_CALL then write('HSET', key, first, last) end
  if removes > 0 then write('HDEL', key, last + 1, last + removes) end
  expire(key, time)
end

local function delete(key, state, version, incarnation, commit, time)
  local kind = state and 'T' or 't'
  local head = state and sub(state, 2, 25) or version .. incarnation
  if state then call('DEL', key) end
  local ids = commit .. sub(state or '', IDS_AT, IDS_AT + KEPT_IDS_BYTES - 1)
  local reply = pcall('HSET', key, STATE, kind .. head .. ids)
  if type(reply) == 'table' and reply.err then return reply.err end
  call('PEXPIRE', key, time)
  announce(key, kind, sub(head, 1, 8), commit)
end

local function touch(key, state, commit, times, time)
  if not state then return 'M' end
  if sub(state, 1, 1) ~= 'L' then return 'X' end
  if sub(state, IDS_AT, SHOWN_BYTES) ~= commit then return 'C' end
  local head = call('HGET', key, HEAD)
  if not head then return 'F' end
  if struct.unpack('<d', times) < struct.unpack('<d', head) then return 'A' end
  local reply = pcall('HSET', key, HEAD, times .. sub(head, 17))
  if type(reply) == 'table' and reply.err then return 'E', reply.err end
  expire(key, time)
  return 'A'
end

local at = 4
for i = 1, #KEYS do
  local key, header = KEYS[i], ARGV[at]
  local kind, sets, removes, incarnation, commit, base, version =
    unpack_header('<c1I4I4c16c16c16c8', header)
  local time = sub(header, 66)
  local first = at + 1
  at = first + sets + removes

  local code, err
  local state = pcall('HGET', key, STATE)
  if type(state) == 'table' then
    code, err = 'E', state.err
  elseif state and not is_state(state) then
    code = 'F'
  elseif kind == 'T' then
    code, err = touch(key, state, commit, ARGV[first], time)
  else
    code = objection(kind, key, state, incarnation, commit, base)
    if not code then
      if kind == 'D' then
        err = delete(key, state, version, incarnation, commit, time)
        code = state and 'A' or 'M'
      else
        local start = 'L' .. version .. incarnation .. commit
        err = put(kind, key, state, start, first, sets, removes, time)
        code = 'A'
        if not err then announce(key, 'L', version, commit) end
      end
      if err then code = 'E' end
    end
  end
  codes[i] = code
  if err then
    details[#details + 1] = err
  elseif code == 'C' or code == 'X' or code == 'D' then
    details[#details + 1] = sub(state, 1, SHOWN_BYTES)
  end
end

if #changes > 0 and ARGV[1] ~= '' then
  redis.call('PUBLISH', ARGV[1], ARGV[2] .. table.concat(changes))
end
return {table.concat(codes), unpack(details)}
