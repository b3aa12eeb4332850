"""Settings, by argument and from the environment."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from kafka_broker import RetryPolicy
from kafka_broker._settings import BrokerSettings, load_settings
from kafka_broker.errors import ConfigurationError

SECRET = "hunter2"

VALUES: dict[str, Any] = {
    "bootstrap_servers": "kafka-1:9092,kafka-2:9092",
    "group_id": "another-group",
    "instance": "replica-1",
    "group_instance_id": "member-1",
    "rack_id": "zone-a",
    "create_topics": False,
    "module_partitions": 3,
    "reply_partitions": 5,
    "reply_retention": 7.5,
    "start_timeout": 1.5,
    "delivery_timeout": 2.5,
    "reply_timeout": 3.5,
    "drain_timeout": 4.5,
    "rebalance_timeout": 5.5,
    "session_timeout": 6.5,
    "handler_timeout": 9.5,
    "retry": {"attempts": 5, "base": 0.5, "cap": 2.0, "jitter": 0.0},
    "commit_interval": 0.5,
    "reply_ttl": 8.5,
    "outbox_events": 11,
    "outbox_bytes": 12,
    "storage_events": 13,
    "concurrency": 14,
    "in_flight_events": 15,
    "in_flight_bytes": 16,
    "security_protocol": "SSL",
    "sasl_mechanism": "SCRAM-SHA-512",
    "username": "me",
    "password": SECRET,
    "ssl_cafile": "/ca.pem",
    "ssl_certfile": "/cert.pem",
    "ssl_keyfile": "/key.pem",
    "client_options": {"metadata_max_age_ms": 5000, "nested": {"a": [1, None]}},
}
SECONDS = [name for name, value in VALUES.items() if isinstance(value, float)]
COUNTS = [name for name, value in VALUES.items() if type(value) is int]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KAFKA_BROKER_"):
            monkeypatch.delenv(name)


def in_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    monkeypatch.setenv(f"KAFKA_BROKER_{name.upper()}", text)


def plain(value: object) -> object:
    if isinstance(value, RetryPolicy):
        return value.model_dump(exclude_unset=True)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def refusal(module: str | None = "Orders", /, **values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(module, values)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error!s} {error!r}"
        error = error.__cause__ or error.__context__
    return str(caught.value)


def test_every_setting_is_tried_here() -> None:
    """A new setting has to be added to the table above."""
    assert {"module", *VALUES} == set(BrokerSettings.model_fields)


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_can_be_an_argument(name: str) -> None:
    """Each constructor argument has the name of its setting."""
    assert VALUES[name] == plain(getattr(load_settings("Orders", {name: VALUES[name]}), name))


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_can_come_from_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its variable, `client_options` as JSON."""
    in_environment(monkeypatch, name, VALUES[name])
    assert VALUES[name] == plain(getattr(load_settings("Orders", {}), name))


@pytest.mark.parametrize("name", [name for name in VALUES if name != "security_protocol"])
def test_an_argument_wins_over_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program says is more specific than where it runs."""
    other = {
        str: "other",
        int: 99,
        float: 99.5,
        bool: True,
        dict: {"attempts": 1} if name == "retry" else {"metadata_max_age_ms": 1},
    }[type(VALUES[name])]
    in_environment(monkeypatch, name, "PLAIN" if name == "sasl_mechanism" else other)
    assert VALUES[name] == plain(getattr(load_settings("Orders", {name: VALUES[name]}), name))


def test_the_module_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the default instance needs no argument at all."""
    monkeypatch.setenv("KAFKA_BROKER_MODULE", "Orders")
    assert "Orders" == load_settings(None, {}).module
    assert "Payments" == load_settings("Payments", {}).module


def test_everything_but_the_module_has_a_default() -> None:
    """A module on a laptop needs its name only."""
    settings = load_settings("Orders", {})
    assert ("localhost:9092", "Orders", 30.0, True) == (
        settings.bootstrap_servers,
        settings.group_id,
        settings.reply_timeout,
        settings.create_topics,
    )
    assert ("Orders.replies", "Orders.dlq") == (settings.reply_topic, settings.dead_letter_topic)


def test_the_group_is_the_module_unless_given() -> None:
    """Replicas of one module share its work without further ado."""
    assert "Orders" == load_settings("Orders", {}).group_id
    assert "Orders" == load_settings("Orders", {"group_id": ""}).group_id
    assert "blue" == load_settings("Orders", {"group_id": "blue"}).group_id


def test_every_replica_has_a_name_of_its_own() -> None:
    """Two brokers in one process are told apart, too."""
    assert load_settings("Orders", {}).instance != load_settings("Orders", {}).instance


