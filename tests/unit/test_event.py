"""The event that users make and get."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kafka_broker._event import (
    EventObject,
    Hop,
    Request,
    new_id,
    remember,
    request_of,
    with_data,
)


class Charge(BaseModel):
    amount: int


def test_a_uuid_is_taken_as_its_text() -> None:
    """Whoever has a UUID does not have to convert it."""
    given = uuid.uuid4()
    assert str(given) == EventObject(correlation_id=given, event="a").correlation_id


def test_an_id_is_a_random_uuid() -> None:
    """Version 4, as kafka-broker 0.4 writes them, in its usual form."""
    for made in (uuid.UUID(new_id()) for _ in range(1000)):
        assert (4, uuid.RFC_4122) == (made.version, made.variant)
    given = new_id()
    assert given == str(uuid.UUID(given))


def test_every_event_has_an_id_of_its_own() -> None:
    """Without a given id it is a new UUID."""
    ids = {EventObject(event="a").correlation_id for _ in range(100)}
    assert 100 == len(ids)
    assert ids == {str(uuid.UUID(one)) for one in ids}


def test_a_new_event_is_pending_and_has_made_no_hop() -> None:
    """Nothing but the name is needed."""
    event = EventObject(event="card.charge")
    assert ("card.charge", None, "pending", []) == (
        event.event,
        event.data,
        event.status,
        event.audit_log,
    )
    assert request_of(event) is None


def test_an_event_needs_a_name() -> None:
    """Without one no module can route it."""
    with pytest.raises(ValidationError):
        EventObject.model_validate({"data": 1})


def test_an_event_of_a_model_has_that_model_as_data() -> None:
    """`EventObject[Model]` validates its data."""
    event = EventObject[Charge].model_validate({"event": "a", "data": {"amount": "3"}})
    assert Charge(amount=3) == event.data


def test_an_event_of_a_model_refuses_other_data_without_quoting_it() -> None:
    """The error says what was expected and not what came."""
    with pytest.raises(ValidationError) as caught:
        EventObject[Charge].model_validate({"event": "a", "data": {"amount": "hunter2"}})
    assert "hunter2" not in str(caught.value)


def test_the_fields_of_an_event_can_be_set() -> None:
    """A handler may turn the event that it got into its answer, as with kafka-broker 0.4."""
    event = EventObject(event="a", data={"x": 1})
    event.data = {"y": 2}
    event.event = "respond"
    assert ("respond", {"y": 2}) == (event.event, event.data)


def test_what_an_event_remembers_privately_is_not_shown() -> None:
    """The reply address is neither in the dump nor in the repr."""
    event = EventObject(event="a")
    assert ["correlation_id", "event", "data", "status", "audit_log"] == list(event.model_dump())
    assert "_request" not in repr(event)


def test_two_events_share_no_audit_log() -> None:
    """Each has a list of its own."""
    first, second = EventObject(event="a"), EventObject(event="a")
    first.audit_log.append(Hop(location="Shop"))
    assert [] == second.audit_log


def test_a_copy_with_other_data_is_what_pydantic_would_make() -> None:
    """Its fields, those that were set, and the memory of its request are the same."""
    request = Request(topic="t", partition=None, correlation=b"c")
    event: EventObject[Any] = EventObject(
        event="a", data={"n": 1}, audit_log=[Hop(location="Shop")]
    )
    remember(event, request=request)
    copied, expected = with_data(event, 2), event.model_copy(update={"data": 2})
    assert expected == copied
    assert expected.model_fields_set == copied.model_fields_set
    assert expected.model_dump_json() == copied.model_dump_json()
    assert request_of(copied) is request
    copied.event = "b"
    assert ("a", {"n": 1}) == (event.event, event.data)
