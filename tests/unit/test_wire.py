"""What goes over the wire and what is made of what comes."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from kafka_broker import _wire as wire
from kafka_broker._event import EventObject, Hop, Request, request_of
from kafka_broker.errors import (
    BrokerError,
    EventDecodeError,
    NoHandlerError,
    RemoteError,
    ReplyTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

SECRET = "hunter2"
ENVELOPED = Request(topic="t", partition=None, correlation=b"c")

TEXT = st.text(st.characters(codec="utf-8"))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**90)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
HEADER_NAMES = st.sampled_from(
    [
        wire.CORRELATION_ID,
        wire.REPLY_TOPIC,
        wire.REPLY_PARTITION,
        wire.INSTANCE,
        wire.DEADLINE,
        wire.FORWARDED,
        "traceparent",
    ]
)
HEADERS = st.lists(
    st.tuples(
        HEADER_NAMES,
        st.none() | st.binary(max_size=20) | st.from_regex(rb"[0-9]{0,30}", fullmatch=True),
    ),
    max_size=8,
)


class Arrived(NamedTuple):
    """One record as a transport would read it."""

    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()
    key: bytes | None = None
    topic: str = "Orders"
    partition: int = 3
    offset: int = 77
    timestamp: int = 0


def read(value: object, *headers: tuple[str, bytes | None]) -> EventObject[Any]:
    """Decode a value that is given as JSON, not as bytes."""
    return wire.decode(Arrived(json.dumps(value).encode(), headers))


def request_from(*headers: tuple[str, bytes | None], value: object = None) -> Request:
    """Decode a record with these headers; returns what it remembers of its sender."""
    return sender_of(read({"x": 1} if value is None else value, *headers))


def sender_of(event: EventObject[Any]) -> Request:
    """Return what an event remembers of its sender."""
    request = request_of(event)
    assert request is not None
    return request


def texts_of(error: BaseException) -> str:
    """Return the texts of an error and of all the errors behind it."""
    seen: dict[int, str] = {}
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen[id(one)] = f"{one!s} {one!r}"
            pending += [one.__cause__, one.__context__]
    return "\n".join(seen.values())


# What is encoded is decoded


@given(data=JSON, name=TEXT, correlation_id=TEXT, status=TEXT)
def test_every_event_survives_the_wire(
    data: Any, name: str, correlation_id: str, status: str
) -> None:
    """Whatever JSON can say comes out as it went in, and so do the names around it."""
    sent = EventObject(correlation_id=correlation_id, event=name, data=data, status=status)
    got = wire.decode(Arrived(wire.encode(sent, "Shop")))
    assert (correlation_id, name, repr(data), status) == (
        got.correlation_id,
        got.event,
        repr(got.data),
        got.status,
    )


@given(data=JSON)
def test_every_value_is_json_for_others_too(data: Any) -> None:
    """Python's own parser reads the envelope, so that every peer can."""
    envelope = json.loads(wire.encode(EventObject(event="a", data=data), "Shop"))
    assert ["correlation_id", "event", "data", "status", "audit_log"] == list(envelope)
    assert repr(data) == repr(envelope["data"])


HOPS = st.builds(
    Hop,
    location=TEXT,
    event=TEXT,
    data=JSON,
    time_sent=st.none() | st.integers(0, 2**40),
    time_received=st.none() | st.integers(0, 2**40),
)


@given(st.lists(HOPS, max_size=4))
def test_the_audit_log_survives_the_wire_and_grows_by_one_hop(log: list[Hop]) -> None:
    """The hops so far stay as they are, in order, and the sender's is added."""
    got = wire.decode(Arrived(wire.encode(EventObject(event="a", audit_log=log), "Shop")))
    assert log == got.audit_log[:-1]
    assert ("Shop", "a") == (got.audit_log[-1].location, got.audit_log[-1].event)


