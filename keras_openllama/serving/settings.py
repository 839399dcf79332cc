"""Settings of a server."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Who may use a server, and how much.

    Attributes:
        allowed_hosts: Hosts by which clients may call the server; `"*"` for all.
        api_keys: Keys, one of which a request must have; empty for none.
        cors_origins: Origins of pages whose scripts may use the server; `"*"` for all.
        max_body_bytes: Maximum length of the body of a request.
        time_limit: Seconds that a request may take, with the time in the queue.

    Example:
        >>> ServerSettings(time_limit=60).allowed_hosts
        ('*',)
    """

    allowed_hosts: tuple[str, ...] = ("*",)
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4_000_000
    time_limit: float = 600.0
