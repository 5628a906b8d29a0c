"""HubMPQ, in the order its parts build on each other: what it holds, searching, the whole route."""

from .hubmpq import HubMPQ

__all__ = ["HubMPQ"]