def test_a_model_is_data() -> None:
    """A pydantic model goes out as the JSON object it stands for."""

    class Charge(BaseModel):
        amount: int
        id: uuid.UUID

    charge = Charge(amount=3, id=uuid.UUID(int=5))
    got = wire.decode(Arrived(wire.encode(EventObject(event="a", data=charge), "Shop")))
    assert {"amount": 3, "id": str(uuid.UUID(int=5))} == got.data


def test_encoding_takes_a_snapshot_and_changes_nothing() -> None:
    """The event is the same after it was encoded, and later changes do not get into the bytes."""
    data = {"items": [1]}
    event = EventObject(event="a", data=data, audit_log=[Hop(location="First")])
    before = event.model_dump()
    value = wire.encode(event, "Shop")
    assert before == event.model_dump()
    data["items"].append(2)
    event.audit_log.append(Hop(location="Other"))
    got = wire.decode(Arrived(value))
    assert {"items": [1]} == got.data
    assert ["First", "Shop"] == [hop.location for hop in got.audit_log]


def test_decoding_notes_when_the_last_hop_ended() -> None:
    """Only the last hop gets the time it was received at, in whole seconds."""
    before = int(time.time())
    sent = EventObject(event="a", audit_log=[Hop(location="First", time_sent=1)])
    first, last = wire.decode(Arrived(wire.encode(sent, "Shop"))).audit_log
    assert first.time_received is None
    assert isinstance(last.time_received, int)
    assert before <= last.time_received <= time.time()


@pytest.mark.parametrize(
    "data",
    [object(), {"x": object()}, "\ud800", {"\ud800": 1}, b"\xff\xfe"],
    ids=["object", "nested object", "surrogate", "surrogate key", "no UTF-8"],
)
def test_data_without_a_form_in_json_is_a_type_error(data: object) -> None:
    """It is refused where it is produced, naming the event."""
    with pytest.raises(TypeError, match=r"event 'card\.charge' has no form in JSON"):
        wire.encode(EventObject(event="card.charge", data=data), "Shop")


def test_data_that_contains_itself_is_a_type_error() -> None:
    """A cycle and a nesting without an end are refused like other data that is no JSON."""
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for data in (cycle, deep):
        with pytest.raises(TypeError, match="has no form in JSON"):
            wire.encode(EventObject(event="a", data=data), "Shop")
    while isinstance(deep, list):
        deep = deep.pop()


class Leaky(BaseModel):
    """A model whose own serializer quotes the value in its error."""

    password: str

    @field_serializer("password")
    def show(self, value: str) -> str:
        raise ValueError(value)


@pytest.mark.parametrize(
    "data",
    [
        Leaky(password=SECRET),
        f"{SECRET}\ud800",
        {f"{SECRET}\ud800": 1},
        SECRET.encode() + b"\xff",
        {SECRET: object()},
        (int(one) for one in [SECRET]),
    ],
    ids=["serializer", "surrogate", "key", "bytes", "object", "generator"],
)
def test_the_error_of_encoding_quotes_no_payload(data: object) -> None:
    """Neither its text nor that of any error behind it shows the data."""
    with pytest.raises(TypeError) as caught:
        wire.encode(EventObject(event="a", data=data), "Shop")
    assert SECRET not in texts_of(caught.value)


# Whatever comes in


ODD_ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "correlation_id": JSON,
        "event": JSON,
        "data": JSON,
        "status": JSON,
        "audit_log": JSON
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "location": JSON,
                    "event": JSON,
                    "data": JSON,
                    "time_sent": JSON,
                    "time_received": JSON,
                },
            ),
            max_size=3,
        ),
        "extra": JSON,
    },
)
VALUES = (
    st.none()
    | st.binary(max_size=60)
    | TEXT.map(str.encode)
    | (JSON | ODD_ENVELOPES).map(lambda value: json.dumps(value).encode())
)


DEEP = b'{"event":"a","correlation_id":"b","data":' + b"[" * 210 + b"]" * 210 + b"}"


