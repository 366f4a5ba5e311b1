"""The report: one table of results, the statistics on it, and its Markdown, JSON and plots."""
