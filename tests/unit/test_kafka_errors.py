"""Every exception of aiokafka becomes one of ours, whatever it is."""

from __future__ import annotations

import inspect

import pytest
from aiokafka import errors as kafka

from kafka_broker._transport.kafka_client import (
    FOREIGN,
    InvalidRecordError,
    describe,
    translated,
    unavailable,
    undelivered,
)
from kafka_broker.errors import BrokerUnavailableError, DeliveryError, DeliveryUnknownError

CLASSES = sorted(
    {
        thing
        for thing in vars(kafka).values()
        if inspect.isclass(thing) and issubclass(thing, Exception)
    },
    key=lambda thing: thing.__name__,
)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_translated(kind: type[Exception]) -> None:
    """Nothing that aiokafka raises gets past the seam; the original is the cause."""
    error = kind()
    with pytest.raises(BrokerUnavailableError) as caught, translated("reading"):
        raise error
    assert error is caught.value.__cause__
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_failed_append_has_an_outcome(kind: type[Exception]) -> None:
    """A failed append is refused, to be tried again, or unknown; never silently one of them."""
    ended = undelivered("t", kind())
    assert isinstance(ended, DeliveryError)
    assert "t" == ended.topic
    assert isinstance(ended, DeliveryUnknownError) or not issubclass(kind, _MAY_HAVE_APPENDED)


_MAY_HAVE_APPENDED = (
    kafka.RequestTimedOutError,
    kafka.KafkaConnectionError,
    kafka.NotEnoughReplicasAfterAppendError,
    kafka.NotLeaderForPartitionError,
    kafka.OutOfOrderSequenceNumber,
    kafka.KafkaTimeoutError,
)


@pytest.mark.parametrize(
    ("kind", "retriable"),
    [
        (kafka.MessageSizeTooLargeError, False),
        (kafka.TopicAuthorizationFailedError, False),
        (kafka.LeaderNotAvailableError, True),
        (InvalidRecordError, False),
        (kafka.NotEnoughReplicasError, True),
        (kafka.UnknownTopicOrPartitionError, True),
    ],
)
def test_what_surely_was_not_appended(kind: type[Exception], *, retriable: bool) -> None:
    """A refusal is final, a node that is not ready is tried again; neither is in the log."""
    ended = undelivered("t", kind())
    assert (DeliveryError, retriable) == (type(ended), ended.retriable)


@pytest.mark.parametrize("error", [OSError("refused"), TimeoutError(), ConnectionResetError()])
def test_errors_of_the_network_are_translated(error: Exception) -> None:
    """What the sockets below aiokafka raise is translated as well."""
    assert isinstance(error, FOREIGN)
    assert type(error).__name__ in describe(error)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (kafka.ClusterAuthorizationFailedError, "permission"),
        (kafka.GroupAuthorizationFailedError, "permission"),
        (kafka.KafkaConnectionError, "bootstrap_servers"),
        (kafka.AuthenticationFailedError, "credentials"),
    ],
)
def test_the_text_says_what_to_fix(kind: type[Exception], hint: str) -> None:
    """An error that people cause names what they have to change."""
    assert hint in str(unavailable("connecting", kind()))