@given(value=VALUES, headers=HEADERS)
@example(value=b"[" * 100_000, headers=[])
@example(value=DEEP, headers=[])
@example(
    value=b'{"event":"a","correlation_id":"b","data":' + b"[" * 5000 + b"]" * 5000 + b"}",
    headers=[],
)
@example(value=b'{"a":' * 100_000, headers=[])
@example(value=rb'{"event":"a","correlation_id":"\ud800","data":1}', headers=[])
@example(value=rb'"\udfff"', headers=[])
@example(value=b"1" * 100_000, headers=[])
@example(value=b'{"event":"a","correlation_id":' + b"1" * 100_000 + b"}", headers=[])
@example(value=b'{"event":"a","status":1,"correlation_id":' + b"1" * 4300 + b"}", headers=[])
@example(value=b'{"event":"a","status":1,"correlation_id":-' + b"1" * 4299 + b"}", headers=[])
@example(
    value=b'{"event":"a","correlation_id":1e999,"audit_log":[{"time_sent":1e999}]}', headers=[]
)
@example(value=b"NaN", headers=[(wire.DEADLINE, b"9" * 100_000), (wire.REPLY_TOPIC, b"\xff")])
@example(value=b"", headers=[(wire.REPLY_PARTITION, b"9" * 100_000), (wire.REPLY_TOPIC, b"t")])
@example(value=b"\xef\xbb\xbf{}", headers=[])
def test_any_bytes_are_an_event_or_a_decode_error(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    """No record of a peer, however odd, leads to anything else."""
    try:
        event = wire.decode(Arrived(value, headers))
    except EventDecodeError:
        assert value is not None
        return
    wire.encode(event, "Shop")
    if (request := request_of(event)) is not None:
        wire.reply_headers(request)
        wire.forward_headers(request)
        wire.encode_reply(event, None, request, "Shop")
    wire.error_of(event)


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"hunter2", b"\xff hunter2", b'{"hunter2": }', b'"hunter2\\ud800"', b'["hunter2"'],
)
def test_the_error_of_decoding_tells_where_and_quotes_no_payload(value: bytes) -> None:
    """It names topic, partition and offset; neither it nor any error behind it shows the bytes."""
    with pytest.raises(EventDecodeError, match=r"the value of Orders:3:77 is not JSON") as caught:
        wire.decode(Arrived(value))
    assert SECRET not in texts_of(caught.value)
    assert isinstance(caught.value, (BrokerError, ValueError))


def test_a_tombstone_is_an_event_without_name_and_data() -> None:
    """A record without a value is an event that a storage can hold."""
    event = wire.decode(Arrived(None))
    assert ("", None) == (event.event, event.data)
    assert request_of(event) is None


def test_a_tombstone_may_be_answered() -> None:
    """Its reply address is in its headers, as of every other record."""
    headers = [(wire.CORRELATION_ID, b"c-1"), (wire.REPLY_TOPIC, b"Shop.replies")]
    event = wire.decode(Arrived(None, headers))
    assert ("c-1", "Shop.replies") == (event.correlation_id, sender_of(event).topic)


@given(
    JSON.filter(
        lambda value: not (isinstance(value, dict) and {"correlation_id", "event"} <= value.keys())
    )
)
@example({"event": "sale", "amount": 3})
@example({"event": "sale", "data": {"a": 1}, "status": "x"})
@example({"correlation_id": "c", "amount": 3})
@example(None)
def test_a_foreign_value_is_data(value: Any) -> None:
    """JSON that is no envelope is, with all its fields, the data of an event without a name."""
    event = read(value)
    assert ("", repr(value)) == (event.event, repr(event.data))


def test_a_foreign_event_has_the_id_of_its_header() -> None:
    """What Spring or NestJS send has its correlation id in a header only."""
    assert "c-1" == read({"amount": 3}, (wire.CORRELATION_ID, b"c-1")).correlation_id


def test_the_id_of_an_envelope_wins_over_the_header() -> None:
    """A peer with envelopes knows its event by the id inside; the header is echoed."""
    event = read({"correlation_id": "in", "event": "a"}, (wire.CORRELATION_ID, b"out"))
    assert "in" == event.correlation_id


