"""Who owns which page of the KV pool.

The hand-off from prefill to decode happens here, or rather does not: pages belong to a request, not to
a phase, so nothing moves.
"""

from __future__ import annotations

from splitwiser_lab.engine.request import Request


class PageAllocator:
    """Gives pages to requests and takes them back. The most recently freed pages go out first: they are warm."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that belong to nobody."""
        return len(self._free)

    def needed(self, request: Request, tokens: int) -> int:
        """Pages that `request` lacks to hold `tokens` tokens."""
        return max(0, -(-tokens // self.page_size) - len(request.pages))

    def grow(self, request: Request, tokens: int) -> bool:
        """Give `request` the pages for `tokens` tokens: all of them, or none and False."""
        need = self.needed(request, tokens)
        if need > len(self._free):
            return False
        request.pages += [self._free.pop() for _ in range(need)]
        return True

    def release(self, request: Request) -> None:
        """Take back all pages of `request`; what was computed in them is lost."""
        self._free += reversed(request.pages)
        request.pages = []
        request.computed = 0
