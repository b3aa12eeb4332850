"""`BrokerSettings`: everything that can be set, checked once, before any I/O."""

from __future__ import annotations

import os
import re
import socket
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from kafka_broker._verdicts import RetryPolicy
from kafka_broker.errors import ConfigurationError

_LEGAL_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,200}")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


def _default_instance() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


class BrokerSettings(BaseSettings):
    """Settings of one broker, by name or from the environment as ``KAFKA_BROKER_<NAME>``.

    Times are seconds, sizes are bytes. An argument wins over the environment.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="KAFKA_BROKER_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    module: str
    """The name of this service and of the topic that it reads."""
    bootstrap_servers: str = Field(default="localhost:9092", min_length=1)
    """``host:port``, several with commas between; ``memory://`` or ``memory://name`` for none."""
    group_id: str = ""
    """The consumer group; the module's name unless given."""
    instance: str = Field(default_factory=_default_instance, min_length=1)
    """What tells this replica from the others; unique for each process unless given."""
    group_instance_id: str | None = Field(default=None, min_length=1)
    """Makes this replica a static member of the group (KIP-345); each replica needs its own.

    It may come back within ``session_timeout`` and find its partitions unmoved. The price: also
    those of a replica that was stopped for good wait that long before another handles them.
    """
    rack_id: str | None = Field(default=None, min_length=1)
    """Where this replica is: it reads from a node of the same rack if Kafka allows it (KIP-392)."""

    create_topics: bool = True
    """Create the module, reply, retry and dead-letter topics when they are missing."""
    module_partitions: Count = 12
    """Partitions of the module topic when it is created: the most replicas that share its work."""
    reply_partitions: Count = 16
    """Partitions of the reply topic when it is created."""
    reply_retention: Seconds = 3600.0
    """How long Kafka keeps a reply, when the reply topic is created."""

    start_timeout: Seconds = 30.0
    """How long a start waits for Kafka."""
    delivery_timeout: Seconds = 30.0
    """How long a produced event may take to be acknowledged."""
    reply_timeout: Seconds = 30.0
    """How long ``consume()`` and ``request()`` wait unless told otherwise."""
    drain_timeout: Seconds = 10.0
    """How long each step of a stop may take: handler, reply, commit, what was produced."""
    rebalance_timeout: Seconds = 25.0
    """How long a rebalance may take; most of it is left to the running handler."""
    session_timeout: Seconds = 30.0
    """How long Kafka waits for a silent replica before its partitions move."""
    handler_timeout: Seconds = 300.0
    """How long a handler may take for one try, unless its bind says otherwise.

    Then it is cancelled and has failed.
    """
    retry: RetryPolicy = RetryPolicy()
    """When a handler that raised is tried again in place, unless its bind says otherwise."""
    commit_interval: Seconds = 1.0
    """How often offsets are committed while events flow."""
    reply_ttl: Seconds = 60.0
    """How long a reply that nobody has asked for yet is kept."""

    outbox_events: Count = 100_000
    """Events that may wait for Kafka before ``produce()`` refuses."""
    outbox_bytes: Count = 64 * 1024 * 1024
    """Bytes that may wait for Kafka before ``produce()`` refuses."""
    storage_events: Count = 10_000
    """Events the storage holds before fetching stops; also how many unclaimed replies are kept."""
    concurrency: Count = 100
    """Handlers that run at the same time; also the worker threads for plain ``def`` handlers."""
    in_flight_events: Count = 10_000
    """Events that may be taken from Kafka and not be committed yet.

    They are shared out among the partitions. After a crash at most so many are handled again.
    """
    in_flight_bytes: Count = 64 * 1024 * 1024
    """Bytes of events that wait for their handlers or are being handled, before fetching stops."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "PLAIN"
    username: str | None = None
    password: SecretStr | None = None
    ssl_cafile: str | None = None
    """Certificates to trust, PEM; the system's unless given."""
    ssl_certfile: str | None = None
    """Our own certificate, PEM, for mutual TLS."""
    ssl_keyfile: str | None = None
    """The key of our own certificate, PEM."""
    client_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Handed to aiokafka untouched, to each client that knows the option."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _addresses(cls, value: str) -> str:
        if "://" in value and not value.startswith("memory://"):
            msg = "must be host:port, several with commas between, without a scheme"
            raise ValueError(msg)
        return value

    @field_validator("module", "group_id", "group_instance_id")
    @classmethod
    def _legal_name(cls, value: str | None) -> str | None:
        if value and not (_LEGAL_TOPIC.fullmatch(value) and value not in {".", ".."}):
            msg = "must be 1 to 200 characters of a-z A-Z 0-9 . _ -"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _complete(self) -> BrokerSettings:
        if not self.module:
            msg = "module must not be empty (KAFKA_BROKER_MODULE)"
            raise ValueError(msg)
        if not self.group_id:
            object.__setattr__(self, "group_id", self.module)
        by_password = "SASL" in self.security_protocol and self.sasl_mechanism != "OAUTHBEARER"
        if by_password and (self.username is None or self.password is None):
            msg = (
                f"{self.security_protocol} with {self.sasl_mechanism} needs username and "
                "password (KAFKA_BROKER_USERNAME, KAFKA_BROKER_PASSWORD)"
            )
            raise ValueError(msg)
        return self

    @property
    def reply_topic(self) -> str:
        """The topic that replies to this module come to."""
        return f"{self.module}.replies"

    @property
    def retry_topic(self) -> str:
        """The topic for events that this module will handle later."""
        return f"{self.module}.retry"

    @property
    def dead_letter_topic(self) -> str:
        """The topic for events that this module could not handle."""
        return f"{self.module}.dlq"


def load_settings(module: str | None, values: dict[str, Any]) -> BrokerSettings:
    """Build the settings of a broker from its arguments and the environment.

    Raises:
        ConfigurationError: names each wrong or missing setting; never quotes a value.
    """
    if module is not None:
        values = {"module": module, **values}
    try:
        return BrokerSettings(**values)
    except ValidationError as exc:
        raise ConfigurationError(_sentence(exc)) from None
    except SettingsError as exc:  # its text tells which one, and never quotes the value
        name = "retry" if '"retry"' in str(exc) else "client_options"
        msg = f"{name} must be a JSON object (KAFKA_BROKER_{name.upper()})"
        raise ConfigurationError(msg) from None


def _sentence(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_input=False, include_url=False):
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            problems.append(f"{name} is missing: pass it, or set KAFKA_BROKER_{name.upper()}")
        elif problem["type"] == "extra_forbidden":
            problems.append(f"{name} is not a setting")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            variable = str(problem["loc"][0]).upper() if name else ""
            problems.append(f"{name}: {text} (KAFKA_BROKER_{variable})" if name else text)
    return "; ".join(problems)
