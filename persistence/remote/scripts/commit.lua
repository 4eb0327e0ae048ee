-- Applies a batch of requests to sessions, each at most once, in order. Every request stands for
-- itself: one that is refused stops no other.
--
-- KEYS[i]   key of the session that request i is about; a key may come more than once
-- ARGV[1]   channel for announcements; empty: announce nothing
-- ARGV[2]   id of the sending worker, 16 bytes
-- ARGV[3]   bytes of a key in front of the session id, as text; one byte is behind it
-- ARGV[4]   the requests, one behind the other, each a header and what it announces:
--
--   kind         1 byte: C create, P put the difference, R put the whole, D delete, T touch
--   sets         4 bytes: fields to set, each as lengths of name and value (4 each), name, value
--   outside      4 bytes: more of them, each as length (4) and name; see ARGV[5..]
--   removes      4 bytes: fields to remove, each as length (4) and name
--   incarnation  16 bytes; zeros with D: whichever lives
--   commit       16 bytes; with T: the commit that is renewed
--   version      8 bytes
--   base         16 bytes: the commit it was built on; zeros with C; with D: whatever it is
--   time         float, milliseconds: when the key expires (Unix time), infinity: never;
--                with D: for how long the tombstone is kept
--   head         length (4) and what to set \255head to; with T: accessed and deadline (floats),
--                which replace its start; with D nothing
--
-- ARGV[5..] values of the fields that are outside, in order: those that are better not copied
--
-- Returns one string with a code for each request, then the details of those that have one:
--
--   A applied                      D applied before, by an earlier sending (+ state)
--   C conflict (+ state)           X a tombstone is there (+ state)
--   M nothing is there             E Redis refused (+ the text of the error)
--   F a foreign key is there       + state: the first 41 bytes of the stored state, and F if
--                                  the request may have been applied and forgotten since, else -
--
-- The state (field \255state): kind (L lives, T tombstone, t tombstone where nothing had been),
-- version (8), incarnation (16), ids of the latest commits (16 each, newest first). When it holds 8
-- of them they move to field \255older (at most 31, newest first): Lua walks over every byte that
-- it is given, and those 8 are walked over once, not at each commit. A tombstone's state has all of
-- them, at most 32.
--
-- One announcement for the whole batch: worker id, then for each change kind (1), version (8),
-- commit (16), length of the session id (2), session id. Numbers are little-endian.

local STATE, HEAD, OLDER = '\255state', '\255head', '\255older'
local NONE = string.rep('\0', 16)
local IDS_AT, SHOWN_BYTES, FULL_BYTES, KEPT_BYTES = 26, 41, 25 + 8 * 16, 31 * 16
local LIVES, TOMBSTONE, TOMBSTONE_OF_NOTHING = 76, 84, 116 -- L, T, t
local ARGUMENTS_PER_CALL = 4000 -- Lua unpacks up to 8,000 values
local NEVER = math.huge

local sub, find, byte = string.sub, string.find, string.byte
local call, pcall, read = redis.call, redis.pcall, struct.unpack

local codes, details, changes = {}, {}, {}
local id_from = tonumber(ARGV[3]) + 1
local requests = ARGV[4]
local at, next_outside = 1, 5
local lengths = {}

