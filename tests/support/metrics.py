"""A server with a metrics port, and the samples that a scraper reads."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.support.callers import Server

Labels = tuple[tuple[str, str], ...]


class Scrape(dict[tuple[str, Labels], float]):
    """The samples of one scrape, by name and labels."""

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """Returns the samples of a metric by the values of their labels."""
        return {tuple(value for _, value in labels): sample for (each, labels), sample in self.items() if each == name}

    def one(self, name: str, **labels: str) -> float:
        """Returns the sample with these labels. Raises KeyError if it is missing."""
        return self[name, tuple(sorted(labels.items()))]


@dataclass(frozen=True, slots=True)
class Measured:
    """A server with a port for metrics."""

    server: Server
    metrics_port: int

    async def text(self) -> str:
        """Returns the response to a scrape."""

        def get() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
                assert answer.headers["content-type"].startswith("text/plain")
                content: bytes = answer.read()
                return content.decode()

        return await asyncio.to_thread(get)

    async def scrape(self) -> Scrape:
        """Returns the samples of a scrape."""
        return Scrape(
            ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
            for family in text_string_to_metric_families(await self.text())
            for sample in family.samples
        )

    async def until(self, happened: Callable[[Scrape], bool]) -> Scrape:
        """Returns the first scrape that satisfies a condition."""
        async with asyncio.timeout(30):
            while not happened(found := await self.scrape()):
                await asyncio.sleep(0.01)
            return found
