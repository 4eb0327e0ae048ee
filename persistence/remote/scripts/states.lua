-- Returns what is stored of sessions, without their data.
--
-- KEYS[i]  key of a session
--
-- Returns for each key the first 41 bytes of its state (see commit.lua), empty where there is none,
-- and one letter where there is something else: W a key of another type, F a foreign hash.

local states = {}
for i = 1, #KEYS do
  local state = redis.pcall('HGET', KEYS[i], '\255state')
  if type(state) == 'table' then
    states[i] = 'W'
  elseif state then
    states[i] = string.sub(state, 1, 41)
  else
    states[i] = redis.call('EXISTS', KEYS[i]) == 1 and 'F' or ''
  end
end
return states
