"""Requests that offer another protocol are answered in this one, as RFC 9110 (7.8) has it.

httptools ends such a request at its headers: what is read of its body is given back, and the rest would be the next
request. Java's HttpClient offers HTTP/2 with all it sends to an `http://` address.
"""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class WithoutUpgrades(HttpToolsProtocol):
    """One connection, on which every request is read to its end."""

    def feed(self, data: bytes) -> None:
        """`data` to the parser; a head with an offer a second time, without it. Raises HttpParserError."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
                data = self._head_without_offer() + rest if self.is_offer() else rest
                # What was asked to close the connection takes no further head.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            else:
                return

    def is_offer(self) -> bool:
        """Whether the request that is being parsed will come again. CONNECT never has a body."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])
