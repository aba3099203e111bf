"""The bench of a GPU: `splitwiser-lab bench --suite gpu`. A file a section; `suite` runs them in a time budget."""
