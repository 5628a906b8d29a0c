"""HubMPQ, in the order its parts build on each other: what it holds, searching, sharing, the whole route."""

from .hubmpq import HubMPQ

__all__ = ["HubMPQ"]