def test_unknown_fields_are_ignored() -> None:
    """A later version may say more, in the envelope and in the audit log."""
    event = read(
        {
            "correlation_id": "c",
            "event": "a",
            "data": 1,
            "version": 9,
            "audit_log": [{"location": "Shop", "more": True}],
        }
    )
    assert ("c", "a", 1) == (event.correlation_id, event.event, event.data)
    assert ["Shop"] == [hop.location for hop in event.audit_log]


@pytest.mark.parametrize("wrong", [None, 5, [], {}, "x", 1.5, True])
def test_a_field_of_a_wrong_type_takes_its_default(wrong: object) -> None:
    """The rest of the envelope is read all the same."""
    good = {"correlation_id": "c", "event": "a", "data": {"x": 1}, "status": "pending"}
    for field, default in (("status", "pending"), ("audit_log", [])):
        if not isinstance(wrong, str if field == "status" else list):
            event = read({**good, field: wrong})
            assert default == getattr(event, field)
            assert ("c", "a", {"x": 1}) == (event.correlation_id, event.event, event.data)


def test_a_numeric_id_is_text() -> None:
    """Peers that count their events are understood."""
    assert "17" == read({"correlation_id": 17, "event": "a"}).correlation_id
    assert "17" == read({"correlation_id": 17, "event": "a", "status": None}).correlation_id


def test_an_id_that_is_none_gets_a_new_one() -> None:
    """An envelope whose id cannot be used is still an event."""
    event = read({"correlation_id": None, "event": "a", "data": 1})
    assert ("a", 1) == (event.event, event.data)
    assert event.correlation_id


def test_broken_hops_are_left_out() -> None:
    """The readable hops of an audit log survive the unreadable ones."""
    log = [{"location": "Shop"}, {"location": None}, 5, None, {"location": "Bank", "event": None}]
    event = read({"correlation_id": "c", "event": "a", "audit_log": log})
    assert ["Shop"] == [hop.location for hop in event.audit_log]


def test_a_repeated_header_counts_by_its_last_value() -> None:
    """Kafka allows a name twice; like its own clients we take the last."""
    first, last = (wire.CORRELATION_ID, b"first"), (wire.CORRELATION_ID, b"last")
    assert "last" == read({"x": 1}, first, last).correlation_id


# Headers, both ways


@given(
    correlation_id=TEXT.filter(bool),
    topic=TEXT.filter(bool),
    partition=st.integers(0, 999_999),
    instance=TEXT,
    deadline=st.none() | st.floats(0, 4e9),
)
def test_request_headers_are_read_back(
    correlation_id: str, topic: str, partition: int, instance: str, deadline: float | None
) -> None:
    """What a request says about its reply is what the other side remembers."""
    headers = (
        *wire.request_headers(correlation_id, deadline),
        *wire.address(topic, partition, instance),
    )
    event = EventObject(event="a", correlation_id=correlation_id)
    request = request_of(wire.decode(Arrived(wire.encode(event, "Shop"), headers)))
    assert request is not None
    assert (topic, partition) == (request.topic, request.partition)
    assert (correlation_id.encode(), instance.encode()) == (request.correlation, request.instance)
    assert request.enveloped
    assert (deadline is not None) == request.awaited
    if deadline is None:
        assert request.deadline is None
    else:
        assert pytest.approx(deadline, abs=0.001) == request.deadline


