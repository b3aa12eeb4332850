"""`EventObject`: one event, with the audit log of the hops it made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Protocol
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypeVar

if TYPE_CHECKING:
    from kafka_broker._lanes import Work
    from kafka_broker._transport import Record

PENDING = "pending"
COMPLETED = "completed"
ERROR = "error"
RESPOND = "respond"
"""The event name of every reply, as in kafka-broker 0.4."""

Data = TypeVar("Data", default=Any)


class Ending(Protocol):
    """Something that ends: a delivery, a stored event that is taken."""

    def done(self) -> bool: ...


@dataclass(slots=True)
class Request:
    """What an event that was received remembers of its sender: where a reply has to go.

    Attributes:
        topic: that the reply goes to.
        partition: of that topic; None when any will do.
        correlation: echoed byte by byte, for peers whose ids are not text.
        instance: the replica that asks, when it is one of this library.
        deadline: seconds since the epoch after which no reply is of use.
        awaited: whether somebody surely waits, so that ``None`` is a reply too.
        enveloped: whether the peer speaks in envelopes; else its reply is bare data.
        handed_on: the delivery of the answer, or of the event that went on to the next module.
        answered: whether that was the answer: it is answered once.
    """

    topic: str
    partition: int | None
    correlation: bytes
    instance: bytes | None = None
    deadline: float | None = None
    awaited: bool = False
    enveloped: bool = True
    handed_on: Ending | None = None
    answered: bool = False

    def __deepcopy__(self, memo: object) -> Request:
        """Return this one: an answer that is given with a copy of the event is the answer."""
        return self


class Hop(BaseModel):
    """One entry of an audit log: the module an event left, and when it reached the next one.

    Times are whole seconds since the epoch, as kafka-broker 0.4 writes them. We write no copy of
    the data; what a peer wrote there is kept.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", hide_input_in_errors=True)

    location: str
    event: str = ""
    data: Any = None
    time_sent: float | int | None = None
    time_received: float | int | None = None


_set_dict, _set_fields_set, _set_extra, _set_private = (
    BaseModel.__dict__[name].__set__
    for name in (
        "__dict__",
        "__pydantic_fields_set__",
        "__pydantic_extra__",
        "__pydantic_private__",
    )
)
"""Set what every pydantic model consists of; `object.__setattr__` takes twice as long."""


def _text(value: object) -> object:
    return str(value) if isinstance(value, (UUID, int)) else value


def new_id() -> str:
    """Return a random UUID (version 4) as text; by way of `uuid.uuid4` it costs 2 us more."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def note_receipt(event: EventObject[Any], seconds: int) -> None:
    """Write into the audit log when *event* was received; as an attribute it costs 0.3 us more."""
    if event.audit_log:
        hop = event.audit_log[-1]
        hop.__dict__["time_received"] = seconds
        hop.__pydantic_fields_set__.add("time_received")


def work_of(event: EventObject[Any]) -> Work | None:
    """Return the work that handles *event*, if it is one that was received and is being handled."""
    private = event.__pydantic_private__
    return None if private is None else private.get("_work")


def request_of(event: EventObject[Any]) -> Request | None:
    """Return whom to answer *event*, if anybody."""
    private = event.__pydantic_private__
    return None if private is None else private.get("_request")


def remember(
    event: EventObject[Any], *, request: Request | None = None, work: Work | None = None
) -> None:
    """Let *event* know whom to answer, and the work that handles it.

    Copies know both, as pydantic keeps a model's private attributes here; a pickle knows only whom
    to answer. Declared as such they cost 2 us for each event that is made or read.
    """
    private = event.__pydantic_private__
    if private is None:
        private = {}
        _set_private(event, private)
    if request is not None:
        private["_request"] = request
    if work is not None:
        private["_work"] = work


def with_data(event: EventObject[Any], data: object) -> EventObject[Any]:
    """Return a copy of *event* with other data; by pydantic's own way it costs 2 us more."""
    copied = type(event).__new__(type(event))
    private = event.__pydantic_private__
    _set_dict(copied, {**event.__dict__, "data": data})
    _set_fields_set(copied, {*event.__pydantic_fields_set__, "data"})
    _set_extra(copied, None)
    _set_private(copied, private and dict(private))
    return copied


class EventObject(BaseModel, Generic[Data]):
    """An event: a dotted name, its data, and the id that ties a reply to its request.

    ``EventObject[Model]`` is an event whose data is that pydantic model.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", hide_input_in_errors=True)

    correlation_id: Annotated[str, BeforeValidator(_text)] = Field(default_factory=new_id)
    """Ties a reply to its request; a UUID is taken as its text. A new UUID unless given."""
    event: str
    """The dotted name that the receiving module routes by, without the module's own name."""
    data: Data = None  # type: ignore[assignment]  # None stands for "no data" of any type
    """Anything that JSON can say, or a pydantic model."""
    status: str = PENDING
    """``pending`` in a request, ``completed`` or ``error`` in a reply."""
    audit_log: list[Hop] = Field(default_factory=list)
    """Every hop so far, the oldest first."""

    @property
    def record(self) -> Record | None:
        """The record that a handler's event was read from: its topic, partition, offset, key, ...

        None for an event that was made here, and for a reply.
        """
        work = work_of(self)
        return None if work is None else work.record

    @property
    def attempt(self) -> int:
        """The number of this try to handle the event, from 1; earlier replicas' tries count."""
        work = work_of(self)
        return 1 if work is None else work.attempt

    if TYPE_CHECKING:  # the constructor takes what a validator turns into the field's type

        def __init__(
            self,
            *,
            event: str,
            correlation_id: str | UUID = ...,
            data: Data = ...,
            status: str = ...,
            audit_log: list[Hop] = ...,
        ) -> None: ...
