"""The page of the shop, used by a browser: a real Kafka and a process for each service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from .shop import NO_CHROMIUM, Shop, find_chromium, order, running_chromium, running_shop

AFTER_RESTART = 60_000.0
"""Milliseconds until what waits for a service that is started again has its answer."""

LAMPS_ARE_BACK = """async () => {
    const { items } = await (await fetch("/stock")).json();
    return items.find(({ name }) => name === "lamp").left === 3;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """An installed Chromium; without one a laptop skips and CI fails."""
    executable = find_chromium()
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a browser: {NO_CHROMIUM}")
        pytest.skip(NO_CHROMIUM)
    with running_chromium(executable) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def shop(browser: Browser, kafka: str) -> Iterator[Shop]:  # noqa: ARG001  # no browser, no shop
    with running_shop(KAFKA_BROKER_BOOTSTRAP_SERVERS=kafka) as started:
        yield started


@pytest.fixture
def page(browser: Browser, shop: Shop) -> Iterator[Page]:
    """The page in a window of its own; it has raised nothing and loaded nothing from elsewhere."""
    with visiting(browser, shop) as opened:
        yield opened


@contextmanager
def visiting(browser: Browser, shop: Shop) -> Iterator[Page]:
    errors: list[str] = []
    requested: list[str] = []
    with browser.new_page() as page:
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(shop.url)
        yield page
    assert [] == errors
    assert [] == [url for url in requested if not url.startswith((shop.url, "data:"))]


@pytest.mark.integration
def test_order_is_paid(page: Page) -> None:
    """A card shows the receipt, both requests, their hops, and the processes that answered."""
    order(page, "mug", quantity=2)
    card = page.get_by_role("article", name="Order of 2 mug")
    expect(card.get_by_role("status")).to_contain_text("paid in")
    expect(card).to_contain_text("24 €")
    expect(card).to_contain_text("answered by stock, process")
    expect(card).to_contain_text("answered by payments, process")
    hops = card.get_by_role("listitem").get_by_role("listitem")
    expect(hops).to_contain_text(
        ["Orders item.reserve", "Stock respond", "Orders card.charge", "Payments respond"]
    )


@pytest.mark.integration
def test_refusals_are_problems(page: Page) -> None:
    """What is refused is shown as the problem that it is, and a declined order keeps nothing."""
    order(page, "teapot")
    sold_out = page.get_by_role("article", name="Order of 1 teapot")
    expect(sold_out.get_by_role("status")).to_contain_text("409")
    expect(sold_out).to_contain_text("urn:kafka-broker:sold-out")
    expect(sold_out).to_contain_text("teapot: an order of 1, and 0 left")

    order(page, "lamp", quantity=3, card="4000 0002")
    declined = page.get_by_role("article", name="Order of 3 lamp")
    expect(declined.get_by_role("status")).to_contain_text("402")
    expect(declined).to_contain_text("the bank declines the card 4000 0002")
    page.wait_for_function(LAMPS_ARE_BACK)


@pytest.mark.integration
def test_order_for_later(page: Page) -> None:
    """An order that was accepted with 202 gets its receipt, or its problem, by an event."""
    order(page, "poster", answer="later")
    paid = page.get_by_role("article", name="Order of 1 poster")
    expect(paid.get_by_role("status")).to_contain_text("paid in")
    expect(paid.get_by_role("listitem").first).to_contain_text("order.place")

    order(page, "teapot", answer="later")
    refused = page.get_by_role("article", name="Order of 1 teapot")
    expect(refused.get_by_role("status")).to_contain_text("409")
    expect(refused).to_contain_text("urn:kafka-broker:sold-out")


@pytest.mark.integration
def test_payments_is_away(page: Page, shop: Shop) -> None:
    """Orders in an outage time out, can be given up, or are paid when payments is back."""
    services = page.get_by_role("region", name="Services")
    expect(services).to_contain_text("Payments is up")
    before = set(shop.services)
    page.get_by_role("button", name="Stop payments").click()
    expect(services).to_contain_text("has been asked to stop")
    order(page, "mug", quantity=3, answer="3 seconds at most")
    expect(services).to_contain_text("Payments is down")
    expect(page.get_by_role("button", name="Stop payments")).to_be_disabled()

    order(page, "mug", quantity=4)
    order(page, "lamp", quantity=3)
    given_up = page.get_by_role("article", name="Order of 3 lamp")
    given_up.get_by_role("button", name="Give up").click()
    expect(given_up.get_by_role("status")).to_contain_text("given up")
    page.wait_for_function(LAMPS_ARE_BACK)
    hurried = page.get_by_role("article", name="Order of 3 mug")
    expect(hurried.get_by_role("status")).to_contain_text("504", timeout=AFTER_RESTART)
    expect(hurried).to_contain_text("urn:kafka-broker:reply-timeout")

    shop.wait_for("payments is up")
    [again] = set(shop.services) - before
    assert "payments has ended (code 0); it starts again in 8 s" in shop.output
    patient = page.get_by_role("article", name="Order of 4 mug")
    expect(patient.get_by_role("status")).to_contain_text("paid in", timeout=AFTER_RESTART)
    expect(patient).to_contain_text(f"answered by payments, process {again}")
    expect(services).to_contain_text("Payments is up", timeout=AFTER_RESTART)

    order(page, "mug", quantity=5)
    after = page.get_by_role("article", name="Order of 5 mug")
    expect(after.get_by_role("status")).to_contain_text("paid in")


def test_shop_in_memory(browser: Browser, tmp_path: Path) -> None:
    """Without Docker and Java all is in one process: orders are paid, nothing can be stopped."""
    environment = {"PATH": os.fspath(tmp_path), "JAVA_HOME": "", "DOCKER_HOST": "tcp://127.0.0.1:1"}
    in_memory = running_shop(KAFKA_BROKER_BOOTSTRAP_SERVERS="", **environment)
    with in_memory as shop, visiting(browser, shop) as page:
        order(page, "mug")
        expect(page.get_by_role("status")).to_contain_text("paid in")
        expect(page.get_by_text("Nothing can be stopped here")).to_be_visible()
        expect(page.get_by_role("button", name="Stop payments")).to_be_disabled()