@pytest.mark.parametrize(
    ("raw", "partition"),
    [
        (b"\x00\x00\x00\x00", 0),
        (b"\x00\x00\x00\x07", 7),
        (b"\x00\x00\x01\x02", 258),
        (b"7", 7),
        (b"12", 12),
        (b"123", 123),
        (b"1234", 1234),
        (b"0007", 7),
        (b"12345", 12345),
        (b"0000012", 12),
        (b"", None),
        (None, None),
        (b"-1", None),
        (b"\xff\xff\xff\xff", None),
        (b"\x7f\xff\xff\xff", None),
        (b"abcd", None),
        (b"abc", None),
        (b"9999999", None),
        (b"9" * 100_000, None),
        (b"\x00\x00\x00\x00\x00", None),
        ("٣".encode(), None),
        (b" 12 ", None),
    ],
)
def test_a_reply_partition_is_four_bytes_or_digits(
    raw: bytes | None, partition: int | None
) -> None:
    """Spring's int, NestJS's text, four digits as text; whatever is neither means any partition."""
    headers = (wire.REPLY_TOPIC, b"Shop.replies"), (wire.REPLY_PARTITION, raw)
    assert partition == request_from(*headers).partition


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        (b"1795474891250", 1795474891.25),
        (b"0", 0.0),
        (b"", None),
        (None, None),
        (b"-5", None),
        (b"1e3", None),
        (b"soon", None),
        (b"9" * 16, None),
        (b"9" * 100_000, None),
    ],
)
def test_a_deadline_is_milliseconds_in_digits(raw: bytes | None, seconds: float | None) -> None:
    """Anything else is no deadline."""
    assert seconds == request_from((wire.REPLY_TOPIC, b"t"), (wire.DEADLINE, raw)).deadline


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"c-1", "c-1"),
        ("ü".encode(), "ü"),
        (
            uuid.UUID("8e6786f1-891e-4ae9-8f8f-2d294c0adb4f").bytes,
            "8e6786f1-891e-4ae9-8f8f-2d294c0adb4f",
        ),
        (b"\xff\x00\x01", "ff0001"),
        (b"\xff" * 17, "ff" * 17),
    ],
    ids=["text", "unicode", "UUID of 16 bytes", "odd bytes", "17 bytes"],
)
def test_a_correlation_id_is_shown_as_text_and_echoed_byte_by_byte(raw: bytes, text: str) -> None:
    """Spring sends 16 bytes, NestJS text; both get back exactly what they sent."""
    event = read({"x": 1}, (wire.CORRELATION_ID, raw), (wire.REPLY_TOPIC, b"t"))
    assert (text, raw) == (event.correlation_id, sender_of(event).correlation)
    assert raw == dict(wire.reply_headers(sender_of(event)))[wire.CORRELATION_ID]


def _is_utf8(raw: bytes) -> bool:
    return raw.decode("utf-8", "replace").encode() == raw


@given(st.binary())
def test_any_correlation_id_has_a_text(raw: bytes) -> None:
    """No bytes of a header are refused as an id, and what is shown can be sent again."""
    assert raw == wire.id_text(raw).encode() or not _is_utf8(raw)


def test_a_peer_without_instance_header_waits_for_sure() -> None:
    """Spring and NestJS put a reply topic into requests only; we into every event."""
    address = (wire.REPLY_TOPIC, b"t")
    ours = (wire.INSTANCE, b"shop-1")
    cases = [(address,), (address, ours), (address, ours, (wire.DEADLINE, b"5"))]
    assert [True, False, True] == [request_from(*headers).awaited for headers in cases]


def test_nobody_to_answer_is_no_request() -> None:
    """Without a reply topic and without an audit log nothing is remembered."""
    assert request_of(read({"x": 1})) is None
    assert request_of(read({"x": 1}, (wire.CORRELATION_ID, b"c"))) is None
    assert request_of(read({"x": 1}, (wire.REPLY_TOPIC, b""))) is None
    assert request_of(read({"x": 1}, (wire.REPLY_TOPIC, None))) is None


def test_a_reply_is_led_by_id_and_instance() -> None:
    """The one who waits finds both in the headers and needs to decode nothing else."""
    request = Request("Shop.replies", 3, b"c-1", instance=b"shop-1")
    expected = ((wire.CORRELATION_ID, b"c-1"), (wire.INSTANCE, b"shop-1"))
    assert expected == wire.reply_headers(request)
    request.instance = None
    assert ((wire.CORRELATION_ID, b"c-1"),) == wire.reply_headers(request)


