"""Both ends of a connection: `ElasticClient` asks, `ElasticServer` answers."""

from .client import ElasticClient, GroupControl
from .server import ElasticServer, Group, Service, Session

__all__ = ["ElasticClient", "ElasticServer", "Group", "GroupControl", "Service", "Session"]