def test_settings_cannot_be_changed() -> None:
    """They were checked once."""
    settings = load_settings("Orders", {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.module = "Payments"


def test_a_missing_module_names_its_variable() -> None:
    """The error says both ways to give it."""
    text = refusal(None)
    assert "module is missing: pass it, or set KAFKA_BROKER_MODULE" == text


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", ".", "..", "a\n", "a" * 201, "a:b", "a,b"])
def test_a_module_has_to_be_a_legal_topic(name: str) -> None:
    """Kafka would refuse it later, less clearly."""
    text = refusal(name)
    assert text.startswith("module")
    assert "KAFKA_BROKER_MODULE" in text


@pytest.mark.parametrize("name", ["Orders", "io.org.230123", "a_b-c.D9", "a" * 200, "..."])
def test_a_module_may_be_any_legal_topic(name: str) -> None:
    """Letters, digits, dot, underscore and hyphen, and room for `.replies` behind it."""
    assert name == load_settings(name, {}).module


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), SECRET, None])
@pytest.mark.parametrize("name", SECONDS)
def test_a_time_is_positive_and_finite(name: str, value: object) -> None:
    """The error names the setting and its variable, and not the value."""
    text = refusal(**{name: value})
    assert text.startswith(f"{name}: ")
    assert f"KAFKA_BROKER_{name.upper()}" in text


@pytest.mark.parametrize("value", [0, -1, 1.5, SECRET])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_positive_and_whole(name: str, value: object) -> None:
    """As for times."""
    text = refusal(**{name: value})
    assert text.startswith(f"{name}: ")
    assert f"KAFKA_BROKER_{name.upper()}" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("security_protocol", SECRET),
        ("sasl_mechanism", SECRET),
        ("create_topics", SECRET),
        ("client_options", SECRET),
        ("client_options", {1: SECRET}),
        ("password", [SECRET]),
        ("username", {SECRET: 1}),
        ("bootstrap_servers", ""),
        ("bootstrap_servers", [SECRET]),
        ("instance", ""),
        ("group_instance_id", ""),
        ("group_instance_id", f"{SECRET} and more"),
        ("rack_id", ""),
        ("group_id", f"{SECRET} and more"),
    ],
)
def test_a_wrong_value_is_never_quoted(name: str, value: object) -> None:
    """It may be a secret that was put into the wrong place."""
    text = refusal(**{name: value})
    assert name in text
    assert f"KAFKA_BROKER_{name.upper()}" in text


@pytest.mark.parametrize(
    "text", ["{", SECRET, f'["{SECRET}"]', f'{{"sasl_plain_password": {SECRET}}}']
)
def test_client_options_that_are_no_json_object_are_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in the environment is a `ConfigurationError` like any other."""
    monkeypatch.setenv("KAFKA_BROKER_CLIENT_OPTIONS", text)
    assert "KAFKA_BROKER_CLIENT_OPTIONS" in refusal()


def test_every_wrong_setting_is_named_at_once() -> None:
    """Nobody has to fix them one by one."""
    text = refusal(concurrency=0, reply_timeout=0, surprise=1)
    assert 3 == len(text.split("; "))
    for name in ("concurrency", "reply_timeout", "surprise"):
        assert name in text


def test_an_unknown_setting_is_refused() -> None:
    """An unknown name must not be ignored, and its value not be shown."""
    assert "passphrase is not a setting" == refusal(passphrase=SECRET)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_needs_credentials(protocol: str, mechanism: str) -> None:
    """Half of them are not enough; the error tells both variables."""
    for given in ({}, {"username": "me"}, {"password": SECRET}):
        text = refusal(security_protocol=protocol, sasl_mechanism=mechanism, **given)
        assert "KAFKA_BROKER_USERNAME" in text
        assert "KAFKA_BROKER_PASSWORD" in text
    values = {"security_protocol": protocol, "sasl_mechanism": mechanism}
    assert load_settings("Orders", {**values, "username": "me", "password": SECRET})


def test_a_token_needs_no_credentials() -> None:
    """OAUTHBEARER gets its token through `client_options`."""
    values = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
    assert load_settings("Orders", values).username is None


def test_secrets_are_not_shown() -> None:
    """Neither the password nor what may be one in the options of the client."""
    options = {"sasl_plain_password": SECRET}
    settings = load_settings("Orders", {"password": SECRET, "client_options": options})
    for text in (repr(settings), str(settings), f"{settings.model_dump()['password']}"):
        assert SECRET not in text
    assert settings.password is not None
    assert SECRET == settings.password.get_secret_value()