@given(
    partition=st.none() | st.integers(0, 999_999),
    instance=st.none() | st.binary(),
    deadline=st.none() | st.integers(0, 10**12).map(lambda ms: ms / 1000),
    correlation=st.binary(min_size=1),
)
def test_a_forwarded_event_keeps_the_address_of_its_first_sender(
    partition: int | None, instance: bytes | None, deadline: float | None, correlation: bytes
) -> None:
    """The next module answers the first sender; but it does not have to, so nobody surely waits."""
    first = Request("Shop.replies", partition, correlation, instance, deadline, awaited=True)
    value = wire.encode(EventObject(event="a"), "Bank")
    second = request_of(wire.decode(Arrived(value, wire.forward_headers(first))))
    assert second is not None
    assert not second.awaited
    assert (first.topic, partition, correlation, instance) == (
        second.topic,
        second.partition,
        second.correlation,
        second.instance,
    )
    assert deadline == second.deadline


def test_a_dead_letter_keeps_its_headers_and_tells_why() -> None:
    """Own headers first, then the coordinates and the class of the error; no text of it."""
    record = Arrived(b"?", [("a", b"1"), ("none", None), ("a", b"2")])
    headers = wire.dead_letter_headers(record, "Orders", 3, ValueError(SECRET))
    expected = (
        ("a", b"1"),
        ("none", None),
        ("a", b"2"),
        (wire.ORIGIN, b"Orders:3:77"),
        (wire.GROUP, b"Orders"),
        (wire.ATTEMPT, b"3"),
        (wire.FAILURE, b"ValueError"),
    )
    assert expected == headers


# Replies


def test_a_reply_has_the_id_and_the_log_of_its_request() -> None:
    """It is named `respond`, is completed, and its audit log begins with the first sender."""
    asked = wire.decode(Arrived(wire.encode(EventObject(event="a", data=1), "Shop")))
    envelope = json.loads(wire.encode_reply(asked, {"sum": 2}, ENVELOPED, "Bank"))
    assert (asked.correlation_id, "respond", "completed", {"sum": 2}) == (
        envelope["correlation_id"],
        envelope["event"],
        envelope["status"],
        envelope["data"],
    )
    assert ["Shop", "Bank"] == [hop["location"] for hop in envelope["audit_log"]]
    assert ["Shop"] == [hop.location for hop in asked.audit_log]


def test_a_peer_without_envelopes_gets_bare_data() -> None:
    """Who sent bare data is answered with bare data; who sent an envelope with one."""
    bare = read({"amount": 3}, (wire.REPLY_TOPIC, b"t"))
    enveloped = read({"event": "a", "correlation_id": "c"}, (wire.REPLY_TOPIC, b"t"))
    for event, expected in ((bare, b'{"sum":4}'), (enveloped, None)):
        value = wire.encode_reply(event, {"sum": 4}, sender_of(event), "Bank")
        if expected is None:
            assert {"sum": 4} == json.loads(value)["data"]
        else:
            assert expected == value


def test_bare_data_without_a_form_in_json_is_a_type_error() -> None:
    """The same refusal as for an envelope."""
    bare = read({"amount": 3}, (wire.REPLY_TOPIC, b"t"))
    with pytest.raises(TypeError, match="has no form in JSON"):
        wire.encode_reply(bare, object(), sender_of(bare), "Bank")


def test_a_problem_never_shows_the_text_of_a_handlers_exception() -> None:
    """The requester learns the class of the exception and where the log is, nothing more."""
    event = EventObject(event="card.charge")
    for error in (
        ValueError(SECRET),
        KeyError(SECRET),
        ReplyTimeoutError(SECRET, 1),
        NoHandlerError(SECRET, "another id"),
    ):
        problem = wire.problem(error, event, "Payments")
        assert SECRET not in json.dumps(problem)
        assert (500, "handler-failed") == (problem["status"], problem["code"])
        assert type(error).__name__ in problem["detail"]