local function announce(key, kind, version, commit)
  local id = sub(key, id_from, -2)
  local length = lengths[#id]
  if not length then
    length = struct.pack('<I2', #id)
    lengths[#id] = length
  end
  changes[#changes + 1] = kind .. version .. commit .. length .. id
end

local function holds(ids, commit, from)
  local place = find(ids, commit, from, true)
  while place and (place - from) % 16 ~= 0 do
    place = find(ids, commit, place + 1, true)
  end
  return place ~= nil
end

-- Whether a commit is one of the latest 32.
local function knows(key, state, commit)
  if holds(state, commit, IDS_AT) then return true end
  local rest = KEPT_BYTES + SHOWN_BYTES - #state
  local older = rest > 0 and call('HGET', key, OLDER)
  return older and holds(sub(older, 1, rest), commit, 1)
end

-- The ids of the latest commits, newest first: all that will be kept beside one more.
local function history(key, state)
  if not state then return '' end
  local ids = sub(state, IDS_AT, IDS_AT + KEPT_BYTES - 1)
  if #ids == KEPT_BYTES then return ids end
  return sub(ids .. (call('HGET', key, OLDER) or ''), 1, KEPT_BYTES)
end

-- Sets fields and more of them, in pieces; returns an error or nil. Only the first piece can fail:
-- Redis refuses writes for want of memory before a script's first one, not after it.
local function write(command, key, arguments)
  local first = 1
  while first <= #arguments do
    local till = math.min(first + ARGUMENTS_PER_CALL - 1, #arguments)
    local reply = pcall(command, key, unpack(arguments, first, till))
    if type(reply) == 'table' and reply.err then return reply.err end
    first = till + 1
  end
end

local function expire(key, time)
  if time == NEVER then
    call('PERSIST', key)
  else
    call('PEXPIREAT', key, time - time % 1)
  end
end

-- Whether a state is one that this script writes.
local function is_state(state)
  local kind = byte(state)
  return #state >= SHOWN_BYTES
    and (kind == LIVES or kind == TOMBSTONE or kind == TOMBSTONE_OF_NOTHING)
end

-- Whether a creation or a put that is not among the latest commits may have been one of those before
-- them. Where the commit that a put was built on is among them, it was not: it would be newer.
local function may_be_forgotten(kind, key, state, base)
  if kind == 'P' then return not knows(key, state, base) end
  return kind == 'C' and #history(key, state) == KEPT_BYTES
end

-- Why a creation, a put or a delete cannot be applied; nil: it can.
local function objection(kind, key, state, incarnation, commit, base)
  if not state then
    if kind ~= 'C' and kind ~= 'D' then return 'M' end
    if call('EXISTS', key) == 1 then return 'F' end
    return nil
  end
  local newest = sub(state, IDS_AT, SHOWN_BYTES)
  local lives = byte(state) == LIVES
  if lives and newest == base and kind ~= 'C' and kind ~= 'D' then return nil end
  if knows(key, state, commit) then
    if byte(state) == TOMBSTONE_OF_NOTHING and newest == commit then return 'M' end
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
  if base ~= NONE and newest ~= base then return 'C' end
  return nil
end

-- Reads the fields that follow a header: what to set, names and values in turn, and what to remove.
local function fields(sets, outside, removes)
  local changed, removed = {}, {}
  local name, value, size
  for _ = 1, sets do
    size, value, at = read('<I4I4', requests, at)
    name = sub(requests, at, at + size - 1)
    at = at + size
    changed[#changed + 1] = name
    changed[#changed + 1] = sub(requests, at, at + value - 1)
    at = at + value
  end
  for _ = 1, outside do
    name, at = read('<I4c0', requests, at)
    changed[#changed + 1] = name
    changed[#changed + 1] = ARGV[next_outside]
    next_outside = next_outside + 1
  end
  for _ = 1, removes do
    name, at = read('<I4c0', requests, at)
    removed[#removed + 1] = name
  end
  return changed, removed
end

-- Puts what does not go the short way below.
local function put(kind, key, state, start, head, changed, removed)
  local all = {STATE, start, HEAD, head}
  if kind == 'P' and #state < FULL_BYTES then
    all[2] = start .. sub(state, IDS_AT)
  elseif state then
    all[5], all[6] = OLDER, history(key, state)
    if kind ~= 'P' then call('DEL', key) end
  end
  for _, item in ipairs(changed) do all[#all + 1] = item end
  local err = write('HSET', key, all)
  if not err and #removed > 0 then write('HDEL', key, removed) end
  return err
end

local function delete(key, state, version, incarnation, commit, time)
  local kind = state and 'T' or 't'
  local head = state and sub(state, 2, 25) or version .. incarnation
  local ids = commit .. history(key, state)
  if state then call('DEL', key) end
  local reply = pcall('HSET', key, STATE, kind .. head .. ids)
  if type(reply) == 'table' and reply.err then return reply.err end
  call('PEXPIRE', key, time)
  announce(key, kind, sub(head, 1, 8), commit)
end

local function touch(key, state, commit, times, time)
  if not state then return 'M' end
  if byte(state) ~= LIVES then return 'X' end
  if sub(state, IDS_AT, SHOWN_BYTES) ~= commit then return 'C' end
  local head = call('HGET', key, HEAD)
  if not head then return 'F' end
  if read('<d', times) < read('<d', head) then return 'A' end
  local reply = pcall('HSET', key, HEAD, times .. sub(head, 17))
  if type(reply) == 'table' and reply.err then return 'E', reply.err end
  expire(key, time)
  return 'A'
end

for i = 1, #KEYS do
  local key = KEYS[i]
  local kind, sets, outside, removes, incarnation, commit, version, base, time, head, behind =
    read('<c1I4I4I4c16c16c8c16dI4c0', requests, at)
  at = behind

  local code, err, reply
  local state = pcall('HGET', key, STATE)
  if kind == 'P' and sets == 1 and outside + removes == 0 and type(state) == 'string'
    and byte(state) == LIVES and #state >= SHOWN_BYTES and #state < FULL_BYTES
    and sub(state, IDS_AT, SHOWN_BYTES) == base then
    -- Nearly all there is: one field of a session changed, on the newest commit.
    local name_bytes, value_bytes
    name_bytes, value_bytes, at = read('<I4I4', requests, at)
    local value_at = at + name_bytes
    reply = pcall('HSET', key, STATE, 'L' .. version .. incarnation .. commit .. sub(state, IDS_AT),
      HEAD, head, sub(requests, at, value_at - 1),
      sub(requests, value_at, value_at + value_bytes - 1))
    at = value_at + value_bytes
    if type(reply) == 'table' then
      code, err = 'E', reply.err
    else
      expire(key, time)
      announce(key, 'L', version, commit)
      code = 'A'
    end
  else
    local changed, removed = fields(sets, outside, removes)
    if type(state) == 'table' then
      code, err = 'E', state.err
    elseif state and not is_state(state) then
      code = 'F'
    elseif kind == 'T' then
      code, err = touch(key, state, commit, head, time)
    else
      code = objection(kind, key, state, incarnation, commit, base)
      if not code then
        if kind == 'D' then
          err = delete(key, state, version, incarnation, commit, time)
          code = state and 'A' or 'M'
        else
          local start = 'L' .. version .. incarnation .. commit
          err = put(kind, key, state, start, head, changed, removed)
          code = 'A'
          if not err then
            expire(key, time)
            announce(key, 'L', version, commit)
          end
        end
        if err then code = 'E' end
      end
    end
  end
  codes[i] = code
  if err then
    details[#details + 1] = err
  elseif code == 'C' or code == 'X' or code == 'D' then
    local is_forgotten = code ~= 'D' and may_be_forgotten(kind, key, state, base)
    details[#details + 1] = sub(state, 1, SHOWN_BYTES) .. (is_forgotten and 'F' or '-')
  end
end

if #changes > 0 and ARGV[1] ~= '' then
  redis.call('PUBLISH', ARGV[1], ARGV[2] .. table.concat(changes))
end
return {table.concat(codes), unpack(details)}
