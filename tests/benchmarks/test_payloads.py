from __future__ import annotations

import msgpack
import pytest

from benchmarks import payloads
from benchmarks.access import Accesses


@pytest.mark.parametrize("index", [0, 1, 7, 12_345, 999_999, 2_999_999])
def test_every_session_weighs_exactly_the_stated_bytes(index: int) -> None:
    assert len(msgpack.packb(payloads.session(index))) == payloads.SESSION_BYTES


def test_sessions_are_deterministic_and_differ() -> None:
    packed = {msgpack.packb(payloads.session(index)) for index in range(1000)}
    again = {msgpack.packb(payloads.session(index)) for index in range(1000)}
    assert len(packed) == 1000
    assert packed == again


def test_counting_a_visit_keeps_the_size() -> None:
    data = payloads.session(3)
    payloads.count_visit(data)
    assert data != payloads.session(3)
    assert len(msgpack.packb(data)) == payloads.SESSION_BYTES


def test_the_visits_of_a_session_start_at_its_index() -> None:
    assert payloads.session(42)["prefs"]["visits"] == 70_042


def test_generated_documents_have_the_stated_size_distribution() -> None:
    sizes = sorted(len(msgpack.packb(payloads.document(index))) for index in range(4000))
    for share, wanted_bytes in payloads.DOCUMENT_QUANTILES[1:-1]:
        if share in (0.93, 0.95):
            continue  # the steep step between profiles and transcripts
        assert sizes[int(share * len(sizes))] == pytest.approx(wanted_bytes, rel=0.25)


def test_documents_are_as_many_as_asked_for() -> None:
    assert sum(1 for _ in payloads.documents(5000)) == 5000


def test_accesses_are_alike_for_everybody_who_draws_them() -> None:
    accesses = Accesses(1000, 5000, update_share=0.05, zipf=0.99)
    drawn = accesses.draw(1)
    assert drawn == accesses.draw(1) != accesses.draw(2)
    assert {index for index, _ in drawn} <= set(range(1000))
    assert 0.02 < sum(update for _, update in drawn) / len(drawn) < 0.08


def test_zipf_accesses_have_favourites() -> None:
    indexes = Accesses(1000, 10_000, zipf=0.99).indexes()
    counts = sorted((indexes.count(index) for index in set(indexes)), reverse=True)
    assert sum(counts[:10]) > 0.25 * len(indexes)