def test_a_problem_is_rfc_9457() -> None:
    """Type, title, status and detail, and what our own side reads out of it."""
    event = EventObject(event="card.charge")
    error = NoHandlerError("card.charge", event.correlation_id)
    expected = {
        "type": "urn:kafka-broker:no-handler",
        "title": "no handler",
        "status": 501,
        "code": "no-handler",
        "detail": "no handler is bound to event 'card.charge'",
        "module": "Payments",
        "event": "card.charge",
    }
    assert expected == wire.problem(error, event, "Payments")


def test_data_that_does_not_fit_is_the_requesters_problem() -> None:
    """The text of an `EventDecodeError` is ours and travels."""
    problem = wire.problem(
        EventDecodeError("amount is missing"), EventObject(event="a"), "Payments"
    )
    assert (422, "bad-data", "amount is missing") == (
        problem["status"],
        problem["code"],
        problem["detail"],
    )


def test_an_error_of_a_module_further_on_is_not_no_handler_here() -> None:
    """A handler that met a missing handler elsewhere has failed; its own name is bound."""
    event = EventObject(event="card.charge")
    problem = wire.problem(NoHandlerError("bank.book", "another id"), event, "Payments")
    assert "handler-failed" == problem["code"]


def failed(error: Exception) -> Any:
    """Return what a requester makes of *error* in the handler."""
    event = EventObject(event="card.charge", correlation_id="c-1")
    problem = wire.problem(error, event, "Payments")
    value = wire.encode_reply(event, problem, ENVELOPED, "Payments", status="error")
    return wire.error_of(wire.decode(Arrived(value)))


def test_an_error_reply_is_a_remote_error() -> None:
    """Its fields are those of the problem."""
    error = failed(ZeroDivisionError(SECRET))
    assert isinstance(error, RemoteError)
    assert ("c-1", 500, "handler-failed") == (error.correlation_id, error.status, error.code)
    assert (
        "ZeroDivisionError in the handler of 'card.charge'; see the log of Payments" == error.detail
    )


def test_an_error_reply_may_be_a_missing_handler() -> None:
    """The requester sees the same class as the one that the other side raised."""
    error = failed(NoHandlerError("card.charge", "c-1"))
    assert isinstance(error, NoHandlerError)
    assert ("c-1", "card.charge") == (error.correlation_id, error.event)


def test_a_reply_that_is_no_error_is_none() -> None:
    """Only the status tells; the data may look as it likes."""
    for status in ("completed", "pending", "success", ""):
        assert (
            wire.error_of(EventObject(event="respond", status=status, data={"status": 500})) is None
        )


@pytest.mark.parametrize(
    "data",
    [None, "boom", [], {}, {"status": "x"}, {"status": None}, {"status": 200}, {"status": 7}],
)
def test_an_error_reply_without_a_problem_is_a_remote_error_500(data: Any) -> None:
    """Peers that know no RFC 9457 have failed all the same, with a status that HTTP has for it."""
    error = wire.error_of(EventObject(event="respond", status="error", data=data))
    assert isinstance(error, RemoteError)
    assert (500, "error", "no detail was given") == (error.status, error.code, error.detail)


def test_the_status_of_a_problem_is_kept() -> None:
    """A handler of another kind may have refused with a status of its own."""
    data = {"status": 402, "code": "no-money", "detail": "the card is empty"}
    error = wire.error_of(EventObject(event="respond", status="error", data=data))
    assert isinstance(error, RemoteError)
    assert (402, "no-money", "the card is empty") == (error.status, error.code, error.detail)


# kafka-broker 0.4


CAPTURED_REQUEST = b"""{"correlation_id": "8e6786f1-891e-4ae9-8f8f-2d294c0adb4f", \
"status": "pending", "event": "math.double", "data": {"value": 21}, \
"audit_log": [{"data": {"value": 21}, "event": "math.double", "location": "io.org.230123", \
"time_sent": 1795474891, "time_received": null}]}"""
CAPTURED_REPLY = b"""{"correlation_id": "8e6786f1-891e-4ae9-8f8f-2d294c0adb4f", \
"status": "completed", "event": "respond", \
"data": {"message": "doubled", "status_code": 200, "payload": {"result": 42}}, \
"audit_log": [{"data": {"value": 21}, "event": "math.double", "location": "io.org.230123", \
"time_sent": 1795474891, "time_received": 1795474893}, {"data": {"message": "doubled", \
"status_code": 200, "payload": {"result": 42}}, "event": "respond", "location": "io.svc.230123", \
"time_sent": 1795474893, "time_received": null}]}"""


