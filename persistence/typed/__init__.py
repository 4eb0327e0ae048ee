"""Typed sessions: objects of the application in and out, plain MessagePack in between.

A `Schema` is one class for a whole session, whose attributes are the session's fields, or a mapping
of field names to types. msgspec Structs, dataclasses and pydantic models will do, also inside each
other and inside lists and dicts. What is stored is what a plain session has: maps, lists and
values; so an older or a newer class, or no class at all, can read it.

When the class has changed since a session was written:

- a field that was added gets its default;
- a field that was removed is kept and ignored, also when the object is written back;
- a field whose type has changed: the ``migrate`` hook of the class that the field belongs to is
  asked, if there is one: a class method or static method that gets what is stored of the object,
  plain, and returns what is to be read instead. If there is none, or if that does not fit either,
  that of the class around it is asked, and so on. If none helps: `SchemaMismatch`. Nothing stored
  is changed by reading.

What is written as an object has to fit as well: what could not be read back is refused.

Text is no number and the other way round: a value of another kind than the type says is never
converted silently (pydantic models convert what pydantic converts, unless they are strict).
"""

from persistence.typed.dumping import plain as plain
from persistence.typed.schema import Schema as Schema
from persistence.typed.schema import TypedDraft as TypedDraft

__all__ = ["Schema", "TypedDraft", "plain"]
