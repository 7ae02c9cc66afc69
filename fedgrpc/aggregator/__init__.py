"""The aggregator: a thin asyncio shell around `rounds` and `aggregation`. It needs no torch and no data."""