def test_a_captured_request_of_0_4_is_read() -> None:
    """Every field is understood, and the reply goes to the first location, to any partition."""
    assert 267 == len(CAPTURED_REQUEST)
    event = wire.decode(Arrived(CAPTURED_REQUEST))
    assert ("8e6786f1-891e-4ae9-8f8f-2d294c0adb4f", "math.double", {"value": 21}, "pending") == (
        event.correlation_id,
        event.event,
        event.data,
        event.status,
    )
    assert 1795474891 == event.audit_log[0].time_sent
    expected = Request("io.org.230123", None, b"8e6786f1-891e-4ae9-8f8f-2d294c0adb4f")
    assert expected == request_of(event)


def test_a_captured_reply_of_0_4_is_read() -> None:
    """It is completed, nothing is remembered to answer it to, and its log is whole."""
    assert 505 == len(CAPTURED_REPLY)
    event = wire.decode(Arrived(CAPTURED_REPLY))
    assert ("respond", "completed") == (event.event, event.status)
    assert {"message": "doubled", "status_code": 200, "payload": {"result": 42}} == event.data
    assert ["io.org.230123", "io.svc.230123"] == [hop.location for hop in event.audit_log]
    assert request_of(event) is None
    assert wire.error_of(event) is None


def rules_kept(value: bytes, *, status: str, first: str, last: str) -> dict[str, Any]:
    """Check an envelope of ours against the table of what 0.4 needs; returns the envelope."""
    envelope: dict[str, Any] = json.loads(value.decode("utf-8"))
    assert isinstance(envelope["correlation_id"], str)
    assert status == envelope["status"]
    assert envelope["audit_log"]
    assert first == envelope["audit_log"][0]["location"]
    assert last == envelope["audit_log"][-1]["location"]
    for hop in envelope["audit_log"]:
        assert {"data", "event", "location", "time_sent", "time_received"} == hop.keys()
        assert type(hop["time_sent"]) is int
    assert envelope["audit_log"][-1]["time_received"] is None
    assert "last_update" not in envelope
    return envelope


def test_our_request_keeps_the_rules_of_0_4() -> None:
    """One hop with our location and whole seconds, status pending, data an object."""
    before = int(time.time())
    value = wire.encode(EventObject(event="math.double", data={"value": 21}), "Shop")
    envelope = rules_kept(value, status="pending", first="Shop", last="Shop")
    assert ("math.double", {"value": 21}) == (envelope["event"], envelope["data"])
    assert before <= envelope["audit_log"][0]["time_sent"] <= time.time()


def test_our_reply_keeps_the_rules_of_0_4() -> None:
    """It is a `respond`, completed; its first hop is the requester's, received at whole seconds."""
    event = wire.decode(Arrived(CAPTURED_REQUEST))
    value = wire.encode_reply(event, {"result": 42}, sender_of(event), "Shop")
    envelope = rules_kept(value, status="completed", first="io.org.230123", last="Shop")
    assert ("respond", {"result": 42}) == (envelope["event"], envelope["data"])
    first = envelope["audit_log"][0]
    assert ({"value": 21}, "math.double", 1795474891) == (
        first["data"],
        first["event"],
        first["time_sent"],
    )
    assert type(first["time_received"]) is int


def test_an_error_reply_keeps_the_rules_of_0_4() -> None:
    """Status error, an object as data."""
    event = wire.decode(Arrived(CAPTURED_REQUEST))
    problem = wire.problem(ValueError(SECRET), event, "Shop")
    value = wire.encode_reply(event, problem, sender_of(event), "Shop", status="error")
    envelope = rules_kept(value, status="error", first="io.org.230123", last="Shop")
    assert isinstance(envelope["data"], dict)
