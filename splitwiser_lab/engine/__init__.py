"""The engine: requests, pages, the scheduler and the one loop. It knows no GPU mechanism and no widget."""
